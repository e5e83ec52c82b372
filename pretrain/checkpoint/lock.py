"""One run at a time in a run folder: ``run.lock`` names who works in it, on which machine, since when.

The file is made whole under a name of its own and then linked to its name, which exactly one process can do, also on
network file systems (open(2): NFS). The holder moves its time every few seconds. Whether a lock is stale is told in two
ways. On the machine that made it, by the process: is there one of that number that began at that time? From another
machine, by watching the file: its time must not move for ``STALE_SECONDS`` of our own clock, so that clocks that differ
do not matter. The time is read through an open file, for which NFS asks the server anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from data_pipeline.errors import UserError
from pretrain.distributed import watchdog
from pretrain.distributed.signals import EXIT_STALLED

LOCK = "run.lock"
BEAT_SECONDS = 5.0
STALE_SECONDS = 30.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. ``machine`` is the same for processes that can see each other's numbers."""

    host: str
    machine: str
    pid: int
    began: float  # the process; see _began
    since: float  # when it took the lock, seconds since 1970
    key: str  # no other lock has it

    @classmethod
    def this_process(cls) -> Holder:
        """The lock that this process would take now."""
        pid, host = os.getpid(), socket.gethostname()
        return cls(host, _machine(), pid, _began(pid) or 0.0, round(time.time(), 3), secrets.token_hex(8))

    def has_ended(self) -> bool | None:
        """Whether that process is gone; None where this machine cannot tell."""
        if self.machine != _machine():
            return None
        return _began(self.pid) != self.began  # another one has its number now, or none has

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"


class RunLock:
    """The lock of one run folder, held from :meth:`take` to :meth:`release`."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LOCK
        self._own: Holder | None = None
        self._over = threading.Event()

    def take(self) -> None:
        """Take it, over from a holder that is gone if need be; raises :class:`UserError` that names a living one.

        Waits up to ``STALE_SECONDS`` for a sign of life of a holder on another machine. Raises ``OSError`` where the
        folder cannot be written.
        """
        own = Holder.this_process()
        while not self._create(own):
            text = _read(self.path)
            if text is None:
                continue  # released since
            holder = _parse(text)
            ended = holder.has_ended() if holder else None
            if ended is False or (ended is None and self._is_alive(text)):
                who = str(holder) if holder else f"a process that {self.path} does not name yet"
                raise UserError(
                    f"run folder {self.path.parent} is in use by {who}: two runs would overwrite each other's files. "
                    f"Wait for it, stop it (nystrom launch stop {self.path.parent}, or kill "
                    f"{holder.pid if holder else 'PID'} there), or give this run another `name`. If you are sure that "
                    f"it is gone, remove {self.path}"
                )
            self._clear(text)
        self._own, self._over = own, threading.Event()
        threading.Thread(target=self._beat, args=(own, self._over), name="run lock", daemon=True).start()

    def release(self) -> None:
        """Give it back, if it is still ours; never raises."""
        self._over.set()
        own, self._own = self._own, None
        if own is not None:
            with contextlib.suppress(OSError):
                if _parse(_read(self.path) or "") == own:
                    self.path.unlink()

    def _create(self, own: Holder) -> bool:
        """Make the file, unless there is one."""
        data = (json.dumps(asdict(own)) + "\n").encode()
        draft = self.path.with_name(f"{LOCK}.{own.key}")
        try:
            draft.write_bytes(data)
            try:
                os.link(draft, self.path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                return self._create_in_place(data)
            return True
        finally:
            draft.unlink(missing_ok=True)

    def _create_in_place(self, data: bytes) -> bool:
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        return True

    def _clear(self, text: str) -> None:
        """Remove a stale lock with these contents, and no other.

        Several starts may find the same one stale. One of them can make the file ``run.lock.clear-...``, which is named
        after the contents. While it is there nobody else removes this lock, and nobody can make another: what is
        compared is what is removed. Contents never come back, because each lock has a key of its own.
        """
        claim = self.path.with_name(f"{LOCK}.clear-{hashlib.sha256(text.encode()).hexdigest()[:16]}")
        try:
            os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            self._wait_for(claim)
            return
        try:
            if _read(self.path) == text:
                self.path.unlink()
        finally:
            claim.unlink(missing_ok=True)

    def _wait_for(self, claim: Path) -> None:
        """Until another start has removed the stale lock; raises :class:`UserError` if that one was killed over it."""
        deadline = time.monotonic() + STALE_SECONDS
        while claim.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"another start was ended while it took over a run folder: remove {claim} and try again"
                )
            watchdog.at("waiting for another start to take over the run folder")
            time.sleep(POLL_SECONDS)

    def _is_alive(self, text: str) -> bool:
        """Watch the lock: True as soon as its time moves or its contents change, False if nothing does for so long."""
        with contextlib.suppress(OSError):
            who = _parse(text) or "a process without a name"
            print(f"{self.path} is of {who}: waiting {STALE_SECONDS:g} s for a sign of life", flush=True)
        before, deadline = _time(self.path), time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            watchdog.at("waiting for the lock of the run folder")
            time.sleep(POLL_SECONDS)
            now = _time(self.path)
            if now is None:
                return False
            if now != before or _read(self.path) != text:
                return True
        return False

    def _beat(self, own: Holder, over: threading.Event) -> None:
        while not over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a file system that does not answer for a while
                text = _read(self.path)
                if text is None:
                    self._create(own)  # somebody removed it
                elif _parse(text) == own:
                    os.utime(self.path)
                elif not over.is_set():
                    self._exit_without_lock()

    def _exit_without_lock(self) -> None:
        with contextlib.suppress(OSError):
            print(
                f"{self.path} is no longer this run's: another start has taken the folder over while this process was "
                "stopped. It ends without saving, so that two runs do not write the same files",
                file=sys.stderr,
                flush=True,
            )
        os._exit(EXIT_STALLED)


def read_holder(path: Path) -> Holder | None:
    """Who holds the lock in this file; None if nobody does, or the file is none."""
    text = _read(path)
    return None if text is None else _parse(text)


def _parse(text: str) -> Holder | None:
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _time(path: Path) -> int | None:
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _began(pid: int) -> float | None:
    """When a process began, as the system counts; None if it is gone, or has ended and nobody has reaped it."""
    if sys.platform == "linux":
        # Not psutil's time, which is counted from the clock of today: a clock that was set would free a living lock.
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else float(fields[19])
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def _machine() -> str:
    """Host, start of the system and numbering of processes: containers of one host may share its name."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
