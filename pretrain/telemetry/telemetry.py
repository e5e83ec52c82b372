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
from pretrain.telemetry.trackers import Trackers

METRICS = "metrics.jsonl"
PLAIN_LINE_SECONDS = 10.0
"""Without a terminal (a log file, a pipe) progress is a line at most this often."""


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
        self, run_dir: Path, config: RunConfig, total_tokens: int, tokens: int, active: bool, step: int = 0
    ) -> None:
        """Open the run's files for appending after ``step``, at ``tokens`` of ``total_tokens``."""
        self._active = active
        if not active:
            return
        self._metrics = LineFile(run_dir / METRICS)
        self._trackers = Trackers(run_dir, config, step)
        self._total = total_tokens
        self._bar = None
        self._last_line = -math.inf
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_tokens,
                initial=tokens,
                unit="tok",
                unit_scale=True,
                dynamic_ncols=True,
                desc=config.name,
                smoothing=0.1,
            )

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
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)

    def advance(self, tokens: int) -> None:
        """Move the bar to ``tokens``."""
        if self._active and self._bar is not None:
            self._bar.update(tokens - self._bar.n)

    def progress(self, tokens: int, values: dict[str, Any]) -> None:
        """Show the latest numbers."""
        if not self._active:
            return
        shown = {"loss": f"{values['loss']:.3f}", "lr": f"{values['lr']:.1e}", "len": values["seq_len"]}
        if self._bar is not None:
            self._bar.set_postfix(shown)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS or tokens >= self._total:
            self._last_line = time.monotonic()
            numbers = "  ".join(f"{key} {value}" for key, value in shown.items())
            speed = f"{values['tokens_per_second']:,.0f} tok/s"
            self.say(f"{tokens / self._total:6.1%}  step {values['step']}  {numbers}  {speed}")

    def close(self) -> None:
        """Flush and close everything."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.close()
        problem = self._metrics.close()
        if problem is not None:
            self.say(problem)
        self._trackers.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
