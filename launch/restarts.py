"""Whether a run that crashed is started again: only what may go better the next time, and only while it gets on."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.checkpoint import commit
from pretrain.distributed.signals import EXIT_BAD_STEPS, EXIT_DONE, EXIT_NOT_SAVED, EXIT_PREEMPTED, EXIT_STALLED

PAUSE_SECONDS = 5.0
"""Between two attempts: for ports, GPU memory and file systems to recover."""
ATTEMPTS_WITHOUT_PROGRESS = 2
METRICS = "metrics.jsonl"
_TAIL_BYTES = 1 << 16
_USER_ERROR = 2
FINAL = (EXIT_DONE, _USER_ERROR, EXIT_PREEMPTED, EXIT_BAD_STEPS, EXIT_NOT_SAVED)
"""Done, the user's mistake, asked to stop, bad steps in a row, could not save: again would be the same again."""


class Standing(NamedTuple):
    """How far a run got: the step of its newest whole checkpoint, and of its last line of metrics."""

    checkpoint: int
    metrics: int


class Restarts:
    """The attempts of one launch."""

    def __init__(self, run_dir: Path, limit: int, anew: bool = False) -> None:
        """At most ``limit`` restarts; ``anew``: what the folder holds now is of a run that will be moved aside."""
        self._run_dir, self._limit = run_dir, limit
        self._made, self._without_progress = 0, 0
        self._best = Standing(0, 0) if anew else standing(run_dir)

    def wanted(self, code: int) -> bool:
        """Whether to start again after an attempt that ended with ``code``; says why, or why not."""
        if code in FINAL or self._limit == 0:
            return False
        now = standing(self._run_dir)
        self._without_progress = 0 if now > self._best else self._without_progress + 1
        self._best = max(self._best, now)
        why = f"attempt {self._made + 1} of {self._limit + 1} {_reason(code)} at {_stands(now)}"
        if self._without_progress >= ATTEMPTS_WITHOUT_PROGRESS:
            say(f"{why}; {ATTEMPTS_WITHOUT_PROGRESS} attempts in a row got no further, so there is no other")
            return False
        if self._made == self._limit:
            say(f"{why}; it was the last")
            return False
        self._made += 1
        goes_on = f"from the checkpoint of step {now.checkpoint}" if now.checkpoint else "from the beginning"
        say(f"{why}; the next starts in {PAUSE_SECONDS:g} s {goes_on}")
        return True

    def pause(self, stopped: Callable[[], bool]) -> bool:
        """Wait before the next attempt; True as soon as ``stopped`` says so."""
        deadline = time.monotonic() + PAUSE_SECONDS
        while time.monotonic() < deadline:
            if stopped():
                say("asked to stop; the same command resumes from the last checkpoint")
                return True
            time.sleep(0.05)
        return stopped()


def starts_anew(words: Sequence[str]) -> bool:
    """Whether these arguments move an existing run aside."""
    return "--resume" in words and words[words.index("--resume") + 1] == "never"


def resumed(words: Sequence[str]) -> list[str]:
    """The arguments of a later attempt: ``--resume never`` was meant for the first, which has moved the old run."""
    words = list(words)
    if starts_anew(words):
        words[words.index("--resume") + 1] = "auto"
    return words


def standing(run_dir: Path) -> Standing:
    """How far the run in this folder got; zeros for none."""
    found = commit.newest(run_dir / "checkpoints")
    return Standing(found[1].state.step if found else 0, last_line(run_dir).get("step", 0))


def last_line(run_dir: Path) -> dict[str, Any]:
    """The last whole line of training metrics; {} for none."""
    lines = last_lines(run_dir)
    return lines[-1] if lines else {}


def last_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of training metrics near the end of the file, in its order; a torn file has fewer."""
    try:
        with open(run_dir / METRICS, "rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = stream.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
            if row["kind"] == "train":
                found.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            continue
    return found


def _reason(code: int) -> str:
    if code == EXIT_STALLED:
        return "hung"
    return f"was killed by signal {code - 128}" if code > 128 else f"crashed with exit status {code}"


def _stands(now: Standing) -> str:
    return f"step {max(now)}" if max(now) else "the start"


def say(text: str) -> None:
    """One line of the launcher's own, on standard error."""
    with contextlib.suppress(OSError):  # of a terminal that is gone
        print(f"nystrom launch: {text}", file=sys.stderr, flush=True)
