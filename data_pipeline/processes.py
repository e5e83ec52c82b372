"""Processes that do not outlive the one that started them, however that one ends.

A process that is killed with -9 tells nobody, and one that SIGTERM ends as it does by default does not either. Children
left behind train on, or wait for work forever: those of a pool hold both ends of the pipe they wait at. So each child
asks the system to be told. It is in ``data_pipeline`` because that is the bottom layer, and imports next to nothing:
between its start and its question a child is on its own.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from typing import NoReturn

from data_pipeline.moved import renamed

__getattr__ = renamed(
    __name__,
    ending_with_us="child_command",
    end_with_parent="die_with_parent",
    forks_end_with_us="kill_forks_with_parent",
    leave="immediate_exit",
)

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.5


def available_cores() -> int:
    """Cores that a container or a scheduler left to this process, where the system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def child_command(module: str, *words: str, number: int = signal.SIGKILL) -> list[str]:
    """The command ``python -m module *words`` for a child of this process, which gets signal ``number`` at our end.

    Linux tells the child when the *thread* that started it ends: start it from one that lasts.
    """
    return [sys.executable, "-m", "data_pipeline.processes", str(os.getpid()), str(int(number)), module, *words]


def die_with_parent(parent: int | None = None, number: int = signal.SIGKILL) -> None:
    """Have this process get signal ``number`` when the process ``parent`` that started it is gone, or is already.

    To be called first thing in the child; one that multiprocessing started knows its parent. A fork has to ask again.
    """
    if parent is None:
        started_by = multiprocessing.parent_process()
        assert started_by is not None, "not a child of multiprocessing: say whose"
        assert started_by.pid is not None
        parent = started_by.pid
    if sys.platform == "linux":
        # Not a thread that looks: this works also while C code holds the interpreter, and in a stopped process.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it was gone before we asked
            os.kill(os.getpid(), number)
    else:
        threading.Thread(target=_watch, args=(parent, number), name="watches its parent", daemon=True).start()


def immediate_exit(status: int) -> NoReturn:
    """End this process, one of several that worked together, with its exit handlers but without Python's own end.

    A daemon thread that is inside PyTorch then, as a watchdog's call to a store that is gone, would be unwound through
    C++ and abort the process. That was seen once in eight evaluations on two processes: "terminate called without an
    active exception", and status 134 after all results were written.
    """
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def kill_forks_with_parent() -> None:
    """From here on each fork of this process, and of its forks, is killed at the end of the one that made it.

    For pools of other libraries: the workers of ``datasets.map`` waited for work forever after their parent's end.
    """
    os.register_at_fork(before=_remember, after_in_child=_die_with_forker)


_forker = os.getpid()


def _remember() -> None:
    global _forker
    _forker = os.getpid()


def _die_with_forker() -> None:
    die_with_parent(_forker)


def _watch(parent: int, number: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    with contextlib.suppress(OSError):
        os.kill(os.getpid(), number)


def _main() -> None:
    parent, number, module, *words = sys.argv[1:]
    die_with_parent(int(parent), int(number))
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
