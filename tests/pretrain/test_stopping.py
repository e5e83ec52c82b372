"""A request to stop is heard everywhere: while joining, building, loading, validating, saving, exporting."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks, values
from striking_case import PLACES, assert_equal_runs, exit_codes, run_settings, status, steps, train, train_struck, wrap
from training_case import metrics, write_config


def train_stuck_at_start(config: str, clock: str) -> int:
    """Runs in the ranks: the first process waits in C++ for the second, which never comes; both get SIGTERM."""
    if os.environ["RANK"] == "1":
        wrap(PLACES["joining"], lambda: time.sleep(60))

    def strike() -> None:
        Path(clock).touch()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Timer(1.0, strike).start()
    return train(config)


BOTH = [0, 1]
STOPS = [
    # (place, arrival there, processes that are asked, step of the status; None: no run folder yet)
    ("joining", 1, BOTH, None),
    ("building", 1, BOTH, 0),
    ("building", 1, [0], 0),
    ("validating", 1, BOTH, 2),
    ("sampling", 1, BOTH, 2),
    ("sampling", 1, [0], 2),
    ("writing", 1, BOTH, 2),
    ("hashing", 1, [1], 2),
    ("pruning", 1, [0], 6),
    ("exporting", 1, BOTH, 8),
]


@pytest.mark.parametrize(
    ("place", "call", "ranks", "step"),
    [
        STOPS[1],
        *[pytest.param(*stop, marks=pytest.mark.slow) for stop in STOPS if stop != STOPS[1]],
    ],
)
def test_a_request_to_stop_is_heard_everywhere(
    corpus: Path, tmp_path: Path, place: str, call: int, ranks: list[int], step: int | None
) -> None:
    run, clock = tmp_path / "run", tmp_path / "clock"
    writes = {"model": {"objective": "clm", "dropout": 0.2}, "validation": {"every_tokens": 512, "samples": 1}}
    changes = writes if place == "sampling" else {}
    config = write_config(tmp_path / "run.yaml", run_settings(corpus, tmp_path, **changes))
    struck: dict[str, Any] = {"number": signal.SIGTERM, "ranks": ranks, "clock": str(clock), "call": call, "again": 3}
    ended = run_ranks(train_struck, 2, config=config, place=place, timeout=60, **struck)
    took = time.time() - clock.stat().st_mtime
    print(f"{place} {ranks}: {took:.2f} s from the signal to the end")
    assert took < 10
    # A process that was not asked loses its peer if that had nothing to save; all launchers end it then.
    assert [exit_codes(ended)[rank] for rank in ranks] == [75] * len(ranks)
    assert all("Traceback" not in end.output for end in ended)
    assert not (run / "run.lock").exists()
    if step is None:
        assert not run.exists()
    else:
        assert {key: status(run)[key] for key in ("state", "code", "step")} == {
            "state": "preempted", "code": 75, "step": step,
        }  # fmt: skip
    assert not list(tmp_path.rglob("*.tmp")) or place == "exporting"
    assert values(run_ranks(train, 2, config=config)) == [0, 0]
    assert not list(tmp_path.rglob("*.tmp"))
    assert [row["step"] for row in metrics(run)] == list(range(1, 9))


@pytest.mark.parametrize(
    ("number", "place", "step"), [(signal.SIGHUP, "building", 0), (signal.SIGUSR1, "validating", 2)]
)
def test_a_lost_terminal_and_slurm_s_signal_are_requests_to_stop(
    corpus: Path, tmp_path: Path, number: int, place: str, step: int
) -> None:
    """They ended the run without a checkpoint, and its status stayed "running"."""
    config = write_config(tmp_path / "run.yaml", run_settings(corpus, tmp_path))
    struck: dict[str, Any] = {"number": int(number), "ranks": [0], "clock": str(tmp_path / "clock")}
    ended = run_ranks(train_struck, 1, config=config, place=place, timeout=60, **struck)
    assert exit_codes(ended) == [75]
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["step"]) == ("preempted", step)
    assert steps(tmp_path / "run") == ([step] if step else [])


@pytest.mark.slow
def test_a_request_to_stop_while_a_checkpoint_is_loaded(corpus: Path, tmp_path: Path, whole: Path) -> None:
    config = write_config(tmp_path / "run.yaml", run_settings(corpus, tmp_path))
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step000000008")
    (tmp_path / "run" / "export" / "export.json").unlink()
    struck: dict[str, Any] = {"number": signal.SIGTERM, "ranks": BOTH, "clock": str(tmp_path / "clock")}
    ended = run_ranks(train_struck, 2, config=config, place="loading", timeout=60, **struck)
    assert exit_codes(ended) == [75, 75]
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["step"]) == ("preempted", 6)
    assert values(run_ranks(train, 2, config=config)) == [0, 0]
    assert_equal_runs(tmp_path / "run", whole)


def test_a_process_that_waits_for_another_to_come_leaves_at_once(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", run_settings(corpus, tmp_path))
    ended = run_ranks(train_stuck_at_start, 2, config=config, clock=str(tmp_path / "clock"), timeout=30)
    assert time.time() - (tmp_path / "clock").stat().st_mtime < 5
    assert exit_codes(ended) == [75, 75]
    assert not (tmp_path / "run").exists()
