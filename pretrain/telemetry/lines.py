"""Output that a full disk, or a terminal that is gone, does not turn into the end of a run."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from data_pipeline.files import write_atomic

KEPT_BYTES = 16 << 20
"""Lines kept in memory while they cannot be written: some 50,000."""


class LineFile:
    """A log to which lines are appended. Those that do not fit on the disk are kept, and written once they fit."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened before the first line."""
        self.path = path
        self._fd: int | None = None
        self._unwritten = b""
        self._lost = 0
        self._failing = False

    def append(self, line: str) -> str | None:
        """Add a line, without its line end; returns what the user should hear: once when writing begins to fail, once
        when it works again. Never raises ``OSError``."""
        data = line.encode() + b"\n"
        if len(self._unwritten) + len(data) > KEPT_BYTES:
            self._lost += 1
        else:
            self._unwritten += data
        return self._flush()

    def close(self) -> str | None:
        """Make it durable; returns what could not be written, if anything."""
        self._flush()
        lost = self._lost + self._unwritten.count(b"\n")
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._fd)
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None
        return f"{self.path}: {lost} line(s) could not be written and are lost" if lost else None

    def _flush(self) -> str | None:
        try:
            if self._fd is None:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            while self._unwritten:
                # Part of a line may fit; the rest follows it, whenever that is.
                self._unwritten = self._unwritten[os.write(self._fd, self._unwritten) :]
        except OSError as error:
            if self._failing:
                return None
            self._failing = True
            return f"{self.path} cannot be written ({error.strerror or error}); its lines are kept until it can"
        if not self._failing:
            return None
        self._failing = False
        lost, self._lost = self._lost, 0
        return f"{self.path} is written again" + (f"; {lost} line(s) are lost" if lost else "; no line is lost")


def print_line(text: str) -> None:
    """Print a line; a reader that is gone is no error."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def write_or_warn(path: Path, data: bytes) -> None:
    """Replace a file of the run folder that is nice to have; on a full disk say so and continue.

    A file that is there takes new contents of about its size in place, which needs no space; a reader could see half of
    them then, but rather that than last week's status.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, data)
    except OSError as error:
        try:
            with open(path, "r+b") as file:
                file.write(data)
                file.truncate()
                os.fsync(file.fileno())
        except OSError:
            print_line(f"{path} could not be written: {error.strerror or error}")


def flush_output() -> None:
    """Flush what was printed; where that is impossible, drop it: it must not replace the exit status of the run."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
