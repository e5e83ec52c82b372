"""The agents of a launch on other hosts: started over ssh, spoken to, and waited for.

:mod:`launch.pdsh` starts them another way.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TextIO

from launch.hosts import SSH_FAILED, Host, Outcome, ssh_command, ssh_problem
from launch.life_line import BEAT_SECONDS, LOST_GRACE_SECONDS
from launch.restarts import say
from launch.watch import LOSS_SECONDS, POLL_SECONDS, StopRequest
from pretrain.distributed.signals import EXIT_DONE, EXIT_PREEMPTED

FILES_PER_HOST = 4
OUTPUT_SECONDS = 2.0
MARGIN_SECONDS = 30.0
"""How much longer than its processes may take an agent is waited for."""


class Fleet:
    """One agent on each host. ``ended`` has the exit status of those that are over: 255 where the host is lost."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = list(hosts)
        self.ended: dict[str, int] = {}
        self._last: dict[str, str] = {}
        self._threads: list[tuple[str, threading.Thread]] = []

    @property
    def alive(self) -> list[str]:
        """Hosts whose agent is not over."""
        return [host.name for host in self.hosts if host.name not in self.ended]

    @property
    def lost(self) -> list[str]:
        """Hosts whose connection is gone, so that nobody knows what became of their processes."""
        return [name for name, code in self.ended.items() if code == SSH_FAILED]

    def why(self, name: str) -> str:
        """What ssh said when it lost a host."""
        text = self._last.get(name, "")
        return ssh_problem(Outcome(SSH_FAILED, text, 0.0)) or text if text else "its connection is gone"

    def tell(self, words: str) -> None:
        """Say a line to every agent; one that does not hear it is dealt with by its own life line."""
        raise NotImplementedError

    def poll(self) -> None:
        """Look which have ended."""
        raise NotImplementedError

    def close(self) -> None:
        """End the connections; agents that are still there notice."""
        raise NotImplementedError

    def _follow(
        self, of: str, stream: IO[bytes] | None, to: TextIO, each: Callable[[str], bool] = lambda line: True
    ) -> None:
        """Copy the lines of a stream ``of`` a host, in a thread of its own; ``each`` says whether one is shown."""

        def copy() -> None:
            assert stream is not None
            for raw in stream:
                line = raw.decode(errors="replace")
                if each(line.rstrip("\n")):
                    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone: the run goes its way
                        to.write(line)
                        to.flush()

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        self._threads.append((of, thread))

    def _finish_output(self, of: Sequence[str] | None = None) -> None:
        """Wait a little for what these have written to be shown; None: all of them."""
        # Not for ever: a master connection of ssh's, which outlives the first ssh, holds its stream of errors.
        deadline = time.monotonic() + OUTPUT_SECONDS
        for name, thread in self._threads:
            if of is None or name in of:
                thread.join(timeout=max(0.0, deadline - time.monotonic()))


class SshFleet(Fleet):
    """A connection to each host; an agent hears what is said on its standard input."""

    def __init__(
        self,
        hosts: Sequence[Host],
        lines: Mapping[str, str],
        ssh_args: Sequence[str] = (),
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        """Start ``lines`` of the hosts; ``secrets`` are environment variables that no command line may show."""
        super().__init__(hosts)
        allow_files(FILES_PER_HOST * len(hosts))
        self._processes = {}
        for host in hosts:
            process = subprocess.Popen(
                ssh_command(host.name, lines[host.name], ssh_args),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the launcher, which asks the agents to save
            )
            assert process.stdin is not None
            os.set_blocking(process.stdin.fileno(), False)
            self._processes[host.name] = process
            self._follow(host.name, process.stdout, sys.stdout)
            self._follow(host.name, process.stderr, sys.stderr, self._rememberer(host.name))
        for name, value in (secrets or {}).items():
            self.tell(f"env {name}={value}")
        self.tell("go")

    def _rememberer(self, name: str) -> Callable[[str], bool]:
        def remember(line: str) -> bool:
            self._last[name] = line
            return True

        return remember

    def tell(self, words: str) -> None:
        """Write the line into each connection; a full one is of a host that does not answer."""
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                os.write(process.stdin.fileno(), f"{words}\n".encode())

    def poll(self) -> None:
        """Ask each ssh."""
        codes = {name: self._processes[name].poll() for name in self.alive}
        over = {name: code for name, code in codes.items() if code is not None}
        if over:
            self._finish_output(list(over))  # the last line says why
        for name, code in over.items():
            self.ended[name] = code if code >= 0 else SSH_FAILED

    def close(self) -> None:
        """Kill what is left of ssh."""
        for process in self._processes.values():
            _kill(process)
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
        self._finish_output()


def allow_files(number: int) -> None:
    """Raise this process's limit of open files by ``number``, as far as it may; 1,024 is a usual one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + number if hard == resource.RLIM_INFINITY else min(soft + number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass
class Ended:
    """How a launch over hosts ended."""

    codes: dict[str, int]
    lost: list[str] = field(default_factory=list)
    lost_at: float = 0.0
    """On the monotonic clock."""

    def code(self) -> int:
        """The status of the first host, unless only another knows what was wrong."""
        known = [code for name, code in self.codes.items() if name not in self.lost]
        return next(
            (code for code in known if code not in (EXIT_DONE, EXIT_PREEMPTED)), known[0] if known else SSH_FAILED
        )


def look_after(fleet: Fleet, request: StopRequest, stop_timeout: float) -> Ended:
    """Wait for all agents; passes a request to stop on, and ends the others when a host is lost or has failed."""
    asked: float | None = None
    failed: float | None = None
    result = Ended(fleet.ended)
    told, beaten = False, 0.0
    try:
        while True:
            fleet.poll()
            if not fleet.alive:
                return result
            now = time.monotonic()
            if now - beaten >= BEAT_SECONDS:
                beaten = now
                fleet.tell("beat")
            if asked is None and request.number is not None:
                asked = now
                fleet.tell("stop")
            if fleet.lost and not told:
                told, result.lost, result.lost_at = True, fleet.lost, now
                _say_lost(fleet)
                fleet.tell(f"lost {','.join(result.lost)}")
            if failed is None and any(code not in (EXIT_DONE, EXIT_PREEMPTED) for code in fleet.ended.values()):
                failed = now
            if failed is not None and not told and now - failed > LOSS_SECONDS:
                told = True
                fleet.tell("lost")
            late = asked is not None and now - asked > stop_timeout + MARGIN_SECONDS
            late |= failed is not None and now - failed > LOSS_SECONDS + LOST_GRACE_SECONDS + MARGIN_SECONDS
            if late:
                say(f"{', '.join(fleet.alive)}: no word that the processes there have ended; look there")
                return result
            time.sleep(POLL_SECONDS)
    finally:
        fleet.close()
        if fleet.lost and not result.lost:
            result.lost_at = time.monotonic()
            _say_lost(fleet)
        result.lost = fleet.lost


def _say_lost(fleet: Fleet) -> None:
    for name in fleet.lost:
        say(f"host {name} is lost: {fleet.why(name)}")
    if fleet.alive:
        say(f"the processes of {', '.join(fleet.alive)} are ended, since none can go on without it")
