"""A made-up machine with nothing wrong with it, for what the doctor makes of changes to it."""

from __future__ import annotations

from typing import Any

GIB = 1 << 30


def machine(host: str = "n0", **changes: Any) -> dict[str, Any]:
    """What :func:`launch.doctor.session.Local.machine` says; dictionaries among the changes are merged."""
    number = int(host[1:])
    base: dict[str, Any] = {
        "host": host,
        "identity": host,
        "time": 0.0,
        "software": {"nystrom": "0.1.0", "python": "3.12.1", "package torch": "2.13.0", "code": "abc"},
        "also": {"transformers": "5.17.0"},
        "kernel": "6.1",
        "cpu": {
            "model": "AMD EPYC",
            "instructions": ["AVX2"],
            "cores": 8,
            "allowed": 8,
            "quota": None,
            "load": 0.1,
            "omp_threads": None,
        },
        "memory": {"total": 64 * GIB, "available": 60 * GIB, "limit": None},
        "shared_memory": {"size": 32 * GIB, "free": 32 * GIB},
        "limits": {
            "open_files": [65536, 65536],
            "locked": [8 << 20, 8 << 20],
            "core": [0, None],
            "core_pattern": "core",
            "infiniband": False,
        },
        "gpus": {"devices": [], "error": None, "cuda": None, "nccl": None, "usable": 0},
        "name": {"name": host, "addresses": [f"10.0.0.{number}"], "kind": "own"},
        "interfaces": [
            {"name": "lo", "addresses": ["127.0.0.1"], "mtu": 65536, "speed": 0, "loopback": True},
            {"name": "eth0", "addresses": [f"10.0.0.{number}"], "mtu": 1500, "speed": 10000, "loopback": False},
        ],
        "route": {"interface": "eth0", "address": f"10.0.0.{number}", "to": "10.0.0.0"},
        "busy_port": None,
        "variables": {},
        "port": 40000,
        "bf16": 1.9,
        "local_rank": 0,
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and isinstance(base[key], dict) else value
    return base


def gpu(index: int = 0, **changes: Any) -> dict[str, Any]:
    """A GPU that nobody uses."""
    base = {
        "index": index,
        "uuid": f"GPU-{index}",
        "name": "NVIDIA H100 80GB HBM3",
        "driver": "550.54",
        "memory": 80 * GIB,
        "used": GIB,
        "ecc_errors": 0,
        "processes": [],
    }
    return {**base, **changes}


def link(a: str, b: str, round_trip: float = 1e-4, speed: float = 1e9, **changes: Any) -> dict[str, Any]:
    """What was measured between two hosts."""
    base = {"a": a, "b": b, "address": "10.0.0.1", "round_trip": round_trip, "round_trip_median": 1.2 * round_trip}
    return {**base, "send": speed, "receive": speed, "speed": speed, "offset": 0.0, "offset_error": 1e-4, **changes}


def links(hosts: list[str], **changes: Any) -> list[dict[str, Any]]:
    """Between each two hosts alike; ``changes`` by the names of a host or of a pair, as ``n1`` or ``n0_n2``."""
    out = []
    for i, a in enumerate(hosts):
        for b in hosts[i + 1 :]:
            wanted = [value for key, value in changes.items() if key in (a, b, f"{a}_{b}")]
            out.append(link(a, b, **{key: value for each in wanted for key, value in each.items()}))
    return out
