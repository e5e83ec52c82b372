"""What a run says while it trains: metrics.jsonl always, a progress bar or plain lines, and trackers that work."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomic
from pretrain.config import RunConfig
from pretrain.telemetry.lines import LineFile
from pretrain.telemetry.progress import Progress
from pretrain.telemetry.trackers import Trackers

METRICS = "metrics.jsonl"


def truncate_metrics(path: Path, step: int) -> int:
    """Cut ``metrics.jsonl`` back to ``step``: later steps, which will be written again, go, and a torn line.

    So a reader sees every step once. Returns the number of lines removed. The file is replaced atomically.
    """
    if not path.exists():
        return 0
    kept, removed = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            keep = False
        if keep:
            kept.append(line)
        else:
            removed += 1
    if removed:
        write_atomic(path, "".join(line + "\n" for line in kept).encode())
    return removed


class Telemetry:
    """What the first process writes and prints; on the others every method does nothing."""

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        total_tokens: int,
        tokens: int,
        active: bool,
        step: int = 0,
        total_steps: int | None = None,
    ) -> None:
        """Open the run's files for appending after ``step``, at ``tokens`` of ``total_tokens``."""
        self._active = active
        if not active:
            return
        self._metrics = LineFile(run_dir / METRICS)
        self._progress = Progress(config.name, total_tokens, tokens, total_steps, self.say)
        self._trackers = Trackers(run_dir, config, step, self.say)

    def write(self, kind: str, **values: Any) -> None:
        """Append one line; numbers that are not finite become null, for JSON has none."""
        if not self._active:
            return
        line = {"kind": kind, **{key: _finite(value) for key, value in values.items()}, "time": round(time.time(), 3)}
        problem = self._metrics.append(json.dumps(line))
        if problem is not None:
            self.say(problem)
        self._trackers.line(line)

    def samples(self, step: int, texts: Sequence[str]) -> None:
        """Pass what the model wrote on to the trackers; the run folder has it already."""
        if self._active:
            self._trackers.texts(step, texts)

    def say(self, text: str | None) -> None:
        """Print a line, if there is one to print, without tearing the progress bar."""
        if not self._active or text is None:
            return
        # A log on a full disk, a reader that went away: the run continues, and saves when it is asked to.
        with contextlib.suppress(OSError):
            if self._progress.bar is not None:
                self._progress.bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)

    def advance(self, step: int, tokens: int, *, loss: float, lr: float, seq_len: int) -> None:
        """Show how far the run is, after each step. ``loss``: the last one known, NaN for none."""
        if self._active:
            self._progress.step(step, tokens, loss=loss, lr=lr, seq_len=seq_len)

    def set_speed(self, tokens_per_second: float) -> None:
        """The latest measurement, to be shown from here on."""
        if self._active:
            self._progress.tokens_per_second = tokens_per_second

    def close(self) -> None:
        """Flush and close everything."""
        if not self._active:
            return
        self._progress.close()
        problem = self._metrics.close()
        if problem is not None:
            self.say(problem)
        self._trackers.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
