"""The typed configuration: round trip, overrides, and a message that helps for each mistake."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.batches.masking import Masking
from data_pipeline.errors import UserError
from pretrain.config import load_config, parse_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def minimal(**changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": "t",
        "model": {"objective": "clm"},
        "data": {"train": "shards"},
        "curriculum": [
            {"until_tokens": 4096, "seq_len": 64, "micro_batch": 4},
            {"until_tokens": 8192, "seq_len": 128, "micro_batch": 2},
        ],
        "batch_tokens": 1024,
    }
    return {**raw, **changes}


def test_yaml_round_trip() -> None:
    config = parse_config(minimal(deepspeed={"zero_optimization": {"round_robin_gradients": True}}))
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_the_precision_is_left_to_the_machine_unless_it_is_named() -> None:
    config = parse_config(minimal())
    assert config.precision == "auto" == parse_config(yaml.safe_load(config.to_yaml())).precision
    assert parse_config(minimal(zero_stage=0)).precision == "auto"
    assert parse_config(minimal(precision="bf16")).precision == "bf16"


def test_masking_is_what_the_data_pipeline_takes() -> None:
    assert parse_config(minimal()).data.masking.build() == Masking()
    masking = {"unit": "span", "rate": 0.3, "mask_share": 1.0, "random_share": 0.0, "span_p": 0.5, "span_max": 4}
    config = parse_config(minimal(data={"train": "x", "masking": masking}))
    assert asdict(config.data.masking.build()) == masking


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem


def test_overrides_reach_lists_numbers_and_missing_blocks(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(minimal()))
    config = load_config(
        path, ["curriculum.1.micro_batch=8", "optimizer.lr=3e-4", "data.valid=held/out", "checkpoint.every_tokens=null"]
    )
    assert config.curriculum[1].micro_batch == 8
    assert config.optimizer.lr == 3e-4
    assert config.data.valid == "held/out"
    assert config.checkpoint.every_tokens is None


def stages_with(**changes: Any) -> list[dict[str, Any]]:
    first, second = minimal()["curriculum"]
    return [first, {**second, **changes}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"learning_rate": 1e-3}}, "unknown key 'optimizer.learning_rate'"),
        ({"model": {"objective": "clm", "hidden_sise": 64}}, "did you mean 'hidden_size'"),
        ({"batch_token": 1}, "did you mean 'batch_tokens'"),
        ({"zero_stage": 0, "precision": "bf16"}, "zero_stage 0 with bf16 is refused"),
        ({"zero_stage": 4}, "zero_stage: .*got 4"),
        ({"batch_tokens": 1000}, "batch_tokens 1000 is not a multiple of the longest length, 128: use 1024"),
        ({"data": {"train": "x", "block_length": 64}}, "curriculum.1.seq_len 128 is longer than data.block_length 64"),
        ({"data": {"train": "x", "block_length": 192}}, "curriculum.1.seq_len 128 does not divide the block of 192"),
        ({"data": {"train": "x", "masking": {"unit": "words"}}}, "data.masking.unit: .*'token', 'word' or 'span'"),
        ({"data": {"train": "x", "masking": {"span_p": 0.0}}}, "data.masking.span_p: .*greater than 0, got 0.0"),
        ({"data": {"train": "x", "masking": {"span_max": 0}}}, "data.masking.span_max: .*got 0"),
        ({"data": {"train": "x", "masking": {"random_share": 0.3}}}, "data.masking: mask_share 0.8 .* is more than 1"),
        (
            {"curriculum": stages_with(batch_tokens=1000)},
            "curriculum.1.batch_tokens 1000 is not a .*use 1024",
        ),
        (
            {"curriculum": stages_with(masking_rate=0.3)},
            "curriculum.1.masking_rate has no effect .*: clm",
        ),
        ({"curriculum": stages_with(masking_rate=1.0)}, "curriculum.1.masking_rate: .*less than 1, got 1.0"),
        ({"curriculum": stages_with(rope_theta=0)}, "curriculum.1.rope_theta: .*greater than 0, got 0"),
        (
            {"curriculum": stages_with(rope_theta=1e5), "model": {"positions": "learned"}},
            "curriculum.1.rope_theta has no effect with model.positions: learned",
        ),
        (
            {"model": {"positions": "none", "rope_scaling": "ntk"}},
            "rope_scaling ntk has no effect with .*: none",
        ),
        (
            {"model": {"positions": "learned", "rope_position_scale": 0.5}},
            "rope_position_scale 0.5 has no effect with positions: learned",
        ),
        (
            {"model": {"hidden_size": 8, "num_heads": 4, "rope_scaling": "ntk"}},
            "rope_scaling ntk needs heads wider than 2, and hidden_size / num_heads is 2",
        ),
        ({"model": {"trained_positions": 64}}, "trained_positions 64 has no effect with positions: rotary"),
        (
            {"model": {"positions": "learned", "trained_positions": 600}},
            "trained_positions 600 is more than max_positions 512",
        ),
        (
            {"model": {"positions": "learned", "trained_positions": 64}},
            "model.trained_positions follows from the curriculum: leave it out",
        ),
        ({"model": {"objective": "mlm", "conv_kernel": 4}}, "conv_kernel 4 is even"),
        ({"model": {"objective": "mlm", "hidden_size": 10, "num_heads": 3}}, "not divisible by num_heads 3"),
        ({"schedule": {"warmup_tokens": 8192}}, "leaves nothing of the run's 8192 tokens"),
        ({"name": "../up"}, "name"),
        ({"data": {}}, "key 'data.train' is missing"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(minimal(**changes))


SOURCES = [{"path": "shards/web", "weight": 3}, {"path": "shards/v2/code", "weight": 1.5}, {"path": "x/", "weight": 0}]


def test_sources_have_names_and_weights_in_every_stage() -> None:
    weights = {"web": 1, "code": 0, "x": 0.5}
    config = parse_config(
        minimal(data={"train": SOURCES, "packing": "documents"}, curriculum=stages_with(weights=weights))
    )
    assert [source.name for source in config.data.sources] == ["code", "web", "x"]
    assert config.stage_weights(0) == {"web": 3, "code": 1.5, "x": 0}
    assert config.stage_weights(1) == weights
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
    turned = parse_config(minimal(data={"train": SOURCES[::-1]}))
    assert turned.data.sources == config.data.sources  # the order of the list is without meaning
    (single,) = parse_config(minimal(data={"train": "shards/web"})).data.sources
    assert (single.path, single.name) == ("shards/web", "web")


@pytest.mark.parametrize(
    ("data", "weights", "message"),
    [
        ({"train": []}, None, "data.train: .*at least 1"),
        ({"train": 3}, None, "data.train: .*valid string, got 3"),
        ({"train": [{"path": "a"}]}, None, "key 'data.train.0.weight' is missing"),
        ({"train": ["a"]}, None, "data.train.0: .*got 'a'"),
        ({"train": [{"path": "a", "weight": -1}]}, None, "data.train.0.weight: .*greater than or equal to 0, got -1"),
        ({"train": [{"path": "a", "weigth": 1}]}, None, "unknown key 'data.train.0.weigth': did you mean 'weight'"),
        (
            {"train": [{"path": "a/c", "weight": 1}, {"path": "b/c", "weight": 1}]},
            None,
            "two sources are called 'c': give them names of their own",
        ),
        ({"train": SOURCES}, {"wbe": 1, "code": 1, "x": 1}, "curriculum.1.weights: .* 'wbe': did you mean 'web'"),
        ({"train": SOURCES}, {"law": 1}, "no source 'law': the sources are code, web, x"),
        ({"train": SOURCES}, {"web": 1}, "curriculum.1.weights leaves out code, x: give every source"),
        ({"train": SOURCES}, {"web": 1, "code": 1, "x": float("nan")}, "curriculum.1.weights.x: .*got nan"),
        ({"train": "shards", "packing": "docs"}, None, "data.packing: .*'stream' or 'documents'"),
        ({"train": "shards", "max_padding": 1.0}, None, "data.max_padding: .*less than 1, got 1.0"),
    ],
)
def test_mistakes_in_sources_are_named(data: dict[str, Any], weights: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(minimal(data=data, curriculum=stages_with(weights=weights)))


def test_stages_must_be_in_order() -> None:
    stages = [{"until_tokens": n, "seq_len": 64, "micro_batch": 1} for n in (4096, 4096)]
    with pytest.raises(UserError, match="until_tokens must increase"):
        parse_config(minimal(curriculum=stages))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a: [", [], "not valid YAML"),
        ("- a\n- b\n", [], "must hold keys and values"),
        (None, [], "does not exist"),
        (yaml.safe_dump(minimal()), ["lr"], "write it as key.sub=value"),
        (yaml.safe_dump(minimal()), ["curriculum.9.seq_len=1"], "is a list of 2, no item '9'"),
        (yaml.safe_dump(minimal()), ["name.x=1"], "'name' is a single value"),
    ],
)
def test_bad_files_and_overrides(tmp_path: Path, text: str | None, overrides: list[str], message: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path, overrides)


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_that_come_along_are_right(path: Path) -> None:
    """Each loads, its stages are possible, one process or two can share its batches, and DeepSpeed's JSON follows."""
    from pretrain.curriculum.plan import build_plan, check_world_size
    from pretrain.engine.deepspeed_config import build_deepspeed_config

    config = load_config(path)
    plan = build_plan(config)
    for processes in (1, 2):
        check_world_size(plan, processes)
    assert config.precision == "auto"
    for precision in ("bf16", "fp32"):
        generated = build_deepspeed_config(config.model_copy(update={"precision": precision}))
        assert generated["zero_optimization"]["stage"] == config.zero_stage
