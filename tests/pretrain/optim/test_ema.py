"""The running average of the weights: its values, its place in checkpoints, its export."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import KINDS, keep_rounding_small, optimizer_settings, plain_loop, train
from ranks import run_ranks, values
from test_run import train as train_as_is
from test_run import train_until
from test_training import train_with_a_bad_step
from training_case import settings, weights_hash, write_config

from pretrain.checkpoint.load import load_model
from pretrain.config import OptimizerConfig
from pretrain.model import build_model
from pretrain.model.config import ModelConfig
from pretrain.optim.optimizer import build_optimizer

DECAY = 0.6
TOLERANCE = 4e-6
"""Absolute; measured: at most 4e-7, on AVX-512, AVX2 and none, and with sums in other orders (MKL_CBWR=COMPATIBLE)."""


def averages(run: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(run / "export-ema" / "model.safetensors")


def average_hash(run: Path) -> str:
    return json.loads((run / "export-ema" / "export.json").read_text())["weights_hash"]


@pytest.mark.parametrize("kind", KINDS)
def test_follows_the_weights_step_by_step(kind: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(vocab_size=20, hidden_size=8, num_layers=1, num_heads=2))
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind, lr=0.1, ema_decay=0.9))
    parameters = list(model.parameters())
    expected = [p.detach().double() for p in parameters]
    for step in range(6):
        for p in parameters:
            p.grad = None if step == 2 else torch.randn_like(p)  # a skipped step
        optimizer.step()
        if step != 2:
            expected = [0.9 * a + 0.1 * p.detach().double() for a, p in zip(expected, parameters, strict=True)]
    for p, a in zip(parameters, expected, strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"].double(), a, rtol=1e-6, atol=1e-7)


def test_the_optimizer_takes_the_same_steps_with_an_average() -> None:
    for kind in KINDS:
        weights = []
        for decay in (None, 0.9):
            torch.manual_seed(0)
            model = build_model(ModelConfig(vocab_size=20, hidden_size=8, num_layers=1, num_heads=2))
            optimizer = build_optimizer(model, OptimizerConfig(kind=kind, ema_decay=decay))
            for _ in range(3):
                for p in model.parameters():
                    p.grad = torch.randn_like(p)
                optimizer.step()
            weights.append([p.detach() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


FAST = [("adamw", 0, 2), ("lion", 1, 2), ("adamw", 2, 1), ("muon", 3, 2)]
REST = [case for case in itertools.product(KINDS, (0, 1, 2, 3), (2,)) if case not in FAST]


@pytest.mark.parametrize(
    ("kind", "zero_stage", "world_size"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_equals_a_plain_average_over_the_run(
    corpus: Path, tmp_path: Path, kind: str, zero_stage: int, world_size: int
) -> None:
    case = settings(
        corpus, tmp_path, zero_stage=zero_stage, optimizer=optimizer_settings(kind, ema_decay=DECAY, grad_clip=5.0)
    )
    config = write_config(tmp_path / "run.yaml", case)
    (expected,) = values(run_ranks(plain_loop, 1, config=config))
    assert values(run_ranks(train, world_size, config=config)) == [0] * world_size
    for name, value in averages(tmp_path / "run").items():
        np.testing.assert_allclose(value, expected["average"][name], atol=TOLERANCE, err_msg=name)
    moved = [np.abs(expected["average"][name] - last).max() for name, last in expected["weights"].items()]
    assert max(moved) > 1e-3  # so that the last weights are not taken for their average
    loaded = load_model(tmp_path / "run" / "export-ema")
    assert (loaded.weights_hash, loaded.tokens) == (average_hash(tmp_path / "run"), 2048)
    assert load_model(tmp_path / "run").weights_hash == weights_hash(tmp_path / "run") != loaded.weights_hash


@pytest.mark.parametrize("zero_stage", [0, 2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 3))])
def test_a_skipped_step_does_not_move_it(corpus: Path, tmp_path: Path, zero_stage: int) -> None:
    optimizer = optimizer_settings("adamw", ema_decay=DECAY)
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, zero_stage=zero_stage, optimizer=optimizer))
    (expected,) = values(run_ranks(plain_loop, 1, config=config, skip=[1]))
    assert values(run_ranks(train_with_a_bad_step, 2, config=config, step=1, kind="gradient")) == [0, 0]
    for name, value in averages(tmp_path / "run").items():
        np.testing.assert_allclose(value, expected["average"][name], atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "zero_stage", "precision"),
    [
        ("lion", 0, "fp32"),
        pytest.param("muon", 3, "bf16", marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("adamw", 2, "bf16"), ("muon", 1, "bf16"), ("lion", 3, "bf16")]
        ),
    ],
)
def test_a_resume_leaves_weights_and_average_equal_to_the_bit(
    corpus: Path, tmp_path: Path, kind: str, zero_stage: int, precision: str
) -> None:
    common = {"zero_stage": zero_stage, "precision": precision, "model": {"dropout": 0.2}}
    common["optimizer"] = optimizer_settings(kind, ema_decay=DECAY)
    whole = write_config(tmp_path / "whole.yaml", settings(corpus, tmp_path, name="whole", **common))
    parts = write_config(tmp_path / "parts.yaml", settings(corpus, tmp_path, name="parts", **common))
    assert values(run_ranks(train_as_is, 2, config=whole)) == [0, 0]
    assert values(run_ranks(train_until, 2, config=parts, step=3, how="step")) == [75, 75]
    assert not (tmp_path / "parts" / "export-ema").exists()
    assert values(run_ranks(train_as_is, 2, config=parts)) == [0, 0]
    assert weights_hash(tmp_path / "parts") == weights_hash(tmp_path / "whole")
    assert average_hash(tmp_path / "parts") == average_hash(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lion", "muon"])
def test_other_processes_and_another_stage_take_it_over(corpus: Path, tmp_path: Path, kind: str) -> None:
    optimizer = optimizer_settings(kind, ema_decay=DECAY)
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, zero_stage=1, optimizer=optimizer))
    (expected,) = values(run_ranks(plain_loop, 1, config=config))
    for world_size, zero_stage, step in ((2, 1, 3), (1, 3, 2)):
        write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, zero_stage=zero_stage, optimizer=optimizer))
        assert values(run_ranks(stop_early, world_size, config=config, step=step)) == [75] * world_size
    write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, zero_stage=2, optimizer=optimizer))
    assert values(run_ranks(train, 4, config=config)) == [0] * 4
    for name, value in averages(tmp_path / "run").items():
        np.testing.assert_allclose(value, expected["average"][name], atol=TOLERANCE, err_msg=name)


def stop_early(config: str, step: int) -> int:
    """Runs in the ranks: :func:`train_until`, with the optimizers of :func:`train`."""
    keep_rounding_small()
    return train_until(config, step, "step")


@pytest.mark.slow
def test_an_average_may_begin_and_end_at_a_resume(corpus: Path, tmp_path: Path) -> None:
    """It starts from the weights of that step; one that ended leaves the checkpoints."""
    until = {"zero_stage": 2, "name": "run"}
    config = tmp_path / "run.yaml"

    def start(how: str | None, step: int = 0, **optimizer: Any) -> None:
        write_config(config, settings(corpus, tmp_path, **until, optimizer=optimizer_settings("adamw", **optimizer)))
        if how is None:
            assert values(run_ranks(train_as_is, 2, config=str(config))) == [0, 0]
        else:
            assert values(run_ranks(train_until, 2, config=str(config), step=step, how=how)) == [75, 75]

    start("step", 3)
    before = load_model(tmp_path / "run").model.state_dict()
    start("step", 1, ema_decay=0.75)
    (newest,) = sorted((tmp_path / "run" / "checkpoints").glob("step*4"))
    after = load_model(newest).model.state_dict()
    start("step", 1, ema_decay=0.5)
    after_2 = load_model(tmp_path / "run").model.state_dict()
    start(None, ema_decay=1 - 1e-9)  # stands still from here on
    for name, value in averages(tmp_path / "run").items():
        expected = 0.5 * (0.75 * before[name] + 0.25 * after[name]) + 0.5 * after_2[name]
        np.testing.assert_allclose(value, expected.numpy(), atol=1e-6, err_msg=name)

    finished = average_hash(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export-ema")  # a kill between the two exports
    start(None, ema_decay=1 - 1e-9)
    assert average_hash(tmp_path / "run") == finished


def test_an_average_that_is_kept_no_more_does_not_lie_beside_the_export(tmp_path: Path) -> None:
    from pretrain.finish import _set_stale_average_aside

    info = {"weights_hash": "a", "tokens": 10, "step": 7}
    (tmp_path / "export-ema").mkdir()
    (tmp_path / "export-ema" / "export.json").write_text(json.dumps(info))
    assert _set_stale_average_aside(tmp_path, ["export", "export-ema"]) is None
    said = _set_stale_average_aside(tmp_path, ["export"])
    assert said is not None
    assert said.endswith(f"the one of step 7 is now {tmp_path / 'export-ema.step000000007'}.")
    assert [path.name for path in tmp_path.iterdir()] == ["export-ema.step000000007"]
    assert _set_stale_average_aside(tmp_path, ["export"]) is None
