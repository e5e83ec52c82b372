"""The rehearsal before the first step: it leaves no trace, takes the right shapes, and tells what to do."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
from engine_case import build, engine_settings, master_weights, one_world, train_steps
from ranks import run_ranks, values

from pretrain.config import parse_config
from pretrain.curriculum.plan import build_plan
from pretrain.engine.probe import ProbeResult, _advice, _demanding_stages

STAGES = [
    {"until_tokens": 1024, "seq_len": 32, "micro_batch": 4},
    {"until_tokens": 2048, "seq_len": 64, "micro_batch": 1},
]


def probed_and_not(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Runs in the ranks: two steps of the same run, once without and once with a probe before them."""
    from pretrain.engine.probe import run_probe

    out: dict[str, Any] = {}
    with one_world() as world:
        for name in ("plain", "probed"):
            engine = build(config, world)
            missing = engine.missing_state_bytes()
            if name == "probed":
                out["result"] = run_probe(engine, engine.config, build_plan(engine.config), world)
            steps = train_steps(engine, 0, 2, micros=4, kind=kind)
            weights = {key: value.tobytes() for key, value in master_weights(engine).items()}
            out[name] = (steps, weights)
            out["state"] = (missing, engine.missing_state_bytes(), engine.num_parameters)
    return out


@pytest.mark.parametrize(
    ("zero_stage", "precision", "objective", "kind"),
    [
        (0, "fp32", "clm", "packed"),
        (3, "bf16", "mlm", "full"),
        pytest.param(1, "bf16", "mlm", "full", marks=pytest.mark.slow),
        pytest.param(1, "fp32", "clm", "full", marks=pytest.mark.slow),
        pytest.param(2, "bf16", "clm", "packed", marks=pytest.mark.slow),
        pytest.param(2, "fp32", "mlm", "full", marks=pytest.mark.slow),
        pytest.param(3, "fp32", "clm", "packed", marks=pytest.mark.slow),
    ],
)
def test_a_probe_leaves_no_trace(zero_stage: int, precision: str, objective: str, kind: str) -> None:
    model = {"objective": objective, "dropout": 0.2}
    config = engine_settings(zero_stage=zero_stage, precision=precision, model=model, curriculum=STAGES)
    for out in values(run_ranks(probed_and_not, 2, config=config, kind=kind)):
        assert out["plain"] == out["probed"]
        assert out["result"].shapes == ((1, 64), (4, 32))
        assert 0.1 < out["result"].memory_gib < 10
        missing, after, parameters = out["state"]
        shared = 2 if zero_stage else 1
        assert 8 * parameters / shared <= missing < 8 * (parameters / shared + 200)  # partitions are padded
        assert after == 0


def test_bfloat16_sums_are_left_alone_too() -> None:
    block = {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"}
    config = engine_settings(zero_stage=2, precision="bf16", curriculum=STAGES, deepspeed=block)
    for out in values(run_ranks(probed_and_not, 2, config=config, kind="full")):
        assert out["plain"] == out["probed"]


def run_out_of_memory(config: dict[str, Any], victim: int, message: str) -> str:
    """Runs in the ranks: what becomes of a probe in which one process cannot allocate."""
    import torch

    from data_pipeline.errors import UserError
    from pretrain.engine.probe import run_probe

    with one_world() as world:
        engine = build(config, world)
        if os.environ["RANK"] == str(victim):

            def fail(*args: Any) -> None:
                raise torch.OutOfMemoryError(message) if message.startswith("CUDA") else RuntimeError(message)

            engine.model.layers[1].register_forward_pre_hook(fail)
        try:
            run_probe(engine, engine.config, build_plan(engine.config), world)
        except UserError as error:
            return f"UserError: {error}"
        except RuntimeError as error:
            return f"RuntimeError: {error}"
    return "fits"


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate 2.00 GiB", "can't allocate memory: 7 bytes"]
)
def test_out_of_memory_on_one_process_is_told_by_all(message: str) -> None:
    config = engine_settings(zero_stage=1, curriculum=STAGES)
    first, second = values(run_ranks(run_out_of_memory, 2, config=config, victim=1, message=message))
    assert first == second
    assert first.startswith("UserError: stage 1 of the curriculum does not fit into memory: 1 rows of 64 tokens")
    assert message in first


def test_where_processes_wait_for_each_other_the_one_that_ran_out_tells_and_no_other_hangs() -> None:
    config = engine_settings(zero_stage=3, curriculum=STAGES)
    ended = run_ranks(run_out_of_memory, 2, config=config, victim=0, message="CUDA out of memory.", timeout=60)
    assert ended[0].value.startswith("UserError: stage 1 of the curriculum does not fit")
    assert ended[1].code != -9  # not by the time limit of the test


def test_other_errors_stay_what_they_are() -> None:
    (told,) = values(run_ranks(run_out_of_memory, 1, config=engine_settings(), victim=0, message="shapes differ"))
    assert told == "RuntimeError: shapes differ"


def run_config(*stages: tuple[int, int, int], **changes: Any) -> Any:
    keys = ("until_tokens", "seq_len", "micro_batch")
    curriculum = [dict(zip(keys, stage, strict=True)) for stage in stages]
    return parse_config(engine_settings(curriculum=curriculum, **changes))


@pytest.mark.parametrize(
    ("stages", "world_size", "tokens", "expected"),
    [
        ([(1024, 32, 4), (2048, 64, 1)], 1, 0, {1: (1, 64), 0: (4, 32)}),
        ([(1024, 32, 4), (2048, 64, 2)], 1, 0, {1: (2, 64)}),  # as many tokens: the longest stands for both
        ([(1024, 32, 4), (2048, 64, 1)], 4, 0, {1: (1, 64)}),  # a process has 2 rows of 32
        ([(1024, 32, 4), (2048, 64, 1), (4096, 32, 2)], 1, 2048, {2: (2, 32)}),  # what is over is not rehearsed
        ([(1024, 64, 1), (2048, 64, 4)], 1, 0, {1: (4, 64)}),
    ],
)
def test_shapes(stages: list[Any], world_size: int, tokens: int, expected: dict[int, tuple[int, int]]) -> None:
    config = run_config(*stages)
    assert _demanding_stages(config, build_plan(config), world_size, tokens) == expected


@pytest.mark.parametrize(
    ("changes", "remedies"),
    [
        ({"zero_stage": 0}, "a smaller curriculum.0.micro_batch, activation_checkpointing: true, zero_stage 1 or more, "
            "a smaller model"),
        ({"zero_stage": 2, "activation_checkpointing": True}, "a smaller curriculum.0.micro_batch, zero_stage 3, "
            "offload_optimizer: true, more processes"),
        ({"zero_stage": 3, "offload_optimizer": True}, "a smaller curriculum.0.micro_batch, "
            "activation_checkpointing: true, more processes"),
    ],
)  # fmt: skip
def test_remedies_are_those_not_yet_taken(changes: dict[str, Any], remedies: str) -> None:
    config = run_config((1024, 32, 4), **changes)
    told = _advice(config, 0, 4, 32, RuntimeError("no\nroom"))
    assert told.endswith(f"(curriculum.0.micro_batch 4). Use {remedies}. (no)")


def test_sentence() -> None:
    assert ProbeResult(((4, 8192),), 5.12, 1.23).sentence() == (
        "The longest rows (4 x 8192) fit: 5.1 GiB a process at the peak, 1.2 s."
    )
    assert re.search(r"\(4 x 8192 and 64 x 512\)", ProbeResult(((4, 8192), (64, 512)), 1.0, 1.0).sentence())
