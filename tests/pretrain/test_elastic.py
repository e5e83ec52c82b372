"""A run that resumes with other processes and another ZeRO stage, against one that nobody interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks, values
from training_case import metrics, settings, write_config

from data_pipeline.errors import run_cli

STOP_AT = 3  # of 8 steps; the curriculum's edge is after 4
# Sums in another order over 8 steps of AdamW, of float32 and where weights and activations are rounded to bfloat16:
# relative for loss and gradient norm, absolute for the weights. Largest measured: 1.1e-7, 2.1e-7, 1.8e-7 in float32;
# 1.6e-5, 8.6e-4, 1.3e-4 in bfloat16 (a weight between two of its values may be rounded either way).
TOLERANCE = {"fp32": (1e-6, 2e-6, 2e-6), "bf16": (2e-4, 1e-2, 2e-3)}


def train(config: str, stop_after: int | None = None) -> int:
    """Runs in the ranks: the command itself, asked to stop after some steps."""
    import os
    import signal

    from pretrain.cli import main
    from pretrain.engine.training import TrainingEngine

    count = {"steps": 0}
    take_step = TrainingEngine.step

    def counting_step(self: Any, lr: float) -> Any:
        count["steps"] += 1
        if count["steps"] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, lr)

    TrainingEngine.step = counting_step  # type: ignore[method-assign]
    return run_cli(main, "nystrom train", ["--config", config])


def consolidated(folder: str) -> tuple[list[str], str]:
    """Runs in a rank: names of the second moments in a checkpoint, and what is said of a state that it has not."""
    from data_pipeline.errors import UserError
    from pretrain.checkpoint.load import consolidate

    moments = consolidate(Path(folder), "exp_avg_sq")
    assert {name: value.shape for name, value in moments.items()} == {
        name: value.shape for name, value in consolidate(Path(folder)).items()
    }
    assert all((value >= 0).all() and value.any() for value in moments.values())
    with pytest.raises(UserError) as refusal:
        consolidate(Path(folder), "ema")
    return sorted(moments), str(refusal.value)


def exported(run: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(run / "export" / "model.safetensors")


def go_on(corpus: Path, tmp_path: Path, parts: list[tuple[int, int]], precision: str, **changes: Any) -> list[str]:
    """Runs 8 steps at once and in parts, each with (processes, stage) of its own; compares; returns the outputs."""
    common = {"precision": precision, "optimizer": {"weight_decay": 0.5}, **changes}
    if precision == "bf16":  # smaller weights, smaller errors of rounding them
        common["model"] = {"init_std": 0.02, **changes.get("model", {})}
    whole = settings(corpus, tmp_path, name="whole", zero_stage=parts[0][1], **common)
    processes = parts[0][0]
    assert values(run_ranks(train, processes, config=write_config(tmp_path / "whole.yaml", whole))) == [0] * processes
    outputs = []
    for i, (processes, stage) in enumerate(parts):
        path = write_config(
            tmp_path / "parts.yaml", settings(corpus, tmp_path, name="parts", zero_stage=stage, **common)
        )
        last = i == len(parts) - 1
        ended = run_ranks(train, processes, config=path, stop_after=None if last else STOP_AT if i == 0 else 2)
        assert values(ended) == [0 if last else 75] * processes, ended[0].output
        outputs.append(ended[0].output)
    expected, got = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [row["step"] for row in got] == list(range(1, 9))
    loss, norm, weight = TOLERANCE[precision]
    for key, tolerance in (("loss", loss), ("grad_norm", norm)):
        a, b = ([row[key] for row in rows] for rows in (got, expected))
        np.testing.assert_allclose(a, b, rtol=tolerance, err_msg=key)
    for name, value in exported(tmp_path / "whole").items():
        np.testing.assert_allclose(exported(tmp_path / "parts")[name], value, atol=weight, rtol=0, err_msg=name)
    return outputs


def test_fewer_processes(corpus: Path, tmp_path: Path) -> None:
    outputs = go_on(corpus, tmp_path, [(2, 2), (1, 2)], "bf16", model={"objective": "clm"})
    assert "changed since: processes from 2 to 1" in outputs[1]
    assert "cut anew" in outputs[1]
    assert "new stream of random numbers" in outputs[1]
    folder = tmp_path / "parts" / "checkpoints" / f"step{STOP_AT:09d}"  # of two processes
    ((names, refusal),) = values(run_ranks(consolidated, 1, folder=str(folder)))
    assert names == sorted(exported(tmp_path / "parts"))
    assert f"checkpoint {folder} has no 'ema' of " in refusal
    assert "there are fp32, exp_avg, exp_avg_sq" in refusal


def test_more_processes_and_another_stage(corpus: Path, tmp_path: Path) -> None:
    outputs = go_on(corpus, tmp_path, [(1, 0), (2, 3)], "fp32")
    assert "changed since: processes from 1 to 2" in outputs[1]
    assert "changed since: zero_stage from 0 to 3" in outputs[1]


def test_another_stage_on_the_same_processes_draws_on(corpus: Path, tmp_path: Path) -> None:
    """With dropout: the generators continue where they were."""
    outputs = go_on(corpus, tmp_path, [(2, 3), (2, 1)], "fp32", model={"dropout": 0.2})
    assert "cut anew" in outputs[1]
    assert "new stream" not in outputs[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "precision", "objective"),
    [
        ([(4, 1), (2, 2)], "bf16", "mlm"),
        ([(2, 3), (4, 2)], "bf16", "clm"),
        ([(1, 0), (2, 3), (4, 1)], "fp32", "mlm"),
        ([(4, 3), (2, 0), (1, 2)], "fp32", "clm"),
    ],
)
def test_again_and_again(
    corpus: Path, tmp_path: Path, parts: list[tuple[int, int]], precision: str, objective: str
) -> None:
    go_on(corpus, tmp_path, parts, precision, model={"objective": objective})


def test_new_streams_are_decided_by_seed_position_and_rank() -> None:
    from pretrain.distributed.randomness import derived_seed

    seeds = [derived_seed(*numbers) for numbers in [(3, 768, 0), (3, 768, 1), (3, 1024, 0), (4, 768, 0)]]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(3, 768, 0) == seeds[0]
