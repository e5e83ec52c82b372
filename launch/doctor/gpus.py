"""NVIDIA GPUs of this machine and who uses them, from ``nvidia-smi``: no context is made, so nothing is occupied."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from typing import Any

FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
)
SECONDS = 20.0
"""Limit of one call: a driver that is stuck answers never."""
MIB = 1 << 20


def find_gpus() -> dict[str, Any]:
    """``devices`` (see :func:`parse_devices`), ``error``, and torch's ``cuda``, ``nccl`` and number of ``usable`` ones.

    A machine without ``nvidia-smi`` has no devices and no error.
    """
    found: dict[str, Any] = {"devices": [], "error": None, **_of_torch()}
    if shutil.which("nvidia-smi") is None:
        return found
    try:
        devices = parse_devices(_ask(f"--query-gpu={','.join(FIELDS)}"))
        apps = parse_processes(_ask("--query-compute-apps=gpu_uuid,pid,process_name,used_memory"))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        output = getattr(error, "stdout", None) or getattr(error, "stderr", None) or str(error)
        found["error"] = " ".join(str(output).split())[:200]
        return found
    for device in devices:
        device["processes"] = [app for app in apps if app["uuid"] == device["uuid"]]
    found["devices"] = visible(devices, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return found


def _ask(query: str) -> str:
    return subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    ).stdout


def parse_devices(text: str) -> list[dict[str, Any]]:
    """The answer to ``--query-gpu`` with :data:`FIELDS`; memory in bytes, ``ecc_errors`` None where not counted."""
    devices = []
    for row in _rows(text, len(FIELDS)):
        index, uuid, name, driver, total, used, errors = row
        devices.append(
            {
                "index": int(index),
                "uuid": uuid,
                "name": name,
                "driver": driver,
                "memory": int(total) * MIB,
                "used": int(used) * MIB,
                "ecc_errors": int(errors) if errors.isdigit() else None,
                "processes": [],
            }
        )
    return devices


def parse_processes(text: str) -> list[dict[str, Any]]:
    """The answer to ``--query-compute-apps``: uuid of the GPU, pid, name, memory in bytes (None in a container)."""
    return [
        {"uuid": uuid, "pid": int(pid), "name": name, "memory": int(memory) * MIB if memory.isdigit() else None}
        for uuid, pid, name, memory in _rows(text, 4)
    ]


def _rows(text: str, columns: int) -> list[list[str]]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    for row in rows:
        if len(row) != columns:
            raise ValueError(f"nvidia-smi answered {', '.join(row)!r}")
    return rows


def visible(devices: list[dict[str, Any]], setting: str | None) -> list[dict[str, Any]]:
    """The devices that CUDA_VISIBLE_DEVICES leaves, by number or the beginning of the uuid; all where it is unset."""
    if setting is None:
        return devices
    words = [word.strip() for word in setting.split(",") if word.strip()]
    return [
        device
        for device in devices
        if any(
            word == str(device["index"]) or (not word.isdigit() and device["uuid"].startswith(word)) for word in words
        )
    ]


def _of_torch() -> dict[str, Any]:
    import torch

    nccl = None
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "usable": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    }
