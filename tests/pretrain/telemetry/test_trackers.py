"""Trackers: what reaches them, across a resume too, and that none of them can end a run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_telemetry import config, lines
from wandb_server_case import WandbServer

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
    monkeypatch.setattr(trackers, "Wandb", lambda run_dir, config, mode, step: other)
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
    monkeypatch.delenv("WANDB_MODE", raising=False)
    modes = []

    def build(run_dir: Path, config: RunConfig, mode: str, step: int) -> Any:
        modes.append(mode)
        if mode == "online":
            raise TimeoutError("nobody answers")
        return trackers.TensorBoard(Writer())

    monkeypatch.setattr(trackers, "Wandb", build)
    trackers.Trackers(tmp_path, config("online"))
    assert modes == ["online", "offline"]
    assert "wandb online is left out: TimeoutError: nobody answers" in capsys.readouterr().out


class FakeWandb(types.ModuleType):
    """Stands in for the package: an id stays in use until ``teardown`` where a start failed, as in wandb 0.31."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.in_use: set[str] = set()
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def Settings(self, **_: Any) -> None:
        return None

    def teardown(self) -> None:
        self.in_use.clear()

    def init(self, *, id: str, mode: str, **_: Any) -> Any:
        if id in self.in_use:
            raise RuntimeError(f"run ID {id} is in use")
        self.in_use.add(id)
        if mode == "online":
            raise TimeoutError("nobody answers")
        return types.SimpleNamespace(log=lambda values, step: self.logged.append((step, values)), finish=lambda: None)


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_the_offline_run_that_follows_a_failed_online_one_opens(
    tmp_path: Path, fake_wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = trackers.Trackers(tmp_path, config("online"))
    opened.line({"kind": "train", "step": 1, "loss": 0.5})
    assert fake_wandb.logged == [(1, {"train/loss": 0.5})]
    assert capsys.readouterr().out.count("left out") == 1


@pytest.mark.parametrize(("error", "left"), [(ConnectionResetError("lost"), set()), (OSError("full"), {"kept"})])
def test_a_service_that_is_gone_is_not_told_at_exit(
    tmp_path: Path, fake_wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, error: OSError, left: set[str]
) -> None:
    opened = trackers.Trackers(tmp_path, config("offline"))
    fake_wandb.in_use = {"kept"}

    def log(*_: Any) -> None:
        raise error

    monkeypatch.setattr(trackers.Wandb, "_log", log)
    opened.line({"kind": "train", "step": 1, "loss": 0.5})
    # A service that still answers is not torn down: that waits until it has written everything.
    assert fake_wandb.in_use == left


@pytest.mark.parametrize("torn", ["", '{"train": 1', "[3]"])
def test_a_torn_record_of_what_was_sent_leaves_nothing_out(tmp_path: Path, fake_wandb: FakeWandb, torn: str) -> None:
    sent = tmp_path / "wandb" / "last_steps.json"
    sent.parent.mkdir()
    sent.write_text(torn)
    opened = trackers.Trackers(tmp_path, config("offline"), step=4)
    for step in (3, 4, 5):  # validation of step 4 may come after the resume
        opened.line({"kind": "valid", "step": step, "loss": 0.5})
    assert [step for step, _ in fake_wandb.logged] == [4, 5]
    assert json.loads(sent.read_text()) == {"valid": 5}
    trackers.Trackers(tmp_path, config("offline"), step=4).line({"kind": "valid", "step": 5, "loss": 0.5})
    assert len(fake_wandb.logged) == 2


def test_what_was_sent_is_recorded_whole_or_not_at_all(
    tmp_path: Path, fake_wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = trackers.Trackers(tmp_path, config("offline"))
    opened.line({"kind": "train", "step": 1, "loss": 0.5})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)  # as a crash before it
    opened.line({"kind": "train", "step": 2, "loss": 0.5})
    assert json.loads((tmp_path / "wandb" / "last_steps.json").read_text()) == {"train": 1}


@pytest.mark.parametrize(
    ("configured", "environment", "mode", "words"),
    [
        ("offline", None, "offline", None),
        ("offline", "", "offline", None),
        ("offline", "disabled", "disabled", "wandb is disabled, for the environment has WANDB_MODE=disabled"),
        ("online", "dryrun", "offline", "wandb is offline"),
        ("online", "run", "online", None),
        ("offline", "online", "offline", "ask for more with --set telemetry.wandb=online"),
        ("disabled", "online", "disabled", None),
        ("offline", "of", "offline", "WANDB_MODE=of is none of disabled, offline, online"),
    ],
)
def test_the_environment_may_allow_less(configured: str, environment: str | None, mode: str, words: str | None) -> None:
    found, note = trackers.wandb_mode(configured, environment)
    assert found == mode
    assert note is None if words is None else words in (note or "")


def test_wandb_is_not_opened_where_the_environment_disables_it(
    tmp_path: Path, fake_wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    trackers.Trackers(tmp_path, config("offline")).line({"kind": "train", "step": 1, "loss": 0.5})
    assert fake_wandb.in_use == set()
    assert not (tmp_path / "wandb").exists()
    assert "wandb is disabled" in capsys.readouterr().out


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
    # The command of docs/training.md: both files become one curve.
    server = WandbServer()
    try:
        place = {"HOME": str(tmp_path / "home"), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
        words = [sys.executable, "-m", "wandb", "sync", str(tmp_path / "wandb")]
        done = subprocess.run(words, env={**os.environ, **place}, capture_output=True, text=True, timeout=120)
    finally:
        server.close()
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["_step"] for line in server.history] == list(range(1, 9)), done.stderr
    assert server.offsets[0] == 0
    assert server.offsets[-1] > 0


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
