"""A real, private Slurm of two nodes on this machine, for the tests of ``nystrom launch slurm``.

One ``slurmctld``, two ``slurmd`` and one ``munged``, in a temporary folder, with ports and a munge key of their own.
Both nodes are this machine: their names, n0 and n1, do not resolve, and their addresses are 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
KILL_WAIT = 20
"""Seconds from SIGTERM to SIGKILL: a save of a tiny run beside other tests takes up to a few."""


def missing() -> str | None:
    """Why no Slurm can be started here; None if one can."""
    if os.geteuid() != 0:
        return "starting Slurm's daemons takes root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install --no-install-recommends slurm-wlm munge)"
    return None


ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass
class Cluster:
    """A running Slurm. Its commands need ``env``."""

    folder: Path
    env: dict[str, str]
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, *words: str | Path, check: bool = True, **more: str) -> str:
        """Run a command with this Slurm's configuration; returns what it printed."""
        done = self.call(*words, **more)
        if check and done.returncode:
            pytest.fail(f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def call(self, *words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        """The same, whatever its exit status."""
        return subprocess.run(
            [str(word) for word in words],
            env=self.env | more,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def job(self, number: str | int) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        text = self.run("scontrol", "show", "job", str(number), "--oneliner")
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def state(self, number: str | int) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, ..."""
        return self.job(number)["JobState"]

    def exit_status(self, number: str | int) -> int:
        """The exit status of the batch script, as ``sacct`` would show it before the colon."""
        return int(self.job(number)["ExitCode"].split(":")[0])

    def wait(self, number: str | int, *states: str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job is in one of these states (default: an end); returns its fields, or fails."""
        ends = states or ENDS
        self.until(lambda: self.state(number) in ends, f"job {number} in {ends}", seconds, number)
        return self.job(number)

    def until(self, condition: Callable[[], object], what: str, seconds: float = 120, job: str | int = "") -> None:
        """Wait for a condition; fails with the output of ``job`` if that ends, or the condition does not come."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or (job and self.state(job) in ENDS and not condition()):
                shown = self.run("scontrol", "show", "job", str(job), check=False) if job else ""
                output = Path(self.job(job)["StdOut"]) if job else Path()
                text = output.read_text() if output.is_file() else ""
                pytest.fail(f"not within {seconds:g} s: {what}\n{self.last_words() if not job else ''}{shown}{text}")
            time.sleep(0.2)

    def last_words(self) -> str:
        """The queue, and the ends of the daemons' logs."""
        logs = [path for pattern in ("*.out", "*.log") for path in sorted(self.folder.glob(pattern))]
        ends = [f"{path.name}:\n" + "\n".join(path.read_text().splitlines()[-5:]) for path in logs]
        return "\n".join([self.run("squeue", check=False), *ends, ""])


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Cluster]:
    """Start the daemons, wait for both nodes to be idle, and stop everything of this Slurm at the end."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    path = f"{os.environ['PATH']}:{SBIN}"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    env |= {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    cluster = Cluster(folder, env)
    _write_configuration(folder)
    socket_file, key = folder / "munge.socket", folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    own = [f"--{name}-file={folder / ('munged.' + name)}" for name in ("pid", "log", "seed")]
    try:
        # --force: a temporary folder is writable by others, which munged would refuse.
        start = ["munged", "--foreground", "--force", f"--socket={socket_file}", f"--key-file={key}", *own]
        _start(cluster, "munged", *start)
        cluster.until(socket_file.exists, "munged's socket", 20)
        _start(cluster, "slurmctld", "slurmctld", "-D", "-c")
        for name in ("n0", "n1"):
            _start(cluster, name, "slurmd", "-D", "-c", "-N", name)
        cluster.until(lambda: _idle(cluster) == 2, "two idle nodes", 60)
        yield cluster
    finally:
        _stop(cluster)


def _idle(cluster: Cluster) -> int:
    return cluster.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %t", check=False).count(
        " idle\n"
    )


def _start(cluster: Cluster, name: str, *command: str | Path) -> None:
    with open(cluster.folder / f"{name}.out", "wb") as output:
        cluster.daemons.append(
            subprocess.Popen(
                [shutil.which(str(command[0]), path=cluster.env["PATH"]) or str(command[0]), *map(str, command[1:])],
                env=cluster.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cluster.folder,
                start_new_session=True,
            )
        )


def _stop(cluster: Cluster) -> None:
    """End jobs, daemons and whatever else runs with this Slurm's configuration."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        cluster.call("scancel", "--full", "--signal=KILL", "--state=RUNNING")
        cluster.call("scancel", "--user=root")
    for daemon in reversed(cluster.daemons):
        daemon.terminate()
    deadline = time.monotonic() + 10
    while (left := _mine(cluster)) and time.monotonic() < deadline:
        time.sleep(0.1)
        for process in left if time.monotonic() > deadline - 5 else []:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
    for daemon in cluster.daemons:
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(10)


def _mine(cluster: Cluster) -> list[psutil.Process]:
    """Living processes with this Slurm's configuration in their environment: daemons, steps and what they run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                continue
            if process.environ().get("SLURM_CONF") == cluster.env["SLURM_CONF"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens at."""
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _write_configuration(folder: Path) -> None:
    ctld, first, second = free_ports(3)
    host = socket.gethostname()
    for name in ("state", "spool-n0", "spool-n1"):
        (folder / name).mkdir()
    lines: Sequence[str] = [
        "ClusterName=tests",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ctld}",
        f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",  # a requeued job waits for so long,
        "SlurmUser=root",
        "SlurmdUser=root",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SlurmdParameters=config_overrides",  # two cores, whatever the machine has
        "MpiDefault=none",
        "ReturnToService=2",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "JobRequeue=1",
        f"KillWait={KILL_WAIT}",
        "MinJobAge=600",
        "OverTimeLimit=1",  # minutes after a limit that a save of a busy machine may take
        "JobCompType=jobcomp/filetxt",
        f"JobCompLoc={folder}/jobcomp.txt",
        f"NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first},{second}] CPUs=2 "
        "RealMemory=1000 State=UNKNOWN",
        "PartitionName=low Nodes=n[0-1] PriorityTier=1 Default=YES MaxTime=1:00:00 DefaultTime=10",
        "PartitionName=high Nodes=n[0-1] PriorityTier=10 MaxTime=1:00:00 DefaultTime=10 PreemptMode=OFF",
    ]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
