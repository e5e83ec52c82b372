"""`nystrom config`: every key is described, the page is what the command makes, and a file's values have an origin."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field

from data_pipeline.errors import UserError
from launch import program
from pretrain.config import RunConfig, load_config, parse_config
from pretrain.config.cli import DEFAULT, FILE, SET, main, values_of
from pretrain.config.optimizer import OptimizerConfig
from pretrain.config.reference import Key, all_keys, as_markdown, find, type_text, value_text

ROOT = Path(__file__).resolve().parents[3]
KEYS = all_keys()
LONGEST_SENTENCE = 20
"""Words."""


def minimal(**changes: Any) -> dict[str, Any]:
    stage = {"until_tokens": 8192, "seq_len": 128, "micro_batch": 2}
    raw = {"name": "t", "model": {}, "data": {"train": "shards"}, "curriculum": [stage], "batch_tokens": 1024}
    return {**raw, **changes}


def written(folder: Path, **changes: Any) -> str:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(minimal(**changes)))
    return str(path)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_key_says_what_it_means(key: Key) -> None:
    assert key.meaning, f"{key.name} has no description: Field(..., description=...)"
    assert key.meaning[0].isupper() or re.match(r"\w+( only)?: ", key.meaning), "begin as a sentence, or with a choice"
    assert key.meaning.endswith(".")
    for sentence in re.split(r"(?<=\.) ", key.meaning):
        assert len(sentence.split()) <= LONGEST_SENTENCE, f"{key.name}: shorten {sentence!r}"


def test_no_key_is_left_out_or_told_twice() -> None:
    names = [key.name for key in KEYS]
    assert len(names) == len(set(names))
    many = [{"path": "a", "weight": 1}]
    config = parse_config(minimal(data={"train": many}, callbacks=["my.module:Class"]))

    def leaves(node: Any, at: str) -> set[str]:
        if isinstance(node, list) and node and isinstance(node[0], dict):
            return leaves(node[0], f"{at}.N")
        if isinstance(node, dict) and node:
            return {leaf for key, inner in node.items() for leaf in leaves(inner, f"{at}.{key}" if at else key)}
        return {at}

    assert leaves(config.model_dump(mode="json"), "") == {key.name for key in KEYS if key.opens is None} | {
        "data.train.N.path",
        "data.train.N.weight",
        "data.train.N.name",
    }


def test_the_page_is_what_the_command_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--format", "markdown"]) == 0
    page = capsys.readouterr().out
    assert page == as_markdown(KEYS)
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == page, (
        "run: nystrom config --format markdown > docs/configuration.md"
    )
    anchors = {re.sub(r"[^\w-]", "", line[3:].lower()) for line in page.splitlines() if line.startswith("## ")}
    assert set(re.findall(r"\(#([^)]*)\)", page)) <= anchors


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (Annotated[float, Field(gt=0)], "number > 0"),
        (Annotated[int, Field(ge=0, lt=2**63)], "integer >= 0 and < 2^63"),
        (Annotated[float | None, Field(gt=0, le=1)], "number > 0 and <= 1, or null"),
        (Literal["adamw", "lion", "muon"], "adamw | lion | muon"),
        (bool, "true | false"),
        (tuple[Annotated[float, Field(ge=0.5)], Annotated[float, Field(ge=0.5)]], "list of 2: number >= 0.5"),
        (Annotated[tuple[OptimizerConfig, ...], Field(min_length=1)], "list of blocks, at least 1"),
        (dict[str, Annotated[float, Field(ge=0)]] | None, "map of name to number >= 0, or null"),
        (OptimizerConfig, "block"),
    ],
)
def test_types_in_words(annotation: Any, text: str) -> None:
    assert type_text(annotation) == text


@pytest.mark.parametrize("value", [None, True, 1234, 0.001, 1e-8, 10_000.0, 9.89e14, [0.9, 0.95], {"web": 1.5}, "runs"])
def test_values_are_written_as_the_file_takes_them(value: Any) -> None:
    read = yaml.safe_load(value_text(value))
    assert (float(read) if isinstance(value, float) else read) == value


def test_defaults_are_those_of_the_run() -> None:
    by_name = {key.name: key for key in KEYS}
    assert by_name["batch_tokens"].default == by_name["curriculum.N.seq_len"].default == "required"
    assert by_name["optimizer.lr"].default == "0.001"
    assert by_name["model.landmark_inverse"].default == "mlm: true; clm: false"
    assert by_name["deepspeed"].default == "{}"
    assert by_name["zero_stage"].default == str(RunConfig.model_fields["zero_stage"].default)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("optimizer.lr", ["optimizer.lr"]),
        ("curriculum.0.seq_len", ["curriculum.N.seq_len"]),
        ("curriculum.N.seq_len", ["curriculum.N.seq_len"]),
        ("deepspeed.zero_optimization.round_robin_gradients", ["deepspeed"]),
        ("curriculum.0.weights.web", ["curriculum.N.weights"]),
        ("data.train.1", ["data.train", "data.train.N.path", "data.train.N.weight", "data.train.N.name"]),
        ("schedule", [f"schedule.{name}" for name in ("kind", "warmup_tokens", "decay_tokens", "decay_shape")]),
    ],
)
def test_a_key_or_a_block_is_found(asked: str, found: list[str]) -> None:
    assert [key.name for key in find(asked, KEYS)][:4] == found


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("optimizer.lrr", "unknown key 'optimizer.lrr': did you mean 'optimizer.lr'"),
        ("lr", "did you mean 'optimizer.lr'"),
        ("kind", "did you mean 'optimizer.kind' or 'schedule.kind'"),
        ("optimiser", "did you mean 'optimizer'"),
        ("quux", "`nystrom config` lists all"),
    ],
)
def test_an_unknown_key_gets_a_suggestion(asked: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["config", asked]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "clm"}, "unknown key 'objective': did you mean 'model.objective'"),
        ({"objectiv": "clm"}, "unknown key 'objectiv': did you mean 'model.objective'"),
        ({"seq_len": 1}, "did you mean 'curriculum.N.seq_len'"),
        ({"optimizer": {"seed": 1}}, "unknown key 'optimizer.seed': did you mean 'seed'"),
        ({"quux": 1}, "unknown key 'quux': known keys: name, "),
    ],
)
def test_a_key_in_the_wrong_block_is_sent_to_the_right_one(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_config(minimal(**changes))


def test_a_file_shows_what_is_set_and_what_is_default(tmp_path: Path) -> None:
    path = written(tmp_path, model={"objective": "clm"}, optimizer={"kind": "lion", "eps": 1e-8})
    overrides = ["optimizer.lr=3e-4", "checkpoint.every_tokens=4096"]
    values = {value.name: value for value in values_of(path, overrides)}
    assert values["optimizer.lr"][1:] == ("0.0003", SET)
    assert values["checkpoint.every_tokens"][1:] == ("4096", SET)
    assert values["optimizer.eps"][1:] == ("1e-8", FILE)  # also where it is what the default says
    assert values["optimizer.betas"][1:] == ("[0.9, 0.99]", DEFAULT)  # resolved, as the kind has them
    assert values["model.landmark_inverse"][1:] == ("false", DEFAULT)
    assert values["curriculum.0.seq_len"][1:] == ("128", FILE)
    assert values["curriculum.0.batch_tokens"][1:] == ("null (the run's batch_tokens)", DEFAULT)
    assert values["data.train"][1:] == ("shards", FILE)
    config = load_config(path, overrides)
    assert config.optimizer.lr == 3e-4
    assert values["seed"].text == str(config.seed)


def test_a_configuration_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["config", "--config", "demo-clm", "--set", "optimizer.lr=0.5"]
    assert program.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"] == load_config("demo-clm", ["optimizer.lr=0.5"]).model_dump(mode="json")
    origins = found["origins"]
    assert (origins["optimizer.lr"], origins["name"], origins["optimizer.eps"]) == ("--set", "file", "default")
    for key, part in (("optimizer", found["config"]["optimizer"]), ("optimizer.lr", 0.5)):
        assert program.main(["config", key, *words[1:], "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["config"] == part
    for key in ("curriculum.N.seq_len", "curriculum.1.seq_len"):
        assert program.main(["config", key, *words[1:], "--json"]) == 0
        part = json.loads(capsys.readouterr().out)["config"]
        stages = found["config"]["curriculum"]
        assert part == (stages if "N" in key else stages[1]["seq_len"])
    assert program.main(["config", "optimizer.lr", "--json"]) == 0
    (key,) = json.loads(capsys.readouterr().out)["keys"]
    assert (key["name"], key["block"], key["type"]) == ("optimizer.lr", "optimizer", "number > 0")


def test_a_file_with_sources_shows_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, data={"train": [{"path": "shards/web", "weight": 3}, {"path": "b", "weight": 1}]})
    assert main(["data.train.1", "--config", path]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["data.train.1.path", "b", FILE],
        ["data.train.1.weight", "1", FILE],
        ["data.train.1.name", "b", DEFAULT],
    ]
    assert main(["curriculum.N.seq_len", "--config", path, "--set", "curriculum.0.seq_len=64"]) == 0
    assert capsys.readouterr().out.split() == ["curriculum.0.seq_len", "64", SET]
    with pytest.raises(UserError, match=r"has no 'curriculum\.3'"):
        main(["curriculum.3", "--config", path])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--set", "seed=1"], "give --config too"),
        (["optimizer", "--format", "markdown"], "leave out the key"),
        (["--config", "no/such.yaml"], "no/such.yaml does not exist"),
    ],
)
def test_mistakes_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(argv)


def test_a_block_is_printed_with_its_meanings_and_without_torch() -> None:
    code = "import sys; from launch.program import main; main(['config', 'optimizer']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "optimizer.kind  (adamw | lion | muon; default: adamw)\n    adamw: Loshchilov" in done.stdout
    assert "schedule." not in done.stdout
    assert done.stdout.endswith("False\n")


UNITS = (
    "bytes|tokens?|rows?|steps?|minutes?|seconds?|layers?|heads?|segments?|checkpoints?|texts?|words?|landmarks?|taps"
    "|FLOP/s|share|probability|decay|rates?|width|wide|base|factor|deviation|norm|momentum|weights?|added|parameter|scale"
    "|initial|ZeRO"
)
NUMBERS = [key for key in KEYS if ("integer" in key.type or "number" in key.type) and not key.is_map]


@pytest.mark.parametrize("key", NUMBERS, ids=lambda key: key.name)
def test_every_number_says_what_it_counts(key: Key) -> None:
    """The unit stands in the name or in the meaning, or the words for a number without one."""
    assert re.search(rf"\b({UNITS})\b", f"{key.name.replace('_', ' ')} {key.meaning}", re.IGNORECASE), (
        f"{key.name}: say in its description what it counts: tokens, rows, steps, seconds, a share, ..."
    )
    assert key.default
