"""The agents of a launch on other hosts, started by one pdsh."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from launch import keeper
from launch.fleet import Fleet
from launch.hosts import SSH_FAILED, SSH_OPTIONS, Host
from launch.life_line import ORDERS
from pretrain.distributed.signals import EXIT_DONE


class PdshFleet(Fleet):
    """One pdsh for all hosts, which replaces ``%n`` in the line by the number of the host.

    It passes nothing on to its agents, which read what is said to them in a file of the run folder.
    """

    _ENDED = re.compile(r"pdsh@\S+: (\S+): ssh exited with exit code (\d+)")

    def __init__(self, hosts: Sequence[Host], line: str, orders: Path, ssh_args: Sequence[str] = ()) -> None:
        """Start ``line`` on all hosts; ``orders`` is the folder of the launch's logs."""
        super().__init__(hosts)
        self._orders = orders / ORDERS
        self._process = subprocess.Popen(
            [sys.executable, keeper.__file__, *pdsh_command(hosts, line)],
            env={**os.environ, **pdsh_environment(ssh_args)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._follow("pdsh", self._process.stdout, sys.stdout)
        self._follow("pdsh", self._process.stderr, sys.stderr, self._note)

    def _note(self, line: str) -> bool:
        match = self._ENDED.match(line)
        if match is not None:
            self.ended[match[1]] = int(match[2])
        else:
            for host in self.hosts:
                if line.startswith(f"{host.name}: "):
                    self._last[host.name] = line
        return match is None

    def tell(self, words: str) -> None:
        """Replace the file; signs of life are not written, since no agent waits for them."""
        if words == "beat":
            return
        draft = self._orders.with_name(f".{ORDERS}")
        with contextlib.suppress(OSError):
            self._orders.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(f"{words}\n")
            draft.replace(self._orders)

    def poll(self) -> None:
        """Once pdsh is over, those of which it has said nothing have ended well, unless it failed by itself."""
        code = self._process.poll()
        if code is not None:
            self._finish_output()
            # Its status is the largest of the hosts' (-S), and each that is not 0 has a line of its own.
            alone = SSH_FAILED if code < 0 or code == keeper.KILLED else code
            quiet = alone if code < 0 or code == keeper.KILLED or not self.ended else EXIT_DONE
            for name in self.alive:
                self.ended[name] = quiet

    def close(self) -> None:
        """Kill pdsh and its connections."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            keeper.kill_tree(self._process.pid)
            self._process.wait()
        self._finish_output()


def pdsh_command(hosts: Sequence[Host], line: str) -> list[str]:
    """The command that has ``line`` run on all hosts: ``%n`` in it is the number of the host."""
    return ["pdsh", "-R", "ssh", "-S", "-N", "-f", str(len(hosts)), "-w", ",".join(host.name for host in hosts), line]


def pdsh_environment(ssh_args: Sequence[str]) -> dict[str, str]:
    """What pdsh reads the options of ssh from; raises :class:`UserError` for one that it would take apart."""
    for word in ssh_args:
        if any(c.isspace() for c in word):
            raise UserError(
                f"--ssh-args {word!r}: pdsh takes no spaces within a word; put the option into ~/.ssh/config"
            )
    ours = [word for option in SSH_OPTIONS for word in ("-o", option)]
    return {"PDSH_SSH_ARGS_APPEND": " ".join([*ssh_args, *ours])}
