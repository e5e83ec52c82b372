"""The connection of a node to whoever launched it, as a life line: without it the node's processes save and end.

Over ssh the launcher writes a line into the node's standard input every few seconds: a link that was cut sends no end
of file, and silence is all that shows it. ``env NAME=VALUE`` is a variable that no list of processes should show, and
``go`` ends these. ``stop`` asks to save. ``lost NAME`` says that a host is gone, without which nothing can be saved.
pdsh passes no input on. Behind it the node watches its parent process, sshd's, which
ends with the connection, and a file of the run folder that has the same words.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from launch.watch import StopRequest

KINDS = ("stdin", "parent")
BEAT_SECONDS = 3.0
"""Between two lines of the launcher."""
SILENCE_SECONDS = 30.0
SILENCE_GRACE_SECONDS = 25.0
"""From SIGTERM to SIGKILL after a silence, at most: a run that was started anew elsewhere must not meet the old one."""
LOST_GRACE_SECONDS = 10.0
"""From SIGTERM to SIGKILL once a host is lost."""
ORDERS = "orders"
"""The file with the launcher's words, in the folder of the launch's logs."""
_POLL_SECONDS = 0.5


class LifeLine:
    """A thread that hears the launcher and passes on what it says as a request to stop.

    The block begins when the launcher has said ``go``, or is gone: then the request says so.
    """

    def __init__(self, kind: str, request: StopRequest, folder: Path, rank: int) -> None:
        """``folder`` is that of the launch's logs, ``rank`` the number of this node."""
        self._request, self._folder = request, folder
        self._log = folder / f"node-{rank}.log"
        self._parent = os.getppid()
        self._rest = b""
        self._closed = threading.Event()
        self._kind, self._may_begin = kind, threading.Event()
        target = self._listen if kind == "stdin" else self._watch_parent
        self._thread = threading.Thread(target=target, name="life line", daemon=True)

    def __enter__(self) -> LifeLine:
        if self._kind == "stdin":
            # The ranks inherit standard input: what is said here is not for them.
            self._input = os.dup(0)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.close(null)
        else:
            self._may_begin.set()
        self._thread.start()
        while not self._may_begin.wait(_POLL_SECONDS) and self._thread.is_alive():
            pass
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()

    def _listen(self) -> None:
        heard = time.monotonic()
        while not self._closed.is_set():
            if select.select([self._input], [], [], _POLL_SECONDS)[0]:
                data = b""
                with contextlib.suppress(OSError):
                    data = os.read(self._input, 1 << 16)
                if not data:
                    self._cut("the launcher is gone")
                    return
                heard = time.monotonic()
                self._obey(data)
            elif time.monotonic() - heard > SILENCE_SECONDS:
                self._cut(f"nothing was heard of the launcher for {SILENCE_SECONDS:g} s", SILENCE_GRACE_SECONDS)
                return

    def _watch_parent(self) -> None:
        orders = self._folder / ORDERS
        while not self._closed.wait(_POLL_SECONDS):
            if os.getppid() != self._parent or self._parent == 1:  # it may have been gone before we looked
                self._cut("the connection to the launcher is gone")
                return
            with contextlib.suppress(OSError):
                said = orders.read_bytes()
                if said.endswith(b"\n"):
                    self._rest = b""
                    self._obey(said)

    def _obey(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word == "env":
                name, _, value = rest.partition("=")
                os.environ[name] = value
            elif word == "go":
                self._may_begin.set()
            elif word == "stop":
                self._stop(None)
            elif word == "lost":
                self._stop(LOST_GRACE_SECONDS)

    def _stop(self, grace: float | None) -> None:
        if grace is not None and self._request.grace is None:
            self._request.grace = grace
        if self._request.number is None:
            self._request.number = signal.SIGTERM

    def _cut(self, why: str, grace: float | None = None) -> None:
        """Nobody reads the output any more; writing to it would fail, or wait for ever."""
        with contextlib.suppress(OSError):
            self._log.parent.mkdir(parents=True, exist_ok=True)
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.close(log)
            print(
                f"{socket.gethostname()}: {why}; its processes save if they can, and end", file=sys.stderr, flush=True
            )
        self._stop(grace)
