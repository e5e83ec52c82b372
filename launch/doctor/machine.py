"""What one machine is, read from the system in less than a second: its software, limits, memory, names, interfaces.

Nothing is judged here; see :mod:`launch.doctor.checks`. All values can be written as JSON, sizes are in bytes.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from data_pipeline.processes import available_cores
from launch.doctor.gpus import find_gpus
from launch.program import version
from pretrain.machine import cpu_name, software

SHARED_MEMORY = Path("/dev/shm")
CGROUPS = Path("/sys/fs/cgroup")
ALSO_COMPARED = ("transformers", "triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
"""Packages whose versions should be equal, besides those without which a run refuses to start."""
INSTRUCTIONS = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "AVX-512 bf16": "avx512_bf16",
    "AMX bf16": "amx_bf16",
}
VIRTUAL = ("docker", "br-", "veth", "cni", "flannel", "cali", "virbr", "tailscale", "tun", "tap", "vnet", "dummy")
"""Beginnings of the names of interfaces that do not lead to other hosts."""
DEFAULT_PORT = 29500
"""Of torchrun and DeepSpeed, where processes meet."""
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_DEBUG")


def describe_machine(host: str, master: str | None) -> dict[str, Any]:
    """All of it. ``host`` is what this machine is called in the report; ``master`` the address where ranks meet."""
    return {
        "host": host,
        "identity": identity(),
        "time": time.time(),
        "software": {"nystrom": version(), **software()},
        "also": {name: _version(name) for name in ALSO_COMPARED},
        "kernel": platform.release(),
        "cpu": _cpu(),
        "memory": _memory(),
        "shared_memory": _shared_memory(),
        "limits": _limits(),
        "gpus": find_gpus(),
        "name": resolve_own_name(socket.gethostname()),
        "interfaces": interfaces(),
        "route": route_to(master) if master else None,
        "busy_port": busy_port(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def identity() -> str:
    """Equal for processes of one host. Containers and namespaces with a network of their own are hosts of their own."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/net"))
    return " ".join(parts)


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    return {
        "model": cpu_name(),
        "instructions": [name for name, flag in INSTRUCTIONS.items() if flag in flags],
        "cores": os.cpu_count() or 1,
        "allowed": available_cores(),
        "quota": cpu_quota(),
        "load": os.getloadavg()[0],
        "omp_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def cpu_quota(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs' worth of time that the control group allows (2.5 for ``250000 100000``), or None without a limit."""
    limits = []
    for folder in _own_groups(root, own):
        with contextlib.suppress(OSError, ValueError):
            quota, _, period = (folder / "cpu.max").read_text().strip().partition(" ")
            limits.append(int(quota) / int(period or 100_000))
        with contextlib.suppress(OSError, ValueError):  # version 1
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                limits.append(quota_us / int((folder / "cpu.cfs_period_us").read_text()))
    return min(limits, default=None)


def memory_limit(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that the control group allows, or None without a limit."""
    limits = []
    for folder in _own_groups(root, own):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text()))
    least = min(limits, default=None)
    return None if least is None or least >= psutil.virtual_memory().total else least


def _own_groups(root: Path, own: Path) -> list[Path]:
    """The folders of this process's control groups and of those above; a container sees its own as the root."""
    paths = {""}
    with contextlib.suppress(OSError):
        paths |= {line.split(":", 2)[2].strip("/") for line in own.read_text().splitlines() if line.count(":") >= 2}
    tops = [root, *(root / name for name in ("cpu", "cpu,cpuacct", "memory") if (root / name).is_dir())]
    found = []
    for top in tops:
        for path in paths:
            folder = top / path
            while folder != top.parent:
                if folder.is_dir() and folder not in found:
                    found.append(folder)
                folder = folder.parent
    return found


def _memory() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {"total": memory.total, "available": memory.available, "limit": memory_limit()}


def _shared_memory() -> dict[str, int] | None:
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return None
    return {"size": usage.total, "free": usage.free}


def _limits() -> dict[str, Any]:
    def of(kind: int) -> list[int | None]:
        return [None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(kind)]

    pattern = None
    with contextlib.suppress(OSError):
        pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    return {
        "open_files": of(resource.RLIMIT_NOFILE),
        "locked": of(resource.RLIMIT_MEMLOCK) if hasattr(resource, "RLIMIT_MEMLOCK") else [None, None],
        "core": of(resource.RLIMIT_CORE),
        "core_pattern": pattern,
        "infiniband": Path("/sys/class/infiniband").is_dir() and bool(os.listdir("/sys/class/infiniband")),
    }


def resolve_own_name(name: str) -> dict[str, Any]:
    """What this machine's own name resolves to. ``kind``: own, loopback, foreign (not of this machine), none.

    gloo binds to that address where GLOO_SOCKET_IFNAME is not set, and takes the loopback where it cannot.
    """
    try:
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(name, None)))
    except OSError:
        return {"name": name, "addresses": [], "kind": "none"}
    own = {address for each in interfaces() for address in each["addresses"]}
    first = addresses[0]
    kind = "loopback" if is_loopback(first) else "own" if first in own else "foreign"
    return {"name": name, "addresses": addresses, "kind": kind}


def is_loopback(address: str) -> bool:
    """Whether it is an address (not a name) of a machine's loopback."""
    return address.startswith("127.") or address in ("::1", "localhost")


def interfaces() -> list[dict[str, Any]]:
    """Interfaces that are up and have an address: name, addresses, mtu, speed (Mbit/s, 0 unknown), loopback."""
    stats = psutil.net_if_stats()
    found = []
    for name, entries in psutil.net_if_addrs().items():
        addresses = [
            entry.address.partition("%")[0] for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)
        ]
        if not addresses or name not in stats or not stats[name].isup:
            continue
        loopback = all(is_loopback(address) for address in addresses)
        found.append(
            {
                "name": name,
                "addresses": addresses,
                "mtu": stats[name].mtu,
                "speed": stats[name].speed,
                "loopback": loopback,
            }
        )
    return found


def candidates(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of :func:`interfaces` that may lead to other hosts: neither loopback, virtual, nor link-local only."""

    def leads(address: str) -> bool:
        return not address.lower().startswith(("fe80:", "169.254."))

    return [
        each
        for each in found
        if not each["loopback"] and not each["name"].startswith(VIRTUAL) and any(map(leads, each["addresses"]))
    ]


def busy_port(port: int = DEFAULT_PORT) -> int | None:
    """``port`` if something else than this examination listens there."""
    if os.environ.get("MASTER_PORT") == str(port):
        return None
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return port
    return None


def route_to(master: str) -> dict[str, Any] | None:
    """The interface and own address of the way to ``master``; nothing is sent. None where there is no way."""
    try:
        family, _, _, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            address = str(probe.getsockname()[0])
    except OSError:
        return None
    name = next((each["name"] for each in interfaces() if address in each["addresses"]), None)
    return {"interface": name, "address": address, "to": str(target[0])}
