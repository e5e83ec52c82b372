"""Sums of gradients in float32, over micro-batches and over processes, and float16 with its loss scale."""

from __future__ import annotations

from typing import Any

import pytest
from engine_case import build, draw, engine_settings, first_gradients, one_world, share
from ranks import run_ranks, values

MICROS = 32


def accumulate(config: dict[str, Any], micros: int) -> tuple[float, str]:
    """Runs in the ranks: relative error of a step's gradient against the float32 sum of the same gradients."""
    import numpy as np
    import torch

    from pretrain.model import build_model

    with one_world() as world:
        engine = build(config, world)
        stage = engine.config.curriculum[0]
        batch = [draw(i, stage.micro_batch, stage.seq_len) for i in range(micros)]
        scale = 1.0 / sum(float((labels >= 0).sum()) for _, labels, _ in batch)
        for i in share(engine, micros):
            engine.backward(batch[i][0], batch[i][1], scale)
        engine.step(0.01)
        got = first_gradients(engine)
        kind = type(engine._engine.optimizer).__name__

        torch.manual_seed(engine.config.seed)
        model = build_model(engine.config.model).bfloat16()
        sums = {name: np.zeros(p.shape, dtype=np.float32) for name, p in model.named_parameters()}
        for ids, labels, _ in batch:
            model.zero_grad()
            (model(ids, labels=labels).loss_sum * scale).backward()
            for name, p in model.named_parameters():
                sums[name] += p.grad.float().numpy()
    error = sum(float(((got[name] - sums[name]) ** 2).sum()) for name in sums) ** 0.5
    return error / sum(float((sums[name].astype(float) ** 2).sum()) for name in sums) ** 0.5, kind


def accumulation(zero_stage: int, **block: Any) -> list[float]:
    """Of each process, the error of :func:`accumulate` for a ``deepspeed:`` block."""
    settings: dict[str, Any] = {"zero_stage": zero_stage, "precision": "bf16", "optimizer": {"grad_clip": 0.0}}
    settings["curriculum"] = [{"until_tokens": 4096, "seq_len": 32, "micro_batch": 1}]
    config = engine_settings(**settings)
    config["deepspeed"] = {**config.get("deepspeed", {}), **block}
    ended = values(run_ranks(accumulate, 2, config=config, micros=MICROS))
    assert all("ZeroOptimizer" in kind for _, kind in ended)  # also at stage 1: the one with readable checkpoints
    return [error for error, _ in ended]


@pytest.mark.parametrize("zero_stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_gradients_of_many_micro_batches_and_processes_add_up_in_float32(zero_stage: int) -> None:
    assert max(accumulation(zero_stage)) < 1e-6


@pytest.mark.parametrize(
    "zero_stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_sums_in_bfloat16_would_be_measurably_worse(zero_stage: int) -> None:
    """So that the test above could fail: what the default is better than, and what the keys still allow."""
    assert min(accumulation(zero_stage, data_types={"grad_accum_dtype": "bf16"})) > 2e-3
    assert min(accumulation(zero_stage, communication_data_type="bf16")) > 3e-4
