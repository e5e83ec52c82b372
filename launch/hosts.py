"""The hosts of a DeepSpeed hostfile, and a command on all of them at the same time over ssh.

``worker-0 slots=8`` is a line of it. What is run on a host is one line for the login shell there: it changes to the
folder, and the environment stands in it, since sshd takes over no variables unless its administrator lists them.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError

CONNECT_SECONDS = 10
SSH_OPTIONS = (
    "BatchMode=yes",  # a question for a password would wait for ever
    f"ConnectTimeout={CONNECT_SECONDS}",
    "ServerAliveInterval=5",  # a cut link sends nothing: ssh notices after 15 s
    "ServerAliveCountMax=3",
)
SSH_FAILED = 255
"""The exit status of ssh for an error of its own; others are those of the command."""
TIMED_OUT = 124
"""The exit status that stands for a command that did not end in time, as that of ``timeout``."""
AT_ONCE = 200
"""Connections at the same time."""
_LINE = re.compile(r"(\S+)\s+slots=(\d+)(\s+#.*)?")
_NAME = re.compile(r"(\w[\w.+-]*@)?[\w\[][\w.:%\]-]*")


@dataclass(frozen=True)
class Host:
    """A line of a hostfile: a name that ssh takes, and how many processes it is for."""

    name: str
    slots: int


@dataclass(frozen=True)
class Outcome:
    """What became of a command on a host."""

    code: int
    """Its exit status; :data:`SSH_FAILED` where ssh could not start it, :data:`TIMED_OUT` where it did not end."""
    output: str
    """What it and ssh wrote, both streams in one."""
    seconds: float


def read_hostfile(path: Path | str) -> list[Host]:
    """The hosts of a DeepSpeed hostfile, in its order; raises :class:`UserError` for what DeepSpeed does not take."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"hostfile {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found: dict[str, Host] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or not _NAME.fullmatch(match[1]) or int(match[2]) < 1:
            raise UserError(f"hostfile {path}, line {number}: {line!r} is not NAME slots=N, with N at least 1")
        if match[1] in found:
            raise UserError(f"hostfile {path}, line {number}: host {match[1]} stands there twice")
        found[match[1]] = Host(match[1], int(match[2]))
    if not found:
        raise UserError(f"hostfile {path} names no host: a line is NAME slots=N")
    return list(found.values())


def choose_hosts(hosts: Sequence[Host], include: str = "", exclude: str = "") -> list[Host]:
    """The hosts of DeepSpeed's ``--include`` or ``--exclude``, names joined by ``@``; raises :class:`UserError`.

    Choosing single slots of a host, as in ``worker-1:0,2``, is refused: all hosts must have the same number.
    """
    if include and exclude:
        raise UserError("--include and --exclude: give one of them")
    named = (include or exclude).split("@") if include or exclude else []
    option, known = "--include" if include else "--exclude", {host.name for host in hosts}
    for name in named:
        if name not in known:
            if name.partition(":")[0] in known:
                raise UserError(
                    f"{option} {name}: whole hosts only; give --nproc for fewer processes on each host, and "
                    "for certain GPUs --env CUDA_VISIBLE_DEVICES=..."
                )
            raise UserError(f"{option} {name}: the hostfile has no such host")
    chosen = [host for host in hosts if not named or (host.name in named) == bool(include)]
    if not chosen:
        raise UserError(f"{option} {include or exclude}: no host is left")
    return chosen


def remote_line(words: Sequence[str], directory: Path | str | None = None, env: Mapping[str, str] | None = None) -> str:
    """``words`` as one line for the login shell of another host, in ``directory`` and with ``env`` set."""
    line = shlex.join(words)
    if env:
        line = f"env {' '.join(shlex.quote(f'{name}={value}') for name, value in env.items())} {line}"
    line = f"exec {line}"
    return line if directory is None else f"cd {shlex.quote(str(directory))} && {line}"


def ssh_command(name: str, line: str, ssh_args: Sequence[str] = ()) -> list[str]:
    """The command that has ``line`` run on a host; of an option in ``ssh_args`` that is also ours, theirs counts."""
    ours = [word for option in SSH_OPTIONS for word in ("-o", option)]
    return ["ssh", "-T", *ssh_args, *ours, "--", name, line]


def run_on(
    hosts: Sequence[Host],
    words: Sequence[str],
    *,
    ssh_args: Sequence[str] = (),
    timeout: float,
    directory: Path | str | None = None,
    env: Mapping[str, str] | None = None,
) -> dict[str, Outcome]:
    """Run ``words`` on all hosts at the same time; returns what became of it for the name of each, in their order.

    Returns after at most ``timeout`` seconds and a few. A command that is still there then is ended on its host too,
    by ``timeout`` of coreutils, also where the network is gone. There is no standard input. Raises :class:`UserError`
    if there is no ssh.
    """
    limit = ["timeout", "-k", "5", str(max(1, math.ceil(timeout)))]
    line = remote_line([*limit, *words], directory, env)

    def run(host: Host) -> Outcome:
        return _run(ssh_command(host.name, line, ssh_args), timeout)

    with ThreadPoolExecutor(min(AT_ONCE, len(hosts)) or 1) as pool:
        return {host.name: outcome for host, outcome in zip(hosts, pool.map(run, hosts), strict=True)}


def _run(command: Sequence[str], timeout: float) -> Outcome:
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A ProxyCommand of ssh may outlive it and hold the pipe: all of them are killed together.
            start_new_session=True,
        )
    except FileNotFoundError:
        raise UserError(f"there is no program {command[0]} here: install the OpenSSH client") from None
    try:
        output, _ = process.communicate(timeout=timeout)
        code = process.returncode
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        code = TIMED_OUT
    return Outcome(code if code >= 0 else SSH_FAILED, output.decode(errors="replace"), time.monotonic() - began)


SSH_PROBLEMS = (
    ("host key verification failed", "its host key is not known here: compare it and add it with ssh-keyscan"),
    (
        "remote host identification has changed",
        "its host key is another than the known one: ssh-keygen -R removes that",
    ),
    ("permission denied", "it asks for a password: put your public key there with ssh-copy-id"),
    (
        "too many authentication failures",
        "it takes none of the first keys: name the right one with --ssh-args='-i KEY'",
    ),
    ("could not resolve hostname", "its name is not known here: correct the hostfile, or add it to /etc/hosts"),
    ("connection refused", "nothing listens at its ssh port: start sshd there, or name the port in ~/.ssh/config"),
    ("no route to host", "it does not answer: is it switched on, and in the same network?"),
    ("network is unreachable", "there is no way to its network from here"),
    ("timed out", "it does not answer: is it switched on, and does a firewall let ssh through?"),
    ("connection reset", "it closed the connection: is MaxStartups of its sshd too small?"),
    ("connection closed", "it closed the connection: is MaxStartups of its sshd too small?"),
)
"""What ssh says, and what to do about it; the first that is found counts."""


def ssh_problem(outcome: Outcome) -> str | None:
    """Why a command could not be run on a host, and what to do; None if it was run there."""
    if outcome.code == TIMED_OUT:
        return f"it did not answer within {outcome.seconds:.0f} s"
    if outcome.code != SSH_FAILED:
        return None
    text = outcome.output.lower()
    for sign, remedy in SSH_PROBLEMS:
        if sign in text:
            return remedy
    return f"ssh failed: {(outcome.output.strip().splitlines() or ['it says nothing'])[-1]}"
