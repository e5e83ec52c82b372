"""The JSON schema takes what the program takes, refuses planted mistakes, and tells an editor what each key means."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import UserError
from pretrain.config import parse_config
from pretrain.config.cli import main
from pretrain.config.reference import all_keys
from pretrain.config.schema import run_schema
from pretrain.model.attention.registry import FORMS
from pretrain.optim.kind import KINDS

jsonschema = pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs").glob("*.yaml"))
SCHEMA = run_schema()
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)


class Editor(yaml.SafeLoader):
    """YAML 1.2 as far as numbers go: ``2e-3`` is one, ``1_000_000`` is text. Most editors read so."""


class Old(yaml.SafeLoader):
    """YAML 1.1, which the program reads."""


Editor.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Editor.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
Editor.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def minimal(**changes: Any) -> dict[str, Any]:
    stage = {"until_tokens": 8192, "seq_len": 128, "micro_batch": 2}
    raw = {"name": "t", "model": {}, "data": {"train": "shards"}, "curriculum": [stage], "batch_tokens": 1024}
    return {**raw, **changes}


def test_it_is_a_schema_of_draft_7_without_references() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    text = json.dumps(SCHEMA)
    for absent in ("$ref", "$defs", "left_out", "prefixItems"):
        assert f'"{absent}"' not in text


@pytest.mark.parametrize("loader", [Old, Editor])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path: Path, loader: type[yaml.SafeLoader]) -> None:
    raw = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    assert [error.message for error in VALIDATOR.iter_errors(raw)] == []


def test_what_a_run_writes_itself_is_valid() -> None:
    many = {"train": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2.5}]}
    model = {"attention": ["window", "nystrom"], "positions": ["rotary", "none"], "ffn": "relu2"}
    callbacks = ["my.module:Class", {"call": "m:C", "settings": {"x": 1}}]
    config = parse_config(minimal(data=many, callbacks=callbacks, model=model))
    assert list(VALIDATOR.iter_errors(yaml.safe_load(config.to_yaml()))) == []
    assert list(VALIDATOR.iter_errors(minimal(data=many, callbacks=["my.module:Class"]))) == []


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"objective": "clm"}, ()),  # belongs into model
        ({"model": {"hidden_sise": 64}}, ("model",)),
        ({"model": {"attention": "nystrm"}}, ("model", "attention")),
        ({"model": {"attention": []}}, ("model", "attention")),
        ({"model": {"positions": ["learned", "none"]}}, ("model", "positions")),
        ({"model": {"ffn": "maxout"}}, ("model", "ffn")),
        ({"model": {"norm_kind": "batchnorm"}}, ("model", "norm_kind")),
        ({"model": {"attention": ["window", "nystrm"]}}, ("model", "attention")),
        ({"model": {"hidden_size": 0}}, ("model", "hidden_size")),
        ({"model": {"landmark_inverse": "yes please"}}, ("model", "landmark_inverse")),
        ({"optimizer": {"kind": "sgd"}}, ("optimizer", "kind")),
        ({"optimizer": {"lr": "fast"}}, ("optimizer", "lr")),
        ({"optimizer": {"lr": "-2e-3"}}, ("optimizer", "lr")),
        ({"optimizer": {"betas": [0.9]}}, ("optimizer", "betas")),
        ({"optimizer": {"betas": [0.9, 1.5]}}, ("optimizer", "betas", 1)),
        ({"zero_stage": 4}, ("zero_stage",)),
        ({"precision": "bfloat16"}, ("precision",)),
        ({"curriculum": []}, ("curriculum",)),
        ({"curriculum": [{"until_tokens": 4096, "seq_len": 64}]}, ("curriculum", 0)),
        ({"curriculum": [{"until_tokens": "4k", "seq_len": 64, "micro_batch": 1}]}, ("curriculum", 0, "until_tokens")),
        ({"data": {"train": 3}}, ("data", "train")),
        ({"data": {"train": "x", "packing": "docs"}}, ("data", "packing")),
        ({"data": {}}, ("data",)),
        ({"name": "../up"}, ("name",)),
        ({"callbacks": ["module"]}, ("callbacks", 0)),
    ],
)
def test_planted_mistakes_are_found_where_they_are(changes: dict[str, Any], place: tuple[str | int, ...]) -> None:
    raw = minimal(**changes)
    assert [tuple(error.absolute_path) for error in VALIDATOR.iter_errors(raw)] == [place]
    with pytest.raises(UserError):  # and the program refuses the same
        parse_config(copy.deepcopy(raw))


@pytest.mark.parametrize("text", ["2e-3", "1_000.5", ".5", "3"])
def test_numbers_written_as_text_are_those_that_the_program_reads(text: str) -> None:
    raw = minimal(optimizer={"lr": text})
    assert list(VALIDATOR.iter_errors(raw)) == []
    assert parse_config(raw).optimizer.lr == float(text)
    counted = minimal(batch_tokens="1_024")
    assert list(VALIDATOR.iter_errors(counted)) == []
    assert parse_config(counted).batch_tokens == 1024


def properties(node: Any, at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key of the schema by its dotted name, N for an item of a list."""
    for name, inner in node.get("properties", {}).items():
        dotted = f"{at}{name}"
        yield dotted, inner
        yield from properties(inner, f"{dotted}.")
        for choice in (inner, *inner.get("oneOf", ()), *inner.get("anyOf", ())):
            items = choice.get("items", {})
            for item in (items, *items.get("anyOf", ())):
                yield from properties(item, f"{dotted}.N.")


def test_each_key_is_described_as_in_the_reference() -> None:
    found = dict(properties(SCHEMA))
    keys = {key.name: key for key in all_keys()}
    assert found.keys() == keys.keys()
    for name, node in found.items():
        assert node["description"].startswith(keys[name].meaning), name
        if keys[name].default not in ("required", "its defaults") and not keys[name].is_map:
            assert "default" in node or keys[name].default in node["description"], name
    one, pattern = found["model.attention"]["anyOf"]
    assert one["enum"] == pattern["items"]["enum"] == list(FORMS.names())
    assert found["optimizer.kind"]["enum"] == list(KINDS.names())
    assert found["checkpoint.every_tokens"]["description"].endswith("If left out: by `every_minutes`.")
    assert found["optimizer.lr"]["default"] == 0.001
    required = {name for name, key in keys.items() if key.default == "required" and "." not in name}
    assert set(SCHEMA["required"]) == required


def test_a_block_that_allows_unknown_keys_is_a_map() -> None:
    blocks = [node for _, node in properties(SCHEMA) if node.get("type") == "object"]
    for node in [SCHEMA, *blocks]:
        assert ("properties" in node) == (node["additionalProperties"] is False)


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
    for more in (["optimizer"], ["--config", "x.yaml"], ["--format", "markdown"]):
        with pytest.raises(UserError, match="--schema makes the schema of the whole file"):
            main(["--schema", *more])
