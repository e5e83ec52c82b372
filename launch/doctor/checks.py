"""Judges what one machine said of itself (:mod:`launch.doctor.machine`), without asking it anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launch.doctor.findings import Finding, problem, warning
from launch.doctor.machine import candidates

MIB, GIB = 1 << 20, 1 << 30
SHARED_MEMORY_GPU, SHARED_MEMORY_CPU = GIB, 256 * MIB
"""NCCL takes some 10 MB for each pair of GPUs and channel; a container gets 64 MB where nobody asked for more."""
OPEN_FILES, OPEN_FILES_CLUSTER = 1024, 4096
"""A process has a connection to each other one and two files for each shard folder; 1024 suffices on one machine."""
LOCKED = GIB
"""InfiniBand registers its buffers, which are locked; sites that have it set no limit."""
LEAST_AVAILABLE = 0.1
BUSY = 0.5
"""Running processes for each core, by the load of the last minute."""
GPU_USED = 0.05
"""Share of a GPU's memory that nobody should hold before the run: the driver itself takes less than 2%."""


def check_machine(machine: Mapping[str, Any], *, several: bool) -> list[Finding]:
    """All findings of a machine. ``several``: there are other hosts."""
    found: list[Finding] = []
    for check in (_cores, _memory, _shared_memory, _limits, _core_dumps, _gpus):
        found += check(machine, several)
    found += _gpus_in_use(machine)
    found += _variables(machine)
    found += _port(machine)
    if several:
        found += _own_name(machine)
        found += _interfaces(machine)
    return found


def has_gpus(machine: Mapping[str, Any]) -> bool:
    """Whether a run would be on its GPUs."""
    return bool(machine["gpus"]["devices"]) or machine["gpus"]["usable"] > 0


def cores(machine: Mapping[str, Any]) -> float:
    """CPUs' worth of time that a run gets."""
    cpu = machine["cpu"]
    return float(min(cpu["allowed"], cpu["quota"] or cpu["allowed"]))


def _cores(machine: Mapping[str, Any], several: bool) -> Iterator[Finding]:
    host, cpu = machine["host"], machine["cpu"]
    quota, allowed = cpu["quota"], cpu["allowed"]
    if quota is not None and quota < 0.9 * allowed:
        yield warning(
            "cores",
            host,
            f"the control group allows {quota:g} CPUs of time, and {allowed} cores are seen: threads will be throttled",
            f"set OMP_NUM_THREADS={max(1, int(quota))}, or ask the scheduler for {allowed} CPUs",
        )
    if cpu["omp_threads"] and cpu["omp_threads"].isdigit() and int(cpu["omp_threads"]) > allowed:
        yield warning(
            "cores",
            host,
            f"OMP_NUM_THREADS is {cpu['omp_threads']}, and this process may use {allowed} cores",
            "unset it: each process then takes its share of the cores",
        )
    if cpu["load"] > BUSY * max(1.0, cores(machine)):
        yield warning(
            "load",
            host,
            f"others compute here: a load of {cpu['load']:.1f} on {cores(machine):g} cores",
            "look with `top`, and measure again when they are gone",
        )
    if cpu["instructions"] == [] and machine["cpu"]["model"].lower().startswith(("intel", "amd")):
        yield warning("cpu", host, f"{cpu['model']} has no AVX2", "training on its cores will be slow")


def _memory(machine: Mapping[str, Any], several: bool) -> Iterator[Finding]:
    memory = machine["memory"]
    total = min(memory["total"], memory["limit"] or memory["total"])
    if memory["available"] < LEAST_AVAILABLE * total:
        yield warning(
            "memory",
            machine["host"],
            f"{memory['available'] / GIB:.1f} GiB of {total / GIB:.1f} GiB memory are available",
            "end what holds the rest (`top`, then M); `nystrom plan` says what a run needs",
        )


def _shared_memory(machine: Mapping[str, Any], several: bool) -> Iterator[Finding]:
    shared, host = machine["shared_memory"], machine["host"]
    remedy = "start the container with --shm-size=16g (Kubernetes: an emptyDir of medium Memory at /dev/shm)"
    if shared is None:
        yield warning("shm", host, "there is no /dev/shm", remedy)
        return
    gpus = has_gpus(machine)
    least = SHARED_MEMORY_GPU if gpus else SHARED_MEMORY_CPU
    if shared["free"] < least:
        full = shared["size"] >= least
        make = problem if gpus else warning
        yield make(
            "shm",
            host,
            f"/dev/shm has {shared['free'] / MIB:.0f} MiB free of {shared['size'] / MIB:.0f} MiB"
            + (", and NCCL takes its buffers there" if gpus else ", which loaders and gloo may need"),
            "remove what is left in it of processes that are gone" if full else remedy,
        )


def _limits(machine: Mapping[str, Any], several: bool) -> Iterator[Finding]:
    host, limits = machine["host"], machine["limits"]
    soft, hard = limits["open_files"]
    least = OPEN_FILES_CLUSTER if several else OPEN_FILES
    if soft is not None and soft < least:
        make = problem if soft < OPEN_FILES // 4 else warning
        yield make(
            "open files",
            host,
            f"a process may open {soft} files (ulimit -n); {least} are wanted",
            f"ulimit -n {least} before the start"
            + ("" if hard is None or hard >= least else f", for which root must raise the hard limit of {hard}"),
        )
    locked, _ = limits["locked"]
    if limits["infiniband"] and locked is not None and locked < LOCKED:
        yield problem(
            "locked memory",
            host,
            f"there is InfiniBand, and a process may lock {locked / MIB:.1f} MiB of memory (ulimit -l)",
            "have the administrator set memlock to unlimited; in Slurm also LimitMEMLOCK=infinity of slurmd",
        )


