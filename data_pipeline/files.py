"""Small file operations that survive a crash: a file is there whole under its name, or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

TMP_SUFFIX = ".tmp"


def write_atomic(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write ``data`` to ``path.tmp``, fsync, rename: a reader sees the old file or the new one, never half of one.

    ``shared``: several processes may be writing this file at once; each then writes to a temporary name of its own.
    A write that fails (a full disk) leaves no temporary file.
    """
    tmp = path.with_name(path.name + (f".{secrets.token_hex(4)}" if shared else "") + TMP_SUFFIX)
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
    except OSError:
        tmp.unlink(missing_ok=True)
        raise
    publish(tmp, path)


def publish(tmp: Path, path: Path) -> None:
    """Rename a finished, fsynced file to its name and make the rename itself durable."""
    os.replace(tmp, path)
    fsync_folder(path.parent)


def share_as_umask_says(path: Path) -> None:
    """Give a new file the rights that ``open`` would have given it: safetensors makes files that only we can read."""
    try:
        status = Path("/proc/self/status").read_text()
        umask = int(next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8)
    except (OSError, StopIteration):  # not Linux: the only way to read it is to set it
        umask = os.umask(0o077)
        os.umask(umask)
    path.chmod(0o666 & ~umask)


def fsync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
