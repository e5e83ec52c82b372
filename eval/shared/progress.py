"""How far long work is: a bar on a terminal and in a notebook, and a line now and then where there is none."""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from data_pipeline.bars import EVERY_SECONDS, progress_bar
from data_pipeline.units import about

_DISABLE = list(inspect.signature(tqdm.__init__).parameters).index("disable") - 1
"""Place of tqdm's option among its arguments, where it is given without its name."""


class Progress:
    """Counts up to ``total`` of ``unit``. A context: the bar is closed at its end.

    Lines go to standard output, which only the first of several processes has. ``clock``: seconds, for tests.
    """

    def __init__(self, total: int, title: str, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.title, self.unit = total, title, unit
        self.done, self._remark = 0, ""
        self._clock = clock
        self._began = self._said = clock()
        self._bar = progress_bar(total=total, desc=title, unit=unit, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, count: int = 1) -> None:
        """So much more is done."""
        self.done += count
        self._bar.update(count)
        now = self._clock()
        if self._bar.disable and now - self._said >= EVERY_SECONDS and self.done < self.total:
            remark = f" ({self._remark})" if self._remark else ""
            self.say(f"{self.done:,} of {self.total:,} {self.unit}s, {about(self.left())} left{remark}")

    def left(self) -> float:
        """Seconds that the rest takes, if it goes on as so far."""
        return (self._clock() - self._began) * (self.total - self.done) / max(self.done, 1)

    def whole(self) -> float:
        """Seconds that all of it takes, if it goes on as so far."""
        return (self._clock() - self._began) * self.total / max(self.done, 1)

    def remark(self, text: str) -> None:
        """What the next lines, and the bar, say besides: a loss, an accuracy."""
        self._remark = text
        self._bar.set_postfix_str(text)

    def say(self, text: str) -> None:
        """A line about this work, now; it does not break the bar."""
        self._said = self._clock()
        line = f"{self.title}: {text}"
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)


@contextlib.contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """A block in which bars of libraries too are drawn on a terminal only: tqdm's default draws them into files.

    lm-eval 0.4.13 gives no choice: ``Task.build_all_requests`` draws one without an option for it. tqdm's own switch,
    ``TQDM_DISABLE``, is read when tqdm is imported, which whoever calls this has done long before.
    """
    own, drawn = vars(tqdm)["__init__"], tqdm.__init__

    def init(self: tqdm, *args: Any, **options: Any) -> None:
        if len(args) <= _DISABLE and not options.get("disable"):
            options["disable"] = None
        drawn(self, *args, **options)

    tqdm.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = own  # type: ignore[method-assign]
