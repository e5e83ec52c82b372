"""The memory that is told before a run."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.config import RunConfig
from pretrain.planning.state import Group, state_bytes


def config(**changes: Any) -> RunConfig:
    base: dict[str, Any] = {
        "name": "x",
        "model": {"vocab_size": 100},
        "data": {"train": "x"},
        "curriculum": [{"until_tokens": 1000, "seq_len": 16, "micro_batch": 4}],
        "batch_tokens": 64,
        "precision": "bf16",
    }
    return RunConfig.model_validate({**base, **changes})


@pytest.mark.parametrize(
    ("precision", "stage", "expected"),
    [  # bytes of one parameter on each of 4 processes: (weights, gradients, optimizer)
        ("bf16", 1, (2, 4, 3)),
        ("bf16", 2, (2, 1, 3)),
        ("bf16", 3, (0.5, 1, 3)),
        ("fp32", 0, (4, 4, 8)),
        ("fp32", 2, (4, 1, 3)),
        ("fp32", 3, (1, 1, 2)),
    ],
)
def test_state_bytes(precision: str, stage: int, expected: tuple[float, float, float]) -> None:
    groups = (Group("decay", (1_000_000,)),)
    sizes = state_bytes(groups, config(precision=precision, zero_stage=stage), 4)
    assert tuple(x / 1_000_000 for x in (sizes.weights, sizes.gradients, sizes.optimizer)) == expected


def test_state_bytes_follow_the_optimizer() -> None:
    def optimizer_bytes(**optimizer: Any) -> int:
        groups = (Group("decay", (1000,)),)
        return state_bytes(groups, config(zero_stage=1, optimizer=optimizer), 1).optimizer

    assert optimizer_bytes() == optimizer_bytes(kind="muon") == 12_000
    assert optimizer_bytes(kind="lion") == 8_000
    assert optimizer_bytes(kind="lion", ema_decay=0.9) == 12_000


def test_gradients_added_up_in_16_bits_take_half() -> None:
    block = {"data_types": {"grad_accum_dtype": "bf16"}}
    groups = (Group("decay", (1_000_000,)),)
    assert state_bytes(groups, config(precision="bf16", zero_stage=1, deepspeed=block), 4).gradients == 2_000_000
