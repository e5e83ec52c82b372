"""What a run tells about its steps, none of which changes a number: spikes, slow processes, traces, its folder."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks, values
from training_case import metrics, numbers, settings, write_config

from data_pipeline.errors import run_cli

ONE_STAGE = [{"until_tokens": 4096, "seq_len": 32, "micro_batch": 3}]  # 16 steps


def train(config: str) -> int:
    """Runs in the ranks: the command itself."""
    from pretrain.cli import main

    return run_cli(main, "nystrom train", ["--config", config])


def train_with_spikes(config: str, first: int, spikes: list[int], end_at: int | None = None, how: str = "TERM") -> int:
    """Runs in the ranks: losses of these steps are reported twice as high; rank 1 gets a signal in step ``end_at``."""
    import os
    import signal

    from pretrain.engine.training import TrainingEngine

    counter = {"step": first}
    backward, take_step = TrainingEngine.backward, TrainingEngine.step

    def high(self: Any, *args: Any) -> Any:
        loss = backward(self, *args)
        return loss * 2 if counter["step"] in spikes else loss

    def counting_step(self: Any, lr: float) -> Any:
        if counter["step"] == end_at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.Signals["SIG" + how])
        counter["step"] += 1
        return take_step(self, lr)

    TrainingEngine.backward, TrainingEngine.step = high, counting_step  # type: ignore[method-assign]
    return train(config)


def spiky(corpus: Path, runs: Path, name: str, **changes: Any) -> str:
    telemetry = {"log_every_steps": 3, "spike_window": 4, **changes.pop("telemetry", {})}
    changes = {"curriculum": ONE_STAGE, "zero_stage": 2, "telemetry": telemetry, "name": name, **changes}
    return write_config(runs / f"{name}.yaml", settings(corpus, runs, **changes))


def spikes_of(run: Path) -> list[dict[str, Any]]:
    rows = [row for row in metrics(run, "event") if row["event"] == "spike"]
    return [{key: row[key] for key in ("step", "tokens", "loss", "expected", "limit", "saved")} for row in rows]


SPIKES = [8, 9, 15]


def test_a_spike_between_logged_steps_is_seen(corpus: Path, tmp_path: Path) -> None:
    import numpy as np

    each = spiky(corpus, tmp_path, "each", telemetry={"log_every_steps": 1})
    assert values(run_ranks(train_with_spikes, 2, config=each, first=1, spikes=SPIKES)) == [0, 0]
    third = spiky(corpus, tmp_path, "third")
    ended = run_ranks(train_with_spikes, 2, config=third, first=1, spikes=SPIKES)
    assert values(ended) == [0, 0]
    losses = [row["loss"] for row in metrics(tmp_path / "each")]
    first, second = spikes_of(tmp_path / "third")
    assert (first["step"], first["tokens"], second["step"], second["tokens"]) == (8, 2048, 15, 3840)
    assert first["loss"] == losses[7]
    assert first["expected"] == np.median(losses[5:7])
    assert f"step 8: the loss jumped to {losses[7]:.4f}" in ended[0].output
    assert first["saved"] == "spikes/step000000008"
    names = sorted(path.name for path in (tmp_path / "third" / first["saved"]).iterdir())
    assert names == ["rank_00000.safetensors", "rank_00001.safetensors", "step.json"]
    assert spikes_of(tmp_path / "each") == [first, second]
    assert [row["step"] for row in metrics(tmp_path / "third")] == [3, 6, 9, 12, 15, 16]
    assert [row["loss"] for row in metrics(tmp_path / "third")] == [losses[step - 1] for step in (3, 6, 9, 12, 15, 16)]


@pytest.mark.slow
def test_spikes_are_the_same_through_interruptions(corpus: Path, tmp_path: Path) -> None:
    whole = spiky(corpus, tmp_path, "whole")
    assert values(run_ranks(train_with_spikes, 2, config=whole, first=1, spikes=SPIKES)) == [0, 0]
    parts = spiky(corpus, tmp_path, "parts", checkpoint={"every_tokens": 2048})
    # Lost within the first spike, after the checkpoint of its first step: the second step of it is not told as another.
    assert run_ranks(train_with_spikes, 2, config=parts, first=1, spikes=SPIKES, end_at=9, how="KILL")[1].code == -9
    # Stopped right before the second: only who has not forgotten what was normal can see that.
    again = run_ranks(train_with_spikes, 2, config=parts, first=9, spikes=SPIKES, end_at=14)
    assert values(again) == [75, 75]
    assert "Resumes from" in again[0].output
    assert [spike["step"] for spike in spikes_of(tmp_path / "parts")] == [8]
    assert values(run_ranks(train_with_spikes, 2, config=parts, first=15, spikes=SPIKES)) == [0, 0]
    assert spikes_of(tmp_path / "parts") == spikes_of(tmp_path / "whole")
    assert [spike["step"] for spike in spikes_of(tmp_path / "parts")] == [8, 15]


def train_slowly(config: str, slow: int) -> int:
    """Runs in the ranks: one takes 20 ms longer for each forward pass."""
    import os
    import time

    from pretrain.model.layers import Embeddings

    forward = Embeddings.forward

    def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == str(slow):
            time.sleep(0.02)
        return forward(self, *args, **kwargs)

    Embeddings.forward = wait  # type: ignore[method-assign]
    return train(config)


@pytest.mark.parametrize(
    "zero_stage", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)]
)
def test_the_slowest_process_is_named(corpus: Path, tmp_path: Path, zero_stage: int) -> None:
    telemetry = {"log_every_steps": 4}
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, zero_stage=zero_stage, telemetry=telemetry))
    assert values(run_ranks(train_slowly, 2, config=config, slow=1)) == [0, 0]
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2
    for row, micro_batches in zip(rows, (2, 1), strict=True):  # of 4 rows by 3, of 2 by 2
        assert row["slowest_rank"] == 1
        assert row["own_seconds_max"] > 0.02 * micro_batches
        assert row["own_seconds_max"] - row["own_seconds_min"] > 0.015 * micro_batches
        assert row["own_seconds_mean"] == pytest.approx((row["own_seconds_min"] + row["own_seconds_max"]) / 2)
        assert row["step_seconds"] >= row["own_seconds_max"]
        assert row["tokens_per_second"] == pytest.approx(256 / row["step_seconds"])


@pytest.mark.slow
def test_a_trace_of_the_steps_asked_for(corpus: Path, tmp_path: Path) -> None:
    plain = write_config(tmp_path / "plain.yaml", settings(corpus, tmp_path, name="plain", zero_stage=2))
    assert values(run_ranks(train, 2, config=plain)) == [0, 0]
    telemetry = {"profile_step": 3, "profile_steps": 2}
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, zero_stage=2, telemetry=telemetry))
    ended = run_ranks(train, 2, config=config)
    assert values(ended) == [0, 0]
    run = tmp_path / "run"
    assert numbers(run) == numbers(tmp_path / "plain")
    trace = run / "profile" / "steps000000003-000000004.trace.json.gz"
    assert f"traced steps 3 to 4: {trace}" in ended[0].output
    table = trace.with_name("steps000000003-000000004.txt")
    assert set(trace.parent.iterdir()) == {trace, table}
    with gzip.open(trace) as stream:
        operators = [event["name"] for event in json.load(stream)["traceEvents"] if event.get("cat") == "cpu_op"]
    # 2 steps of 2 micro-batches on this process; the gradient is of every embedding looked up.
    assert operators.count("aten::embedding_dense_backward") == 4
    assert "Self CPU" in table.read_text()
    assert "aten::" in table.read_text()


@pytest.mark.slow
def test_a_trace_that_the_run_is_too_short_for_is_written_at_its_end(corpus: Path, tmp_path: Path) -> None:
    telemetry = {"profile_step": 8, "profile_steps": 5}
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, telemetry=telemetry))
    (end,) = run_ranks(train, 1, config=config)
    assert (end.code, end.value) == (0, 0)
    assert "traced steps 8 to 8" in end.output


def test_the_run_folder_has_a_line_for_every_start(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path))
    stopped = run_ranks(train_with_spikes, 2, config=config, first=1, spikes=[], end_at=3)
    assert values(stopped) == [75, 75]
    assert values(run_ranks(train, 2, config=config)) == [0, 0]
    run = tmp_path / "run"
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["tokens"], start["world_size"]) for start in starts] == [(0, 0, 2), (3, 768, 2)]
    last = json.loads((run / "environment.json").read_text())
    assert last == {key: value for key, value in starts[1].items() if key not in ("time", "step", "tokens")}
    assert last["code"] is None or len(last["code"]["commit"]) == 40
    readme = (run / "README.txt").read_text()
    for path in run.iterdir():
        assert path.name == "README.txt" or path.name in readme
