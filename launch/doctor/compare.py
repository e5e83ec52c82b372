"""Judges hosts against each other: software, clocks, shared folders, devices, and the links between them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from launch.doctor.checks import has_gpus
from launch.doctor.findings import Finding, problem, warning
from pretrain.distributed.agreement import differences, flat
from pretrain.machine import PEAK_FLOPS

SLOW_DEVICE = 0.8
"""Of the speed of its kind: a GPU that is too hot or has its power capped falls below, and all others wait for it."""
SHARE_OF_PEAK = 0.4
"""Of the data sheet's peak: large products reach 0.6 to 0.85 of it."""
CLOCK_WARNING, CLOCK_PROBLEM = 1.0, 60.0
"""Seconds. Logs can be laid beside each other below the one; munge and Kerberos refuse a few minutes."""
VISIBLE_SECONDS = 2.0
"""A file seen later than that by other hosts: attributes are cached (NFS: 3 to 60 s)."""
SLOW_TRIP, TRIP_MARGIN = 3.0, 0.001
"""A round trip this many times the others', and by so many seconds longer: a busy core alone adds some tenths of a
millisecond to the shortest of 37."""
FAR = 0.005
"""Seconds of a round trip, above which hosts are too far apart or their network is overloaded."""
SLOW_SPEED = 0.5
"""Of the others' bytes/s: a link at a lower rate is at a tenth, one that shares a switch above half."""


