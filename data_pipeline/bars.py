"""Progress: a widget in a notebook, a bar on a terminal, a line now and then where output goes to a file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from data_pipeline.units import about, format_bytes

EVERY_SECONDS = 30.0
"""Between two lines, at least: ten minutes in a file are twenty of them."""


def progress_bar(**options: Any) -> Any:
    """A bar of tqdm with these options; its ``disable`` is true where none is drawn.

    tqdm's own rule (``disable=None``) looks for a terminal. A notebook's output is none, so it gets its bar by name: a
    widget, or text where the package ipywidgets is missing. ``tqdm.auto`` would choose alike, with a warning. The text
    goes to standard output, as what is printed does: each change between two streams would draw the bar anew.
    """
    if in_notebook():
        if find_spec("ipywidgets") is not None:
            from tqdm.notebook import tqdm as drawn

            return drawn(**options)
        from tqdm import tqdm

        return tqdm(**{"file": sys.stdout, **options})
    from tqdm import tqdm

    return tqdm(**options, disable=None)


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this program; IPython at a terminal is none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return shell is not None and "IPKernelApp" in shell.config


@contextlib.contextmanager
def counting(title: str, total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
    """A block that counts up to ``total`` of ``unit`` ("B": bytes); it gets what counts on."""
    with progress_bar(desc=title, total=total, unit=unit, unit_scale=True) as bar:
        yield Lines(title, total, unit).update if bar.disable else bar.update


class Lines:
    """Lines about long work on standard error, for where no bar is drawn: one at its beginning, then now and then.

    ``clock``: seconds, for tests.
    """

    def __init__(self, title: str, total: int | None, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self._clock = clock
        self._began = self._said = clock()
        self._say(f"{title} {self._amount(total)} ..." if total else f"{title} ...")

    def update(self, count: int) -> None:
        """So much more is done."""
        self.done += count
        now = self._clock()
        if now - self._said < EVERY_SECONDS:
            return
        self._said = now
        if self.total is None or not 0 < self.done <= self.total:
            self._say(f"{self.title}: {self._amount(self.done)}")
        else:
            left = (now - self._began) * (self.total - self.done) / self.done
            self._say(f"{self.title}: {self._amount(self.done)} of {self._amount(self.total)}, {about(left)} left")

    def _amount(self, number: int) -> str:
        return format_bytes(number) if self.unit == "B" else f"{number:,}{self.unit}"

    @staticmethod
    def _say(line: str) -> None:
        with contextlib.suppress(OSError):  # of a terminal that is gone
            print(line, file=sys.stderr, flush=True)
