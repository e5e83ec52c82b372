"""The signals that ask a run to save and end, as a flag that the training loop reads at step edges."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType

LAUNCHER_PID = "NYSTROM_LAUNCHER_PID"
"""Environment variable with the process that a launch stands and falls with."""

EXIT_DONE = 0
EXIT_NOT_SAVED = 74
"""EX_IOERR of sysexits.h: the last checkpoint or the export could not be written: free space, run the same command."""
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: a checkpoint was saved; run the same command again to resume."""
EXIT_BAD_STEPS = 76
"""Too many steps in a row with a loss or gradient that was not finite."""
EXIT_STALLED = 77
"""A process made no progress for ``stall_seconds``, or never came; the log names it. The last checkpoint is good."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""SIGHUP: the terminal is gone, as at the end of an ssh session. SIGUSR1: what Slurm's ``--signal`` usually sends."""
ORPHAN_SECONDS = 300.0
"""A process without a launcher that has not saved and ended by itself after so long is ended by its watchdog."""


def stop_signals() -> list[signal.Signals]:
    """:data:`STOP_SIGNALS`, but not SIGHUP or SIGUSR1 if this process was told to ignore it, as ``nohup`` does.

    A shell has its background jobs ignore SIGINT. One that is sent to a run by name counts all the same.
    """
    always = (signal.SIGTERM, signal.SIGINT)
    return [number for number in STOP_SIGNALS if number in always or signal.getsignal(number) is not signal.SIG_IGN]


class StopFlag:
    """True once this process was asked to stop, or its launcher is gone. The handler sets it and does nothing else.

    It must not print: a launcher that is gone leaves a broken pipe, and writing to it would kill the process before it
    has saved. A second signal changes nothing; a save takes seconds, and SIGKILL ends a process at once.

    A launcher that is killed leaves its workers running with nobody to look after them. The parent process changes
    then, or the process named by NYSTROM_LAUNCHER_PID is gone; the workers save and end by themselves. DeepSpeed's
    launcher is two processes: SIGTERM ends the first, and the second, the parent, waits for the workers. So the parent
    of that one is watched too.
    """

    def __init__(self, launched: bool = False) -> None:
        """``launched``: the parent process is a launcher, without which the run must end."""
        self._set = False
        self._parent = os.getppid() if launched else None
        self._launcher = _Process(int(os.environ[LAUNCHER_PID])) if launched and LAUNCHER_PID in os.environ else None
        self._launcher = self._launcher or _deepspeed_runner()
        for number in stop_signals():
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._set = True

    def __call__(self) -> bool:
        return self._set or self.is_orphan()

    def is_orphan(self) -> bool:
        """Whether the launcher is gone."""
        if self._parent is not None and os.getppid() != self._parent:
            return True
        return self._launcher is not None and self._launcher.ended()


def _deepspeed_runner() -> _Process | None:
    """The process that a user started as ``deepspeed``, if this one is a worker of its launcher on this machine."""
    import psutil

    def is_deepspeed(process: psutil.Process | None) -> bool:
        words = [] if process is None else process.cmdline()[1:5]  # python -u -m deepspeed.launcher.launch
        return any(word.startswith("deepspeed.launcher") or os.path.basename(word) == "deepspeed" for word in words)

    try:
        parent = psutil.Process(os.getppid())
        runner = parent.parent()
        # Started from another machine, that is a shell of ssh or pdsh, which may end before.
        return _Process(runner.pid) if runner and is_deepspeed(parent) and is_deepspeed(runner) else None
    except psutil.Error:
        return None


class _Process:
    """Whether another process has ended, also one that nobody has reaped yet: signal 0 still finds that one."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._handle: int | None = None
        try:
            self._handle = os.pidfd_open(pid)
        except (AttributeError, OSError):
            return  # not Linux, or one before 5.3; or it is gone already

    def ended(self) -> bool:
        if self._handle is not None:
            # One of its own for each question: the training loop and the watchdog's thread both ask, and a shared
            # object raises "concurrent poll() invocation" when they meet. 0.4 microseconds.
            poll = select.poll()
            poll.register(self._handle, select.POLLIN)
            return bool(poll.poll(0))
        try:
            os.kill(self._pid, 0)  # asks whether it is there
        except ProcessLookupError:
            return True
        return False
