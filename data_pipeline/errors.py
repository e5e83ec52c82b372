"""The one exception that stands for a mistake of the user's, in all folders of the project.

It lives in ``data_pipeline`` because that is the bottom layer: everything may import it and it imports nothing.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

_OURS = Path(__file__).resolve().parents[1]
"""The folder with the project's packages. A checkout may hold the user's files too, so their names count."""
_PACKAGES = ("benchmarks", "data_pipeline", "eval", "launch", "nystrom_pretrain", "pretrain")


class UserError(Exception):
    """Something the user can mend: a wrong path, an unknown key, data that does not fit.

    The message says what was wrong, where, and what to do. Command-line programs print it without a traceback and exit
    with status 2; library callers can catch it. A notebook shows the message and the line that was called, without the
    frames of the project: IPython asks for ``_render_traceback_``. ``%debug`` has them all.
    """

    def _render_traceback_(self) -> list[str]:
        name = type(self).__name__
        called = _called(traceback.extract_tb(self.__traceback__))
        return [f"{name}: {self}", *([f"in line {called.lineno}: {called.line}"] if called and called.line else [])]


def _called(frames: Sequence[traceback.FrameSummary]) -> traceback.FrameSummary | None:
    """The user's frame that called the project: the last one before the first of the project's own."""
    ours = tuple(f"{_OURS / package}{os.sep}" for package in _PACKAGES)
    for before, frame in itertools.pairwise(frames):
        if frame.filename.startswith(ours):
            return before
    return None


def run_cli(main: Callable[[Sequence[str] | None], int | None], prog: str, argv: Sequence[str] | None = None) -> int:
    """Run a command's ``main`` and turn :class:`UserError` and Ctrl-C into a message and an exit status.

    Returns 0 on success, 2 for a :class:`UserError`, 130 for Ctrl-C, 141 if whoever read the output went away (as
    ``head`` does), or whatever integer ``main`` returns.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        _never_refuse_characters(stream)
    try:
        status = int(main(argv) or 0)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        # Nobody reads any more: what is still in the buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _open_closed_streams() -> None:
    """Where standard output or error was closed (``>&-``), what is printed goes nowhere.

    The numbers 0 to 2 are taken too: a file of data that got one of them would receive what libraries print.
    """
    for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _never_refuse_characters(stream: TextIO) -> None:
    """A character that the stream's encoding lacks (Latin-1, ASCII) is written as an escape, ``\\u65e5``."""
    utf8 = (stream.encoding or "").lower().replace("-", "").startswith("utf")
    lenient = ("strict",) if utf8 else ("strict", "surrogateescape")
    if isinstance(stream, io.TextIOWrapper) and stream.errors in lenient:
        stream.reconfigure(errors="backslashreplace")
