"""Trackers: what reaches them, across a resume too, and that none of them can end a run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_telemetry import config, lines

from data_pipeline.errors import UserError
from pretrain.config import RunConfig, TelemetryConfig
from pretrain.telemetry import trackers
from pretrain.telemetry.telemetry import Telemetry, truncate_metrics


def with_tensorboard() -> RunConfig:
    run = config()
    return run.model_copy(update={"telemetry": run.telemetry.model_copy(update={"tensorboard": True})})


class Writer:
    """Stands in for torch's SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: list[tuple[str, str, int]] = []
        self.closed = 0

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_text(self, name: str, text: str, step: int) -> None:
        self.texts.append((name, text, step))

    def close(self) -> None:
        self.closed += 1


def test_tensorboard_gets_numbers_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, opened = Writer(), []
    monkeypatch.setattr(trackers, "_summary_writer", lambda folder, step: opened.append((folder, step)) or writer)
    telemetry = Telemetry(tmp_path, with_tensorboard(), 1000, 64, active=True, step=4)
    telemetry.write("event", step=5, event="stage", seq_len=16)
    telemetry.write("train", step=5, loss=1.5, grad_norm=float("inf"), lr=0.1)
    telemetry.write("valid", step=5, loss=1.25)
    telemetry.samples(5, ["once", "upon"])
    telemetry.close()
    assert opened == [(tmp_path / "tensorboard", 4)]
    assert writer.scalars == [("train/loss", 1.5, 5), ("train/lr", 0.1, 5), ("valid/loss", 1.25, 5)]
    assert writer.texts == [("samples/0", "once", 5), ("samples/1", "upon", 5)]
    assert writer.closed == 1
    Telemetry(tmp_path, with_tensorboard(), 1000, 0, active=False).samples(1, ["x"])
    assert len(opened) == 1


@pytest.mark.parametrize("at", ["add_scalar", "add_text", "close"])
def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: str
) -> None:
    class Other:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def numbers(self, kind: str, step: int, values: dict[str, float]) -> None:
            self.seen.append(kind)

        def texts(self, step: int, texts: Sequence[str]) -> None:
            self.seen.append("texts")

        def close(self) -> None:
            self.seen.append("close")

    def fail(*_: Any) -> None:
        raise OSError("no space left\nand more")

    writer, other = Writer(), Other()
    setattr(writer, at, fail)
    monkeypatch.setattr(trackers, "_summary_writer", lambda folder, step: writer)
    monkeypatch.setattr(trackers, "Wandb", lambda run_dir, config, mode: other)
    run = with_tensorboard()
    run = run.model_copy(update={"telemetry": run.telemetry.model_copy(update={"wandb": "offline"})})
    telemetry = Telemetry(tmp_path, run, 1000, 0, active=True)
    for step in (1, 2):
        telemetry.write("train", step=step, loss=1.5)
    telemetry.samples(2, ["x"])
    telemetry.close()
    out = capsys.readouterr().out
    assert out.count("tensorboard is left out: OSError: no space left (metrics.jsonl has everything)") == 1
    assert other.seen == ["train", "train", "texts", "close"]
    assert len(lines(tmp_path / "metrics.jsonl")) == 2


def test_online_without_an_answer_becomes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = []

    def build(run_dir: Path, config: RunConfig, mode: str) -> Any:
        modes.append(mode)
        if mode == "online":
            raise TimeoutError("nobody answers")
        return trackers.TensorBoard(Writer())

    monkeypatch.setattr(trackers, "Wandb", build)
    trackers.Trackers(tmp_path, config("online"))
    assert modes == ["online", "offline"]
    assert "wandb online is left out: TimeoutError: nobody answers" in capsys.readouterr().out


def test_a_missing_package_is_told_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    trackers.check_trackers(TelemetryConfig())
    with pytest.raises(
        UserError, match=r"telemetry.tensorboard needs .* pip install 'nystrom-pretrain\[tensorboard\]'"
    ):
        trackers.check_trackers(TelemetryConfig(tensorboard=True))


def wandb_records(file: Path) -> list[dict[str, Any]]:
    """What wandb's own reader finds in one of its files."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.slow
def test_wandb_offline_has_what_metrics_have_once_also_after_a_resume(tmp_path: Path) -> None:
    """In processes of their own, as two starts of a run are: the second resumes from step 4 of 6."""
    script = """
import sys
from pathlib import Path
from test_telemetry import config
from pretrain.telemetry.telemetry import Telemetry, truncate_metrics
folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
truncate_metrics(folder / "metrics.jsonl", first - 1)
telemetry = Telemetry(folder, config("offline"), 1000, 0, active=True, step=first - 1)
for step in range(first, last + 1):
    telemetry.write("train", step=step, tokens=64 * step, loss=1 / step, lr=0.1)
    if step == 4:
        telemetry.write("valid", step=step, loss=0.5)
    if step == 8:
        telemetry.samples(step, ["a <b> c"])
telemetry.write("event", step=last, event="done")
telemetry.close()
"""
    paths = ":".join(sys.path)
    for first, last in ((1, 6), (5, 8)):
        words = [sys.executable, "-c", script, str(tmp_path), str(first), str(last)]
        subprocess.run(words, check=True, timeout=120, env={"PYTHONPATH": paths, "HOME": str(tmp_path / "home")})
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    history: list[dict[str, Any]] = []
    ids = set()
    for file in files:
        for record in wandb_records(file):
            if record["type"] == "run":
                ids.add(record["run"]["run_id"])
                assert record["run"]["resume"] is True  # so that the files are joined
            if record["type"] == "history":
                history.append(record["history"]["item"])
    assert ids == {(tmp_path / "wandb" / "run_id").read_text()}
    assert [row["_step"] for row in history] == list(range(1, 9))
    seen = {}
    for row in history:
        for key, value in row.items():
            kind, _, name = key.partition("/")
            if name:
                seen[row["_step"], kind, name] = value
    written = {
        (row["step"], row["kind"], key): value
        for row in lines(tmp_path / "metrics.jsonl")
        for key, value in row.items()
        if row["kind"] != "event" and key not in ("kind", "step", "time")
    }
    assert seen == written
    assert len(written) == 8 * 3 + 1
    (page,) = tmp_path.glob("wandb/offline-run-*/files/media/html/*.html")
    assert "<pre>a &lt;b&gt; c</pre>" in page.read_text()


@pytest.mark.slow
def test_event_files_have_what_metrics_have_once_also_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, change in ((1, 6, 0.0), (5, 8, 0.5)):  # the second start resumes from step 4, with other numbers
        truncate_metrics(tmp_path / "metrics.jsonl", first - 1)
        telemetry = Telemetry(tmp_path, with_tensorboard(), 1000, 0, active=True, step=first - 1)
        for step in range(first, last + 1):
            telemetry.write("train", step=step, tokens=64 * step, loss=1 / step + change)
        telemetry.samples(last, ["written"])
        telemetry.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = lines(tmp_path / "metrics.jsonl")
    for name in ("tokens", "loss"):
        seen = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert seen == [(row["step"], pytest.approx(row[name])) for row in rows]
    text = events.Tensors("samples/0/text_summary")[-1]
    assert (text.step, text.tensor_proto.string_val) == (8, [b"written"])
