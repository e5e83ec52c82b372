"""Runs a command that dies with whoever launched it, with all that it started: ``python keeper.py WORD ...``.

pdsh leaves its connections behind when it is killed, in sessions of their own, so that no signal to a group reaches
them. The launcher holds the other end of this program's standard input, which ends with it, also after kill -9.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Sequence

import psutil

POLL_SECONDS = 0.2
KILLED = 254
"""The exit status for a command that a signal ended."""


def kill_tree(pid: int) -> None:
    """Kill a process and all below it."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        below = process.children(recursive=True)
        for each in (process, *below):  # the one that starts others first
            with contextlib.suppress(psutil.Error):
                each.kill()


def main(words: Sequence[str]) -> int:
    """Run ``words`` until they end or standard input does; returns their exit status, or :data:`KILLED`."""
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    while process.poll() is None:
        if select.select([0], [], [], POLL_SECONDS)[0] and not os.read(0, 1 << 12):
            kill_tree(process.pid)
            process.wait()
    return process.returncode if process.returncode >= 0 else KILLED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
