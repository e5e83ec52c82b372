"""The parts of a run in which a request to stop needs no checkpoint: its start, and the export at its end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import TracebackType

from pretrain.distributed.signals import EXIT_PREEMPTED, STOP_SIGNALS, StopFlag, stop_signals

REPORT_SECONDS = 5.0
"""How long message and status may take: the file system may be what the main thread hangs in."""


class ImmediateExit:
    """A block in which a request to stop ends this process, with :data:`EXIT_PREEMPTED`, whatever it is doing.

    A flag would be read too late. Joining the process group waits for the slowest machine, DeepSpeed compiles for
    minutes at a first start, and a large checkpoint is read for minutes. Python runs no signal handler meanwhile. The
    system's own handler writes the signal's number to a socket, and a thread that reads it ends the process. After the
    block the flag counts again; a signal at its very end is in the flag.
    """

    def __init__(self, stop: StopFlag, before_exit: Callable[[], None] = lambda: None) -> None:
        """``before_exit`` is called before the exit; it may be replaced within the block. It needs the main thread."""
        self.before_exit = before_exit
        self._stop = stop
        self._lock = threading.Lock()
        self._over = False

    def __enter__(self) -> ImmediateExit:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._wait, name="immediate-exit", daemon=True)
        self._thread.start()
        if self._stop():  # asked before
            self._exit()
        return self

    def end(self) -> None:
        """From here on the flag counts; the end of the block says it too."""
        with self._lock:
            if self._over:
                return
            self._over = True
        signal.set_wakeup_fd(self._before)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def _wait(self) -> None:
        while received := self._reader.recv(1):
            if received[0] in STOP_SIGNALS:
                self._exit()

    def _exit(self) -> None:
        with self._lock:
            if self._over:
                return
            report = threading.Thread(target=self._report, daemon=True)
            report.start()
            report.join(REPORT_SECONDS)
            os._exit(EXIT_PREEMPTED)

    def _report(self) -> None:
        self.before_exit()
        # Whoever started this may be gone, and the terminal with it.
        with contextlib.suppress(OSError):
            sys.stdout.flush()


def exit_on_signals() -> Callable[[], None]:
    """As :class:`ImmediateExit`, for the imports before it: only Python's own code runs. Returns what undoes it."""
    before = {number: signal.signal(number, lambda *_: os._exit(EXIT_PREEMPTED)) for number in stop_signals()}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore
