"""The report as text: findings first, then tables, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from launch.doctor.checks import cores, has_gpus
from launch.doctor.compare import clock_offsets

WIDTH = 100
MOST_LINKS = 28
"""Pairs in the table, which is all of eight hosts; of more hosts the slowest ones."""
GIB = 1 << 30


def render(report: Mapping[str, Any]) -> str:
    """The text of what :func:`launch.doctor.session.examine` found."""
    parts = [_summary(report), *(_finding(each) for each in report["findings"])]
    machines = report.get("machines", [])
    if machines:
        parts.append(_hosts(machines))
        parts.append(_software(machines))
    if report.get("devices"):
        parts.append(_devices(report["devices"]))
    if report.get("folders"):
        parts.append(_folders(report))
    if report.get("run"):
        parts.append(_run(report["run"]))
    if report.get("links"):
        parts.append(_links(report["links"], report.get("pairs_left_out", 0)))
        parts.append(_clocks(machines, report["links"]))
    if report.get("group"):
        parts.append(_group(report["group"]))
    return "\n".join(part for part in parts if part)


def _summary(report: Mapping[str, Any]) -> str:
    def count(level: str) -> str:
        number = sum(each["level"] == level for each in report["findings"])
        return f"{number} {level}" + ("" if number == 1 else "s")

    hosts = len(report.get("machines", []))
    said = "a run must not start" if report["status"] else "a run may start"
    what = f"{hosts} host" + ("" if hosts == 1 else "s")
    return f"{count('problem')}, {count('warning')}: {said}  ({what} examined in {report['seconds']:.0f} s)\n"


def _finding(finding: Mapping[str, str]) -> str:
    text = f"{finding['level'].upper():<8} {finding['where']}: {finding['message']}"
    lines = textwrap.wrap(text, WIDTH, subsequent_indent=" " * 9, break_long_words=False)
    lines += textwrap.wrap(
        f"-> {finding['remedy']}", WIDTH, initial_indent=" " * 9, subsequent_indent=" " * 12, break_long_words=False
    )
    return "\n".join(lines)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a heading; the first column to the left, the others to the right, the last one cut to fit."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        words = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(words).rstrip())
    return "\n".join(["", title, *(line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in lines)])


def _hosts(machines: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for each in machines:
        memory, shared, route = each["memory"], each["shared_memory"], each["route"] or {}
        gpus = each["gpus"]["devices"]
        interface = next((one for one in each["interfaces"] if one["name"] == route.get("interface")), None)
        rows.append(
            [
                each["host"],
                f"{cores(each):g}/{each['cpu']['cores']}",
                f"{memory['available'] / GIB:.1f}/{min(memory['total'], memory['limit'] or memory['total']) / GIB:.1f}",
                f"{shared['free'] / GIB:.1f}" if shared else "none",
                str(each["limits"]["open_files"][0] or "unlimited"),
                f"{len(gpus)} {gpus[0]['name']}" if gpus else "none",
                f"{interface['name']} mtu {interface['mtu']}" if interface else "-",
                _bf16(each),
            ]
        )
    head = ["host", "cores", "memory GiB", "/dev/shm GiB", "open files", "GPUs", "interface", "precision: auto"]
    return table("Hosts (cores: allowed/there; memory: available/allowed)", head, rows)


def _bf16(machine: Mapping[str, Any]) -> str:
    if machine["bf16"] is None:
        return "by GPU" if has_gpus(machine) else "-"
    return f"{'bf16' if machine['bf16'] >= 1.1 else 'fp32'} (bf16 x{machine['bf16']:.2g})"


def _software(machines: Sequence[Mapping[str, Any]]) -> str:
    first = machines[0]
    facts = {key.removeprefix("package "): value for key, value in first["software"].items() if value}
    facts |= {"CUDA": first["gpus"]["cuda"], "NCCL": first["gpus"]["nccl"], "kernel": first["kernel"]}
    if first["gpus"]["devices"]:
        facts["driver"] = first["gpus"]["devices"][0]["driver"]
    said = ", ".join(f"{name} {value}" for name, value in facts.items() if value)
    kinds = dict.fromkeys(f"{each['cpu']['model']}: {', '.join(each['cpu']['instructions'])}" for each in machines)
    lines = ["", f"Software (of {first['host']})", *textwrap.wrap(said, WIDTH - 2), "", "Processors", *kinds]
    return "\n".join(line if not line or line.startswith(("Software", "Processors")) else f"  {line}" for line in lines)


def _devices(devices: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for each in devices for name in each["speeds"]))
    rows = [
        [
            each["host"],
            each["device"],
            *(_flops(each["speeds"].get(name)) for name in names),
            each["kind"],
        ]
        for each in devices
    ]
    return table("Products of matrices, TFLOP/s", ["host", "device", *names, "kind"], rows)


def _flops(speed: float | None) -> str:
    return "-" if speed is None else f"{speed / 1e12:.3g}"


def _folders(report: Mapping[str, Any]) -> str:
    seen = report.get("shared", {}).get("seconds", {})
    rows = []
    for each in report["folders"]:
        delay = seen.get(each["host"]) if each["role"] == "run" else None
        rows.append(
            [
                each["host"],
                "read" if each["role"] == "shards" else "write",
                f"{each['speed'] / 1e6:.0f}" if "speed" in each else "-",
                f"{each['free'] / GIB:.1f}" if each["free"] is not None else "?",
                f"{delay:.2f}" if delay is not None else "-",
                each["path"],
            ]
        )
    head = ["host", "", "MB/s", "free GiB", "seen after s", "folder"]
    return table("Folders (writing with fsync)", head, rows)


def _run(run: Mapping[str, Any]) -> str:
    checkpoint = run["checkpoint"]
    size = f"a checkpoint takes {checkpoint / GIB:.3f} GiB" if checkpoint else "the size of a checkpoint is not known"
    return f"\nRun {run['name']} on {run['processes']} process(es): {size}"


def _links(links: Sequence[Mapping[str, Any]], left_out: int) -> str:
    shown, title = links, "Between hosts (TCP; > is from the first to the second)"
    if len(links) > MOST_LINKS:
        shown = sorted(links, key=lambda each: each.get("speed", 0.0))[:MOST_LINKS]
        title += f": the slowest {MOST_LINKS} of {len(links)} pairs"
    if left_out:
        title += f"; {left_out} pairs were not measured"
    rows = []
    for each in shown:
        # The second one measured: it received what the first sent.
        numbers = [each.get(key) for key in ("round_trip", "round_trip_median", "receive", "send")]
        scales = (1e3, 1e3, 1e-6, 1e-6)
        cells = [
            "-" if number is None else f"{number * scale:.3g}" for number, scale in zip(numbers, scales, strict=True)
        ]
        rows.append([f"{each['a']} - {each['b']}", *cells, each.get("error", "")])
    return table(title, ["pair", "least ms", "median ms", "> MB/s", "< MB/s", ""], rows)


def _clocks(machines: Sequence[Mapping[str, Any]], links: Sequence[Mapping[str, Any]]) -> str:
    hosts = [each["host"] for each in machines]
    rows = [[host, f"{offset * 1e3:+.2f}", f"{error * 1e3:.2f}"] for host, offset, error in clock_offsets(hosts, links)]
    return table(f"Clocks beside that of {hosts[0]}", ["host", "ahead ms", "± ms"], rows) if rows else ""


def _group(group: Mapping[str, Any]) -> str:
    rows = [
        [_bytes(each["bytes"]), f"{each['seconds'] * 1e3:.3g}", f"{each['bus'] / 1e6:.4g}"]
        for each in group["all_reduce"]
    ]
    title = f"All-reduce over {group['processes']} processes ({group['backend']})"
    return table(title, ["size", "ms", "bus MB/s"], rows)


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:g} {unit}"
    return f"{number} B"