def compare_software(machines: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """What most hosts have is taken to be right; a run refuses to start where code or packages differ."""
    for key, make in (("software", problem), ("also", warning)):
        facts = [flat(machine[key]) for machine in machines]
        usual = {name: Counter(each.get(name) for each in facts).most_common(1)[0][0] for name in facts[0]}
        for machine, own in zip(machines, facts, strict=True):
            different = differences({name: value for name, value in usual.items() if value is not None}, own)
            if different:
                yield make(
                    "versions",
                    machine["host"],
                    f"it has other software than the other hosts: {'; '.join(different)}",
                    "install the same there, or start from a folder and an environment that all share",
                )


def compare_hardware(machines: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Numbers of GPUs, drivers, processors and the MTU of the way to the first host."""
    traits = {
        "GPUs": lambda each: len(each["gpus"]["devices"]),
        "kind of GPU": lambda each: ", ".join(sorted({device["name"] for device in each["gpus"]["devices"]})),
        "GPU driver": lambda each: ", ".join(sorted({device["driver"] for device in each["gpus"]["devices"]})),
        "NCCL": lambda each: each["gpus"]["nccl"],
        "processor": lambda each: each["cpu"]["model"],
        "MTU": lambda each: _mtu(each),
    }
    for name, trait in traits.items():
        values = [trait(machine) for machine in machines]
        usual = Counter(values).most_common(1)[0][0]
        for machine, value in zip(machines, values, strict=True):
            if value == usual:
                continue
            make = problem if name in ("GPUs", "NCCL") else warning
            yield make(
                "hardware" if name != "MTU" else "interface",
                machine["host"],
                f"{name}: {value or 'none'}, the other hosts have {usual or 'none'}",
                {
                    "MTU": "set the same MTU on all, and on the switches between",
                    "GPUs": "a run needs as many processes on each host: leave this host out, or mend it",
                }.get(name, "leave it out where the slowest host decides the speed, or accept it"),
            )


def _mtu(machine: Mapping[str, Any]) -> int | None:
    name = (machine["route"] or {}).get("interface")
    return next((each["mtu"] for each in machine["interfaces"] if each["name"] == name and not each["loopback"]), None)


def compare_devices(devices: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Those below :data:`SLOW_DEVICE` of their kind's median; each has ``host``, ``device``, ``kind``, ``speeds``."""
    for kind in dict.fromkeys(each["kind"] for each in devices):
        alike = [each for each in devices if each["kind"] == kind]
        slow: dict[tuple[str, str], list[str]] = {}
        for precision in alike[0]["speeds"]:
            # Of two the faster one is taken: their mean would hide the other.
            usual = statistics.median_high(each["speeds"][precision] for each in alike)
            for each in alike:
                share = each["speeds"][precision] / usual
                if share < SLOW_DEVICE:
                    slow.setdefault((each["host"], each["device"]), []).append(f"{share:.2g} in {precision}")
        for (host, device), said in slow.items():
            gpu = device != "cpu"
            make = problem if gpu else warning
            yield make(
                "speed",
                host,
                f"its {device} is slow: {', '.join(said)} of the median of {len(alike)} of its kind",
                "look at heat and power (nvidia-smi -q -d PERFORMANCE); leave it out until it is mended"
                if gpu
                else "look for others that compute there (`top`), and at its governor and heat",
            )


def compare_clocks(hosts: Sequence[str], links: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Offsets of the hosts' clocks to the first one's, of links that the first host is in."""
    for host, offset, error in clock_offsets(hosts, links):
        if abs(offset) - error > CLOCK_WARNING:
            make = problem if abs(offset) - error > CLOCK_PROBLEM else warning
            yield make(
                "clock",
                host,
                f"its clock is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} {hosts[0]}'s "
                f"(± {error:.1g} s)",
                "start a time service there (chronyc tracking, timedatectl)",
            )


def clock_offsets(hosts: Sequence[str], links: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """Host, seconds that its clock is ahead of the first host's, and the limit of the error."""
    return [
        # The one that connects measured the offset of the listening one, which is the first host.
        (link["b"], -link["offset"], link["offset_error"])
        for link in links
        if link["a"] == hosts[0] and "offset" in link
    ]


def compare_shared(folder: str, seen: Mapping[str, float | None], first: str) -> Iterator[Finding]:
    """``seen``: seconds after which each host saw a new file of the first one, None for never."""
    for host, seconds in seen.items():
        if seconds is None:
            yield problem(
                "shared folder",
                host,
                f"a file that {first} wrote into {folder} is not there",
                f"mount the same file system at {folder} on all hosts, or name a folder that all share (--run-dir)",
            )


def compare_cached(folder: str, seen: Mapping[str, float | None], limit: float) -> Iterator[Finding]:
    """``seen``: as above, of a file that the hosts had looked for before it was there; ``limit`` of the wait."""
    for host, seconds in seen.items():
        if seconds is None or seconds > VISIBLE_SECONDS:
            after = f"after {seconds:.1f} s" if seconds is not None else f"not within {limit:g} s"
            yield warning(
                "shared folder",
                host,
                f"a new file in {folder}, looked for before, was seen {after}",
                "mount it with a shorter cache of attributes (NFS: actimeo=1 or lookupcache=positive)",
            )


def compare_links(hosts: Sequence[str], links: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Names hosts that cannot be reached, hosts whose every link is slow, and then single slow pairs.

    A host's best link is compared with the median of the hosts' best links: a slow cable or port shows in all links of
    its host, and in one only of each other host. So up to half of the hosts may be slow and be named.
    """
    broken = [link for link in links if "error" in link]
    whole = [link for link in links if "error" not in link]
    found = _broken(hosts, links, broken)
    if whole and (trip := min(link["round_trip"] for link in whole)) > FAR:
        message = f"a round trip takes {_quantity('round_trip', trip)} at best: within a room it is below 1 ms"
        found.append(warning("network", ", ".join(hosts), message, "train within one room, or see what delays them"))
    if len(hosts) < 3:
        return found
    for key, sign in (("round_trip", 1), ("speed", -1)):
        best: dict[str, float] = {}
        for host in hosts:
            own = [sign * link[key] for link in whole if host in (link["a"], link["b"])]
            if own:
                best[host] = sign * min(own)
        if len(best) < 3:
            continue
        usual = statistics.median_low(best.values()) if sign > 0 else statistics.median_high(best.values())
        slow = {host for host, value in best.items() if _is_slow(key, value, usual)}
        found += [_slow_host(host, key, best[host], usual) for host in hosts if host in slow]
        for link in whole:
            if not {link["a"], link["b"]} & slow and _is_slow(key, link[key], usual):
                found.append(
                    warning(
                        "network",
                        f"{link['a']}, {link['b']}",
                        f"the way between {link['a']} and {link['b']} is slow, their other ways are not: "
                        f"{_quantity(key, link[key])}, usual is {_quantity(key, usual)}",
                        "look at the switches between them, and at what else uses that way",
                    )
                )
    return found


def _is_slow(key: str, value: float, usual: float) -> bool:
    if key == "round_trip":
        return value > SLOW_TRIP * usual and value > usual + TRIP_MARGIN
    return value < SLOW_SPEED * usual


def _slow_host(host: str, key: str, value: float, usual: float) -> Finding:
    what = "round trips take at least" if key == "round_trip" else "at most"
    return problem(
        "network",
        host,
        f"its link is slow: {what} {_quantity(key, value)} to any other host, usual is {_quantity(key, usual)}",
        "look at its cable, port and driver (ethtool INTERFACE), or leave the host out: all others wait for it",
    )


def _quantity(key: str, value: float) -> str:
    return f"{value * 1e3:.3g} ms" if key == "round_trip" else f"{value / 1e6:.3g} MB/s"


def _broken(
    hosts: Sequence[str], links: Sequence[Mapping[str, Any]], broken: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    found = []
    cut = {
        host
        for host in hosts
        if len(hosts) > 2 and all("error" in link for link in links if host in (link["a"], link["b"]))
    }
    for host in sorted(cut, key=list(hosts).index):
        errors = sorted({link["error"] for link in broken if host in (link["a"], link["b"])})
        found.append(
            problem(
                "network",
                host,
                f"no other host can exchange data with it ({'; '.join(errors)})",
                "a firewall, or an address that is not of its data network: processes need all TCP ports between hosts",
            )
        )
    for link in broken:
        if {link["a"], link["b"]} & cut:
            continue
        large = link.get("stage") == "send"
        found.append(
            problem(
                "network",
                f"{link['a']}, {link['b']}",
                f"{link['b']} pings {link['a']}, but larger amounts do not arrive ({link['error']})"
                if large
                else f"{link['b']} cannot exchange data with {link['a']} at {link.get('address')} ({link['error']})",
                "set the same MTU on both and on the switches between; small packets pass"
                if large
                else "a firewall? processes need all TCP ports between hosts, and gloo and NCCL choose free ones",
            )
        )
    return found


def below_peak(devices: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """GPUs far below the peak of their data sheet."""
    found = []
    for each in devices:
        peak = next((value for name, value in PEAK_FLOPS.items() if name in each["kind"]), None)
        fastest = max(each["speeds"].values())
        if each["device"] != "cpu" and peak is not None and fastest < SHARE_OF_PEAK * peak:
            found.append(
                warning(
                    "speed",
                    each["host"],
                    f"its {each['device']} ({each['kind']}) reaches {fastest / 1e12:.0f} TFLOP/s of {peak / 1e12:.0f}",
                    "look at heat and power: nvidia-smi -q -d PERFORMANCE",
                )
            )
    return found


def slow_processes(pairs: Sequence[Mapping[str, Any]], name: Callable[[int], str]) -> list[Finding]:
    """Processes whose best way through NCCL is slow beside the others' best, as :func:`compare_links` has it."""
    ranks = sorted({rank for pair in pairs for rank in (pair["a"], pair["b"])})
    if len(ranks) < 3:
        return []
    best = {rank: max(pair["speed"] for pair in pairs if rank in (pair["a"], pair["b"])) for rank in ranks}
    usual = statistics.median_high(best.values())
    return [
        problem(
            "network",
            name(rank),
            f"process {rank} exchanges {value / 1e9:.2f} GB/s through NCCL at most, usual is {usual / 1e9:.2f}",
            "look at its network card and PCIe link (NCCL_DEBUG=INFO says which way it takes)",
        )
        for rank, value in best.items()
        if value < SLOW_SPEED * usual
    ]


def compare_bf16(machines: Sequence[Mapping[str, Any]], ratios: Mapping[str, float]) -> Iterator[Finding]:
    """``precision: auto`` comes to fp32 for all where bf16 is slow for one."""
    slow = [host for host, ratio in ratios.items() if ratio < 1.1]
    if slow and len(slow) < len(ratios) and not any(map(has_gpus, machines)):
        for host in slow:
            yield warning(
                "precision",
                host,
                "it multiplies bf16 slower than float32, others do not: `precision: auto` comes to fp32 for all",
                "leave it out, or accept fp32",
            )
