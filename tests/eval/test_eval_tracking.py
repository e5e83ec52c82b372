"""Results in wandb: what its own reader finds in the files, and that it can end nothing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval import tracking
from eval.results.schema import Metric, ModelInfo, Outcome, Result, Series, Table
from eval.results.store import obtain
from eval.tracking import Tracking, numbers


def result(folder: Path) -> Result:
    outcome = Outcome(
        {
            "accuracy": Metric(0.5, True, std=0.1, low=0.4, high=0.6),
            "perplexity": Metric(math.inf, False),
            "loss": Metric(2.0, False, low=math.nan, high=math.nan),
        },
        [Table("by seed", ["row", "value"], [["a", 1.5], [None, True]], note="n")],
        [
            Series("s", [1.0, 2.0], [3.0, 4.0], "x", "y", chart="both"),
            Series("t", [1.0], [5.0], "x", "y", chart="both"),
        ],
        samples=[{"kind": "continuation", "text": "<b>"}],
    )
    return obtain(
        folder, "lm", task="lm", version=1, model=ModelInfo("w" * 64), settings={}, data={"hash": ""}, gate="passed",
        compute=lambda _: outcome,
    )[0]  # fmt: skip


class Broken:
    def __init__(self, at: str) -> None:
        self.at = at
        self.seen: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def method(*_: Any) -> None:
            self.seen.append(name)
            if name == self.at:
                raise OSError("no space left\nand more")

        return method


def test_numbers_are_the_finite_ones(tmp_path: Path) -> None:
    assert numbers("lm", result(tmp_path)) == {
        "lm/accuracy": 0.5, "lm/accuracy.std": 0.1, "lm/accuracy.low": 0.4, "lm/accuracy.high": 0.6, "lm/loss": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("at", ["log", "finish"])
def test_a_tracker_that_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, at: str
) -> None:
    broken = Broken(at)
    monkeypatch.setattr(tracking, "start", lambda *_: broken)
    monkeypatch.setattr(tracking, "payload", lambda *_: {})
    found = result(tmp_path)
    tracker = Tracking(tmp_path, "offline")
    for _ in range(2):
        tracker.log("lm", found)
    tracker.close()
    assert capsys.readouterr().out.count("wandb offline is left out: OSError: no space left (the results") == 1
    assert broken.seen == (["log"] if at == "log" else ["log", "log", "finish"])


def test_online_without_an_answer_becomes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    modes = []

    def start(folder: Path, mode: str, info: ModelInfo, project: str) -> Any:
        modes.append(mode)
        if mode == "online":
            raise TimeoutError("nobody answers")
        return Broken("")

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(tracking, "start", start)
    monkeypatch.setattr(tracking, "payload", lambda *_: {})
    tracker = Tracking(tmp_path, "online")
    tracker.log("lm", result(tmp_path))
    tracker.log("lm", result(tmp_path))
    assert modes == ["online", "offline"]
    assert "wandb online is left out: TimeoutError: nobody answers" in capsys.readouterr().out
    Tracking(tmp_path, "off").log("lm", result(tmp_path))
    assert modes == ["online", "offline"]


@pytest.mark.slow
def test_offline_files_hold_metrics_tables_curves_and_samples(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from test_eval_tracking import result; from eval.tracking import Tracking\n"
        "folder = Path(sys.argv[1]); tracker = Tracking(folder, 'offline')\n"
        "tracker.log('lm', result(folder)); tracker.close()"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path / "home")}
    words = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(words, check=True, timeout=120, env=env, capture_output=True, text=True)
    assert "left out" not in done.stdout
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    records = [json.loads(line) for line in out.splitlines()]
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert run["display_name"] == f"eval {tmp_path.name}"
    (history,) = [record["history"]["item"] for record in records if record["type"] == "history"]
    plain = {key: value for key, value in history.items() if key.startswith(("lm/accuracy", "lm/perp", "lm/loss"))}
    assert plain == numbers("lm", result(tmp_path))
    assert history["lm/gate"] == "passed"
    tables = [json.loads(path.read_text()) for path in tmp_path.glob("wandb/offline-run-*/files/media/table/**/*.json")]
    assert {"columns": ["row", "value"], "data": [["a", 1.5], [None, True]]} in [
        {key: table[key] for key in ("columns", "data")} for table in tables
    ]
    curves = [sorted(map(str, row)) for table in tables for row in table["data"] if len(row) == 3]
    assert sorted(["1.0", "3.0", "s"]) in curves
    assert sorted(["1.0", "5.0", "t"]) in curves
    (page,) = tmp_path.glob("wandb/offline-run-*/files/media/html/**/*.html")
    assert "text: &lt;b&gt;" in page.read_text()


@pytest.mark.parametrize(
    ("asked", "environment", "opened", "said"),
    [
        ("online", "offline", ["offline"], "wandb is offline, for the environment has WANDB_MODE=offline"),
        ("offline", "disabled", [], "wandb is disabled"),
        ("offline", "online", ["offline"], "ask for more with --wandb online"),
        ("off", "online", [], ""),
    ],
)
def test_the_environment_may_ask_for_less(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: str,
    environment: str,
    opened: list[str],
    said: str,
) -> None:
    modes: list[str] = []

    def start(folder: Path, mode: str, *_: Any) -> Broken:
        modes.append(mode)
        return Broken("")

    monkeypatch.setenv("WANDB_MODE", environment)
    monkeypatch.setattr(tracking, "payload", lambda name, result: {})
    monkeypatch.setattr(tracking, "start", start)
    Tracking(tmp_path, asked).log("lm", result(tmp_path))
    assert modes == opened
    out = capsys.readouterr().out
    assert said in out
    assert bool(out) == bool(said)
