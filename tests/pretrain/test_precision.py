"""Sums of gradients in float32, over micro-batches and over processes, and float16 with its loss scale."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from engine_case import (
    build,
    draw,
    engine_settings,
    first_gradients,
    one_world,
    share,
    train_steps,
    whole_and_resumed,
)
from ranks import run_ranks, values
from training_case import events, metrics, settings, write_config, write_corpus

from data_pipeline.errors import run_cli

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
@pytest.mark.slow
def test_sums_in_bfloat16_would_be_measurably_worse(zero_stage: int) -> None:
    """So that the test above could fail: what the default is better than, and what the keys still allow."""
    assert min(accumulation(zero_stage, data_types={"grad_accum_dtype": "bf16"})) > 2e-3
    assert min(accumulation(zero_stage, communication_data_type="bf16")) > 3e-4


def pretend_that_float16_works() -> None:
    """Runs in the ranks: a CPU computes float16 too, slowly; DeepSpeed and ``check_device`` refuse it for that."""
    from deepspeed.accelerator import get_accelerator

    from pretrain.engine import training

    get_accelerator().is_fp16_supported = lambda: True
    training.check_device = lambda *args: None  # type: ignore[assignment]


def float16_steps(configs: list[dict[str, Any]], steps: int) -> list[Any]:
    """Runs in the ranks: what each configuration's steps come to."""
    pretend_that_float16_works()
    out = []
    with one_world() as world:
        for config in configs:
            engine = build(config, world)
            out.append(train_steps(engine, 0, steps))
    return out


def scaled(zero_stage: int, power: int, window: int = 2, **changes: Any) -> dict[str, Any]:
    """float16 that starts at a loss scale of 2^power, halves it at each overflow, doubles it after ``window`` steps."""
    config = engine_settings(zero_stage=zero_stage, precision="fp16", **changes)
    scale = {"initial_scale_power": power, "loss_scale_window": window, "hysteresis": 1}
    return {**config, "deepspeed": {**config.get("deepspeed", {}), "fp16": scale}}


@pytest.mark.parametrize(
    ("zero_stage", "offload"),
    [
        (1, True),
        (2, False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, False), (2, True), (3, False), (3, True)]),
    ],
)
def test_the_loss_scale_is_found_and_lost_and_found_again(zero_stage: int, offload: bool) -> None:
    import numpy as np

    high, low = (scaled(zero_stage, power, offload_optimizer=offload) for power in (22, 14))
    steady = scaled(zero_stage, 14, window=1000, offload_optimizer=offload)
    exact = {**engine_settings(zero_stage=zero_stage), "offload_optimizer": offload}
    configs = [high, low, steady, exact]
    for searched, growing, constant, expected in values(run_ranks(float16_steps, 2, configs=configs, steps=8)):
        applied = [norm != float("inf") for norm in searched["norms"]]
        scales = [2.0**22, *searched["scales"]]
        first = applied.index(True)
        assert 2 <= first <= 6
        assert scales[: first + 1] == [2.0 ** (22 - i) for i in range(first + 1)]  # halved at each overflow
        assert len(set(searched["losses"][: first + 1])) == first + 1  # each on its own batch
        assert any(after == 2 * before for before, after in itertools.pairwise(scales))  # grows again
        assert growing["scales"][-1] > 2.0**16
        assert constant["scales"] == [2.0**14] * 8
        np.testing.assert_allclose(growing["norms"], constant["norms"], rtol=1e-4)  # growing changes no step
        np.testing.assert_allclose(growing["losses"], constant["losses"], rtol=1e-5)
        np.testing.assert_allclose(growing["losses"], expected["losses"], rtol=5e-4)  # measured: 2.2e-5
        np.testing.assert_allclose(growing["norms"], expected["norms"], rtol=5e-3)  # measured: 3e-4


def float16_resumes(config: dict[str, Any], folder: str) -> tuple[Any, Any, Any]:
    """Runs in the ranks: see :func:`engine_case.whole_and_resumed`."""
    pretend_that_float16_works()
    with one_world() as world:
        return whole_and_resumed(config, world, Path(folder))


@pytest.mark.parametrize("zero_stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 3))])
def test_a_resumed_float16_run_goes_on_with_its_loss_scale(tmp_path: Path, zero_stage: int) -> None:
    config = scaled(zero_stage, 19, model={"dropout": 0.2})
    for whole, resumed, exported in values(run_ranks(float16_resumes, 2, config=config, folder=str(tmp_path))):
        assert whole == resumed
        assert whole["scales"][0] not in (2.0**19, 2.0**18)  # neither the start nor what one more step would make of it
        assert all(exported.values())


def train_float16(config: str) -> int:
    """Runs in the ranks: the command itself."""
    from pretrain.cli import main

    pretend_that_float16_works()
    return run_cli(main, "nystrom train", ["--config", config])


def test_a_search_for_the_loss_scale_is_no_bad_step_but_overflows_at_the_smallest_scale_are(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    scale = {"fp16": {"initial_scale_power": 22, "hysteresis": 1}}
    changes: dict[str, Any] = {"zero_stage": 2, "precision": "fp16", "max_bad_steps": 1, "deepspeed": scale}
    config = write_config(tmp_path / "run.yaml", settings(tmp_path, tmp_path, **changes))
    assert values(run_ranks(train_float16, 2, config=config)) == [0, 0]
    norms = [row["grad_norm"] for row in metrics(tmp_path / "run")]
    assert norms[0] in (None, float("inf"))
    assert norms[-1] < 100
    assert "bad_step" not in events(tmp_path / "run")
    # An optimizer whose steps throw the weights out of float16's range: no scale helps, and the run must stop.
    changes.update(name="lost", max_bad_steps=2, optimizer={"lr": 3e5}, schedule={"kind": "constant"})
    changes["deepspeed"] = {"fp16": {"initial_scale_power": 0, "hysteresis": 1}}
    config = write_config(tmp_path / "lost.yaml", settings(tmp_path, tmp_path, **changes))
    ended = run_ranks(train_float16, 2, config=config)
    assert values(ended) == [76, 76]
    assert "Traceback" not in ended[0].output
