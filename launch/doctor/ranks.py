"""Which process of the examination this is: from the five variables, from Slurm's, or alone."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping

from data_pipeline.errors import UserError
from launch.doctor.machine import is_loopback
from pretrain.distributed.world import Rank, read_rank

HOST = "NYSTROM_DOCTOR_HOST"
"""What this host is called in the report: its name in the hostfile."""
HOSTS = "NYSTROM_DOCTOR_HOSTS"
"""All of them by rank, with commas: to name who does not come."""
RAW = "NYSTROM_DOCTOR_RAW"
"""Set: the first process prints JSON on one line, for the command that started it over ssh."""
REPORT_MARK = "nystrom-doctor-report "
"""Before that JSON, among whatever else libraries print."""
FIRST_PORT, PORTS = 22_000, 8_000
"""Of an examination within a Slurm job: another than those of runs, and another for each job."""


def own_name() -> str:
    """What this host is called: by the hostfile, by Slurm, by itself."""
    return os.environ.get(HOST) or os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def adopt_allocation(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Set RANK and its like from the variables that ``srun`` gives each task; returns the task's host by rank.

    Raises :class:`UserError` outside of ``srun``. Names are only returned for one task on each node.
    """
    try:
        rank, size, local = (environ[name] for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
        job = int(environ["SLURM_JOB_ID"])
    except (KeyError, ValueError):
        raise UserError(
            "--in-allocation: this is no task of Slurm. Within an allocation give "
            "srun --ntasks-per-node=1 nystrom launch doctor --in-allocation"
        ) from None
    nodes = expand_nodes(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "")
    os.environ.update({"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local})
    if int(size) > 1:
        if not nodes:
            raise UserError("--in-allocation: Slurm named no nodes (SLURM_JOB_NODELIST); set MASTER_ADDR yourself")
        os.environ.setdefault("MASTER_ADDR", node_address(nodes[0]))
        os.environ.setdefault("MASTER_PORT", str(FIRST_PORT + job % PORTS))
    return nodes if len(nodes) == int(size) else []


def expand_nodes(text: str) -> list[str]:
    """The nodes of a list such as ``n[0-3,7]``, by ``scontrol``."""
    if "[" not in text or shutil.which("scontrol") is None:
        return [name for name in text.split(",") if name]
    done = subprocess.run(["scontrol", "show", "hostnames", text], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise UserError(f"scontrol cannot read the list of nodes {text}: {done.stderr.strip()}")
    return done.stdout.split()


def node_address(name: str) -> str:
    """A node's name if it resolves here, else the address that Slurm has for it (NodeAddr)."""
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:
        pass
    if shutil.which("scontrol") is not None:
        shown = subprocess.run(["scontrol", "show", "node", name], capture_output=True, text=True, timeout=30).stdout
        found = re.search(r"\bNodeAddr=(\S+)", shown)
        if found is not None:
            return found[1]
    return name


def read_own_rank(in_allocation: bool = False) -> Rank:
    """This process's rank; raises :class:`UserError` for contradictions, and where each host would meet itself.

    ``in_allocation``: the address is what Slurm has for the node, which several nodes of one machine may share.
    """
    rank = read_rank()
    address = os.environ.get("MASTER_ADDR", "")
    if in_allocation:
        return rank
    if rank.world_size > 1 and not rank.is_first and is_loopback(address) and rank.local_size < rank.world_size:
        raise UserError(
            f"MASTER_ADDR is {address}, and process {rank.rank} is on another host than the first, where it would meet "
            "itself: set MASTER_ADDR to a name or an address of the first host that the others can reach"
        )
    return rank
