"""How far a run is and when it will be done: a live line on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

LINE_SECONDS = 10.0
"""Without a terminal (a log file, a pipe) a line comes after the first step, then at most this often."""
RATE_STEPS = 200
"""Last steps whose pace tells the time that is left. Validations and checkpoints among them count."""
WIDTH = 120
"""Columns of the live line where the terminal does not tell its own."""


class Progress:
    """Counts steps and tokens up to the run's end. Makes a bar where standard error is a terminal."""

    def __init__(
        self,
        name: str,
        total_tokens: int,
        tokens: int,
        total_steps: int | None,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A run that stands at ``tokens``. ``say`` prints a line, ``clock`` tells seconds."""
        self._total, self._total_steps, self._say, self._clock = total_tokens, total_steps, say, clock
        self._pace: deque[tuple[float, int]] = deque(maxlen=RATE_STEPS)
        self._last_line = -math.inf
        self.tokens_per_second = math.nan
        """The last measurement of training alone, once there is one."""
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total_tokens,
                initial=tokens,
                unit="tok",
                unit_scale=True,
                # A terminal that does not tell its width, as under `script`, has 0 columns: tqdm would print nothing.
                dynamic_ncols=columns() > 0,
                ncols=None if columns() else WIDTH,
                nrows=None if columns() else 24,
                desc=name,
                smoothing=0.1,
            )

    def step(self, step: int, tokens: int, *, loss: float, lr: float, seq_len: int) -> None:
        """After each optimizer step. ``loss``: the last one known, NaN for none."""
        # The first entry is after the first step, which compiles, fills caches and says little about the others.
        self._pace.append((self._clock(), tokens))
        numbers = {} if math.isnan(loss) else {"loss": f"{loss:.3f}"}
        numbers |= {"lr": f"{lr:.1e}", "len": str(seq_len)}
        if self.bar is not None:
            at = f"{step}/{self._total_steps}" if self._total_steps else str(step)
            self.bar.set_postfix({"step": at, **numbers}, refresh=False)
            self.bar.update(tokens - self.bar.n)
            return
        if self._clock() - self._last_line < LINE_SECONDS and tokens < self._total:
            return
        self._last_line = self._clock()
        of = f" of {self._total_steps:,}" if self._total_steps else ""
        parts = [f"step {step:,}{of} ({tokens / self._total:.1%})"]
        parts += [f"{key} {value}" for key, value in numbers.items()]
        if not math.isnan(self.tokens_per_second):
            parts.append(f"{self.tokens_per_second:,.0f} tok/s")
        left = self.seconds_left(tokens)
        if left is not None:
            parts.append(f"about {duration(left)} left")
        self._say("  ".join(parts))

    def seconds_left(self, tokens: int) -> float | None:
        """Until the last step, by the clock on the wall; None at the end, or where only one step was taken."""
        if tokens >= self._total or len(self._pace) < 2:
            return None
        (began, before), (now, after) = self._pace[0], self._pace[-1]
        return (self._total - tokens) * (now - began) / max(1, after - before)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()


def columns() -> int:
    """Of the terminal that standard error is; 0 if it does not tell."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return 0


def duration(seconds: float) -> str:
    """As exact as an estimate is: ``40 s``, ``12 min``, ``5.2 h``, ``3.1 days``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s" if seconds < 10 else f"{round(seconds, -1):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36 * 3600 else f"{seconds / 86400:.1f} days"
