"""The machine and the code that a run is on: versions, processor, what a device can reach. Imports no other part."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config import TelemetryConfig
    from pretrain.distributed.world import World

# Dense bf16 (fp16 on V100) tensor-core peaks from the vendors' data sheets, FLOP/s; matched within the device's name.
PEAK_FLOPS = {
    "B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12,
    "A30": 165e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "V100": 125e12, "T4": 65e12,
    "4090": 165e12, "3090": 71e12,
}  # fmt: skip


PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "datasets", "pydantic", "wandb")


def software() -> dict[str, Any]:
    """What must be the same on all machines of a run: Python, packages, and a hash of the code that trains."""
    folder, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted(path for part in ("data_pipeline", "pretrain") for path in (folder / part).rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    versions = {f"package {name}": _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions, "code": digest.hexdigest()[:16]}


def peak_flops(config: TelemetryConfig, device_name: str | None) -> float | None:
    """FLOP/s one device can reach: the configuration's, else a known GPU's, else None (MFU is then null)."""
    if config.peak_flops is not None:
        return config.peak_flops
    if device_name is None:
        return None
    return next((value for name, value in PEAK_FLOPS.items() if name in device_name), None)


def environment(world: World) -> dict[str, Any]:
    """What a reader needs to repeat the run: versions, machine, command."""
    import torch

    return {
        "command": sys.argv,
        "working_directory": os.getcwd(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads_per_process": torch.get_num_threads(),
        "world_size": world.world_size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "code": code_version(),
    }


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor as the system names it."""
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def code_version() -> dict[str, Any] | None:
    """The commit that the code is at, and whether files of it were changed since; None outside a git checkout."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():  # else a run folder's or an environment's own repository would be taken for it
        return None
    words = ("rev-parse HEAD", "status --porcelain --untracked-files=no")
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *word.split()], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for word in words
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed_since": bool(changes)}


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
