"""The typed configuration: round trip, overrides, and a message that helps for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import UserError
from pretrain.config import load_config, parse_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"learning_rate": 1e-3}}, "unknown key 'optimizer.learning_rate'"),
        ({"model": {"objective": "clm", "hidden_sise": 64}}, "did you mean 'hidden_size'"),
        ({"batch_token": 1}, "did you mean 'batch_tokens'"),
        ({"zero_stage": 0}, "zero_stage 0 with bf16 is refused"),
        ({"zero_stage": 4}, "zero_stage: .*got 4"),
        ({"batch_tokens": 1000}, "batch_tokens 1000 is not a multiple of the longest length, 128: use 1024"),
        ({"data": {"train": "x", "block_length": 64}}, "curriculum.1.seq_len 128 is longer than data.block_length 64"),
        ({"data": {"train": "x", "block_length": 192}}, "curriculum.1.seq_len 128 does not divide the block of 192"),
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


def test_stage_order_and_learned_positions() -> None:
    stages = [{"until_tokens": n, "seq_len": 64, "micro_batch": 1} for n in (4096, 4096)]
    with pytest.raises(UserError, match="until_tokens must increase"):
        parse_config(minimal(curriculum=stages))
    with pytest.raises(UserError, match=r"longer than model.max_positions 64"):
        parse_config(minimal(model={"objective": "mlm", "positions": "learned", "max_positions": 64}))


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
