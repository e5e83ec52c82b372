"""``python -m launch.host_report JSON``: what a host says of itself before a run is started on it, as a line of JSON.

It is run on all hosts at the same time by :mod:`launch.host_checks`, which judges. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from data_pipeline.shards.manifest import MANIFEST_FILE
from launch.network import free_ports, interface_addresses, meet_as_first, meet_first
from pretrain.finish import LAUNCH_ID
from pretrain.machine import software

MARK = "nystrom host report: "
"""Stands before the JSON: shells of other hosts print things of their own."""
GPU_SECONDS = 30
HASHED_BYTES = 16 * 2**20


def report(asked: dict[str, Any]) -> dict[str, Any]:
    """What the launcher asked for: ``paths`` to look at, the ``run_dir`` with a file ``token``, and ``launches``.

    ``launches`` are ids of earlier starts of the run, of which no process should be left.
    """
    run_dir = Path(asked["run_dir"])
    return {
        "host": socket.gethostname(),
        "machine": machine(),
        "software": {**software(), "code of the launcher": _launcher_code()},
        "clock": time.time(),
        "paths": {path: look_at(Path(path)) for path in asked["paths"]},
        "token": _text(run_dir / asked["token"]),
        "writable": os.access(run_dir, os.W_OK),
        "free_bytes": _free_bytes(run_dir),
        "gpus": gpu_memory(),
        "launches": living_launches(asked["launches"]),
        "connection": os.environ.get("SSH_CONNECTION", ""),
        "interfaces": interface_addresses(),
        "ports": free_ports(),
    }


def machine() -> str:
    """The same for two names of one machine: when its system was started, and its network."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/net"))
    return " ".join(parts) or socket.gethostname()


def look_at(path: Path) -> str:
    """What is at a path, in a word that differs for another file or folder: a folder's is that of its manifest."""
    try:
        if path.is_dir():
            manifest = path / MANIFEST_FILE
            return f"folder {_hash(manifest)}" if manifest.is_file() else "folder"
        return f"file {_hash(path)}"
    except FileNotFoundError:
        return "nothing"
    except OSError as error:
        return f"unreadable: {error.strerror or error}"


def _launcher_code() -> str:
    """A hash of the code that starts runs; that of the code that trains is in :func:`software`."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(HASHED_BYTES))
    return f"{path.stat().st_size} {digest.hexdigest()[:16]}"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _free_bytes(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def gpu_memory() -> list[int]:
    """MiB in use of each GPU of this machine; [] without GPUs or the vendor's program."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=GPU_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [int(line) if line.strip().isdigit() else 0 for line in lines]  # [N/A] where it shares the host's memory


def living_launches(ids: Sequence[str]) -> list[str]:
    """Those of these launches that still have processes here."""
    found = set()
    for process in psutil.process_iter() if ids else ():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.environ().get(LAUNCH_ID))
    return [each for each in ids if each in found]


def meet(asked: dict[str, Any]) -> dict[str, Any]:
    """Try the network: the first host listens at ``address`` and ``port`` for ``seconds``, the others come there."""
    address, port, seconds = asked["address"], asked["port"], asked["seconds"]
    if asked["first"] == machine():
        return {"problem": meet_as_first(address, port, asked["others"], seconds)}
    return {"problem": meet_first(address, port, seconds)}


def parse(output: str) -> dict[str, Any] | None:
    """The report in what a host wrote; None if there is none."""
    for line in output.splitlines():
        _, mark, text = line.partition(MARK)
        if mark:
            try:
                found = json.loads(text)
            except ValueError:
                return None
            return found if isinstance(found, dict) else None
    return None


def main(words: Sequence[str]) -> int:
    """Print the report that the only argument asks for."""
    asked = json.loads(words[0])
    answer = meet(asked) if "address" in asked else report(asked)
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