def _core_dumps(machine: Mapping[str, Any], several: bool) -> Iterator[Finding]:
    limits = machine["limits"]
    soft, pattern = limits["core"][0], limits["core_pattern"]
    if several and soft != 0 and pattern is not None and not pattern.startswith(("|", "/")):
        size = "of any size" if soft is None else f"of {soft / MIB:.0f} MiB"
        yield warning(
            "core dumps",
            machine["host"],
            f"a crash writes core dumps {size} into the working directory, each process its own",
            "ulimit -c 0 before the start",
        )


def _gpus(machine: Mapping[str, Any], several: bool) -> Iterator[Finding]:
    host, gpus = machine["host"], machine["gpus"]
    if gpus["error"] is not None:
        yield problem("gpu", host, f"nvidia-smi fails: {gpus['error']}", "restart the machine, or mend its driver")
    if len(gpus["devices"]) > gpus["usable"]:
        yield problem(
            "gpu",
            host,
            f"the driver has {len(gpus['devices'])} GPUs, torch (for CUDA {gpus['cuda']}) can use {gpus['usable']}",
            "install a torch with CUDA, of a version that the driver has (the first line of nvidia-smi)",
        )
    for device in gpus["devices"]:
        if device["ecc_errors"]:
            yield warning(
                "gpu",
                host,
                f"GPU {device['index']} had {device['ecc_errors']} memory errors that could not be corrected",
                "reset it (nvidia-smi --gpu-reset), and have it replaced if they come back",
            )


def _gpus_in_use(machine: Mapping[str, Any]) -> Iterator[Finding]:
    host = machine["host"]
    for device in machine["gpus"]["devices"]:
        named = [f"process {app['pid']} ({app['name']})" for app in device["processes"]]
        if named:
            yield problem(
                "gpu in use",
                host,
                f"GPU {device['index']} is in use by {', '.join(named)}: {device['used'] / GIB:.1f} GiB",
                "wait for it or end it there, or leave the GPU out with CUDA_VISIBLE_DEVICES",
            )
        elif device["used"] > GPU_USED * device["memory"]:
            yield warning(
                "gpu in use",
                host,
                f"GPU {device['index']} has {device['used'] / GIB:.1f} GiB in use, by nobody that is seen from here",
                "look outside of the container (nvidia-smi)",
            )


def _variables(machine: Mapping[str, Any]) -> Iterator[Finding]:
    names = {each["name"] for each in machine["interfaces"]}
    value = machine["variables"].get("GLOO_SOCKET_IFNAME")
    if value and not set(value.split(",")) & names:
        yield problem(
            "interface",
            machine["host"],
            f"GLOO_SOCKET_IFNAME is {value}, and no interface of this name is up",
            f"set it to one of {', '.join(sorted(names))}",
        )
    value = machine["variables"].get("NCCL_SOCKET_IFNAME")
    if value and not value.startswith("^"):
        exact = value.startswith("=")
        wanted = [word for word in value.lstrip("=").split(",") if word]
        if not any(name == word or (not exact and name.startswith(word)) for word in wanted for name in names):
            yield problem(
                "interface",
                machine["host"],
                f"NCCL_SOCKET_IFNAME is {value}, and no interface that is up fits it",
                f"set it to one of {', '.join(sorted(names))}",
            )


def _port(machine: Mapping[str, Any]) -> Iterator[Finding]:
    if machine["busy_port"] is not None:
        yield warning(
            "port",
            machine["host"],
            f"port {machine['busy_port']} is in use, at which processes meet by default",
            "name a free one (--master-port, MASTER_PORT) where this is the first host, or end what listens there",
        )


def _own_name(machine: Mapping[str, Any]) -> Iterator[Finding]:
    if machine["variables"].get("GLOO_SOCKET_IFNAME"):
        return
    name, route = machine["name"], machine["route"]
    interface = (route or {}).get("interface")
    first = (name["addresses"] or [""])[0]
    said = {
        "loopback": f"resolves to {first}, which other hosts cannot reach",
        "foreign": f"resolves to {first}, which is no address of this machine",
        "none": "resolves to nothing",
    }.get(name["kind"])
    remedy = f"set GLOO_SOCKET_IFNAME={interface or 'INTERFACE'}, or correct /etc/hosts"
    if said is not None:
        yield problem("own name", machine["host"], f"its own name {said}; gloo takes that address", remedy)
        return
    taken = next((each["name"] for each in machine["interfaces"] if first in each["addresses"]), None)
    if interface is not None and taken != interface:
        yield warning(
            "own name",
            machine["host"],
            f"its own name stands for {taken}, and the way to the first host is {interface}; gloo takes {taken}",
            remedy,
        )


def _interfaces(machine: Mapping[str, Any]) -> Iterator[Finding]:
    names = [each["name"] for each in candidates(machine["interfaces"])]
    gpus, chosen = has_gpus(machine), machine["variables"].get("NCCL_SOCKET_IFNAME")
    if gpus and len(names) > 1 and not chosen:
        route = (machine["route"] or {}).get("interface")
        yield warning(
            "interface",
            machine["host"],
            f"NCCL may take any of {', '.join(names)}",
            f"set NCCL_SOCKET_IFNAME={route or names[0]}",
        )
