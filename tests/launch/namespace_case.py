"""Hosts of a cluster as network namespaces of this machine, each with an address, a name and an sshd of its own.

    with hosts(3, folder) as cluster:
        cluster.run(["nystrom", "launch", "hostfile", "--ssh-args", cluster.ssh_args, "--hostfile", cluster.hostfile])
        cluster.cut("n2")

All hang on a bridge in a namespace of its own, the login node, from which commands are given. So no address of this
machine is touched, and several such clusters do not meet. Each host has its own numbers of processes too: when its
first one is killed, the kernel ends all. The file system is shared. Each finds its own name at 127.0.1.1, as Debian has
it in ``/etc/hosts``, which is a trap for who takes the name of the first host for the address of all.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

NETWORK = "10.213.7"
PROGRAMS = ("ip", "tc", "ssh", "sshd", "ssh-keygen", "unshare", "nsenter", "mount")
START_SECONDS = 30


def hosts_impossible() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no program {', '.join(missing)} (Debian: apt-get install iproute2 openssh-server)"
    name = f"nystry{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    try:
        entered = subprocess.run(
            ["ip", "netns", "exec", name, "unshare", "--uts", "--pid", "--fork", "--mount-proc", "true"],
            capture_output=True,
            text=True,
        )
        pair = ["ip", "-n", name, "link", "add", "name", "one", "type", "veth", "peer", "name", "other"]
        linked = subprocess.run(pair, capture_output=True, text=True)
        failed = next((each for each in (entered, linked) if each.returncode), None)
        return None if failed is None else f"namespaces are restricted here: {failed.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


class Cluster:
    """Hosts ``n0``, ``n1``, ...; made by :func:`hosts`."""

    def __init__(self, number: int, folder: Path) -> None:
        self.names = [f"n{index}" for index in range(number)]
        self.folder = folder
        self.hostfile = str(folder / "hosts")
        self._prefix = f"ny{secrets.token_hex(3)}"
        self._login = f"{self._prefix}-login"
        self._first: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def ssh_args(self) -> str:
        """What ``--ssh-args`` takes: the configuration with the names' addresses and this cluster's keys."""
        return f"-F {self.folder / 'ssh_config'}"

    def address(self, name: str) -> str:
        """The address of a host; the login node has 1."""
        return f"{NETWORK}.{10 + self.names.index(name)}"

    def namespace(self, name: str) -> str:
        """The name that ``ip netns`` has for a host."""
        return f"{self._prefix}-{name}"

    def popen(self, words: Sequence[str], on: str | None = None, **more: Any) -> subprocess.Popen[str]:
        """Start a command on the login node, or in the network of a host but outside its numbers of processes."""
        where = self._login if on is None else self.namespace(on)
        inside = [*["ip", "netns", "exec", where], *_with_hosts(self.folder / f"hosts-{on or 'login'}"), *words]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **more}
        return subprocess.Popen(inside, **options)

    def run(self, words: Sequence[str], on: str | None = None, timeout: float = 120, **more: Any) -> tuple[int, str]:
        """Run a command as :meth:`popen` does; returns its exit status and what it wrote."""
        process = self.popen(words, on, **more)
        try:
            return process.wait() if process.stdout is None else _status_after(process, timeout)
        finally:
            process.kill()

    def ssh(self, name: str, line: str, timeout: float = 60) -> tuple[int, str]:
        """Run a line of shell on a host, over ssh from the login node."""
        return self.run(["ssh", *shlex.split(self.ssh_args), name, line], timeout=timeout)

    def cut(self, name: str) -> None:
        """Take a host off the network, at the switch: nobody hears anything of it, not even that it is gone."""
        _ip("-n", self._login, "link", "set", f"up-{name}", "down")

    def mend(self, name: str) -> None:
        """Connect a host again."""
        _ip("-n", self._login, "link", "set", f"up-{name}", "up")

    def slow(self, name: str, rate: str) -> None:
        """Limit what a host sends and gets to ``rate`` (``50mbit``), by a token bucket."""
        bucket = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
        for namespace, device in ((self._login, f"up-{name}"), (self.namespace(name), "eth0")):
            _do("tc", "-n", namespace, "qdisc", "replace", "dev", device, *bucket)

    def delay(self, name: str, delay: str) -> None:
        """Have what a host gets arrive ``delay`` (``20ms``) later; skips where the kernel has no netem."""
        words = ["tc", "-n", self._login, "qdisc", "replace", "dev", f"up-{name}", "root", "netem", "delay", delay]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this kernel has no netem: {done.stderr.strip()}")

    @contextlib.contextmanager
    def covered(self, name: str, path: Path, by: Path) -> Iterator[None]:
        """A host sees ``by`` where ``path`` is for all others: another version, or another file system."""
        (first,) = psutil.Process(self._first[name].pid).children()
        there = ["nsenter", "-t", str(first.pid), "-m", "-p"]
        _do(*there, "mount", "--bind", str(by), str(path.resolve()))
        try:
            yield
        finally:
            _do(*there, "umount", str(path.resolve()))

    def kill(self, name: str) -> None:
        """End everything on a host at once, as a loss of power does, and take it off the network first."""
        self.cut(name)
        first = self._first.pop(name)
        _kill_family(first)

    def processes(self, name: str) -> list[psutil.Process]:
        """What runs on a host besides its sshd."""
        own = os.stat(f"/run/netns/{self.namespace(name)}").st_ino
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                inside = os.stat(f"/proc/{process.pid}/ns/net").st_ino == own
                words = process.cmdline()
                if inside and process.status() != psutil.STATUS_ZOMBIE and not _is_of_host(words):
                    found.append(process)
        return found

    def _start(self) -> None:
        _ip("netns", "add", self._login)
        _ip("-n", self._login, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._login, "addr", "add", f"{NETWORK}.1/24", "dev", "switch")
        for device in ("lo", "switch"):
            _ip("-n", self._login, "link", "set", device, "up")
        self._write_files()
        for name in self.names:
            own, up = self.namespace(name), f"up-{name}"
            _ip("netns", "add", own)
            _ip("link", "add", up, "netns", self._login, "type", "veth", "peer", "name", "eth0", "netns", own)
            _ip("-n", self._login, "link", "set", up, "master", "switch")
            _ip("-n", self._login, "link", "set", up, "up")
            _ip("-n", own, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", own, "link", "set", device, "up")
            _ip("-n", own, "route", "add", "default", "via", f"{NETWORK}.1")
            self._first[name] = self._start_host(name)
        for name in self.names:
            self._wait_for_sshd(name)

    def _start_host(self, name: str) -> subprocess.Popen[bytes]:
        # sshd wants /run/sshd, and this machine may have none: a /run of its own, in the mounts of this host only.
        inside = f"hostname {name} && mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec "
        inside += shlex.join([str(shutil.which("sshd")), "-D", "-e", "-f", str(self.folder / "sshd_config")])
        numbers = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with open(self.folder / f"sshd-{name}.log", "wb") as log:
            return subprocess.Popen(
                [
                    *["ip", "netns", "exec", self.namespace(name)],
                    *_with_hosts(self.folder / f"hosts-{name}"),
                    *[*numbers, "sh", "-c", inside],
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # As a machine's sshd is started: with next to nothing, so that only what is passed on crosses.
                env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/root")},
                start_new_session=True,
            )

    def _wait_for_sshd(self, name: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.ssh(name, "true")[0] != 0:
            if time.monotonic() > deadline or self._first[name].poll() is not None:
                log = (self.folder / f"sshd-{name}.log").read_text()
                pytest.fail(f"sshd of {name} did not start:\n{log}")
            time.sleep(0.1)

    def _write_files(self) -> None:
        def key(name: str) -> Path:
            path = self.folder / name
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))
            return path

        host_key, own_key, known = key("host_key"), key("key"), self.folder / "known_hosts"
        public = host_key.with_suffix(".pub").read_text()
        known.write_text("".join(f"{name} {public}" for name in self.names))
        shutil.copy(own_key.with_suffix(".pub"), self.folder / "authorized_keys")
        shell_path = f"SetEnv PATH={os.environ['PATH']}"
        (self.folder / "sshd_config").write_text(
            f"HostKey {host_key}\nAuthorizedKeysFile {self.folder / 'authorized_keys'}\nStrictModes no\nUsePAM no\n"
            f"PermitRootLogin yes\nPasswordAuthentication no\nPidFile none\nMaxStartups 100\n{shell_path}\n"
        )
        (self.folder / "ssh_config").write_text(
            "".join(f"Host {name}\n  HostName {self.address(name)}\n  HostKeyAlias {name}\n" for name in self.names)
            + f"Host *\n  IdentityFile {own_key}\n  IdentitiesOnly yes\n  UserKnownHostsFile {known}\n"
            "  GlobalKnownHostsFile /dev/null\n"
        )
        everybody = "".join(f"{self.address(name)} {name}\n" for name in self.names) + f"{NETWORK}.1 login\n"
        for name in ("login", *self.names):
            own = f"127.0.1.1 {name}\n" if name in self.names else ""
            (self.folder / f"hosts-{name}").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n{own}{everybody}")
        Path(self.hostfile).write_text("".join(f"{name} slots=1\n" for name in self.names))

    def _remove(self) -> None:
        for name in list(self._first):
            _kill_family(self._first.pop(name))
        for name in [*map(self.namespace, self.names), self._login]:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in inside:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextlib.contextmanager
def hosts(number: int, folder: Path) -> Iterator[Cluster]:
    """A cluster of ``number`` hosts, whose files lie in the new ``folder``; skips where there can be none.

    Nothing of it is left at the end, whatever happened: neither processes nor namespaces.
    """
    impossible = hosts_impossible()
    if impossible is not None:
        pytest.skip(impossible)
    folder.mkdir(parents=True)
    cluster = Cluster(number, folder)
    try:
        cluster._start()
        yield cluster
    finally:
        cluster._remove()


def _with_hosts(file: Path) -> list[str]:
    """Words before a command that give it this ``/etc/hosts``; ``ip netns exec`` has made the mounts its own."""
    return ["sh", "-c", f'mount --bind {shlex.quote(str(file))} /etc/hosts && exec "$@"', "sh"]


def _is_of_host(words: Sequence[str]) -> bool:
    line = " ".join(words)
    return "unshare --uts" in line or "sshd" in line.split(" -", 1)[0]


def _kill_family(first: subprocess.Popen[bytes]) -> None:
    """Kill what ``first`` became, ``unshare``; its child, the first process of the host, takes all others along."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(first.pid).children():
            child.kill()
    first.kill()
    first.wait()


def _status_after(process: subprocess.Popen[str], timeout: float) -> tuple[int, str]:
    output = process.communicate(timeout=timeout)[0]
    return process.returncode, output


def _ip(*words: str) -> None:
    _do("ip", *words)


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
