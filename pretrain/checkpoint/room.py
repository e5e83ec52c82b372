"""Room on the disk for a checkpoint, and the one error of a save that did not work."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.units import format_bytes

MARGIN_BYTES = 1 << 20
"""Beside a checkpoint: its manifest, the metrics and logs until the next one."""
MARGIN_SHARE = 0.02
"""Pickled names and padding, by which files are larger than their tensors (1.5% for 300,000 parameters)."""


class SaveFailed(Exception):
    """No checkpoint of this step, on any process; those before it are as they were.

    The message says why, how many bytes a checkpoint needs, how many the folder has free, and what is left.
    """

    def __init__(self, reasons: Sequence[str], folder: Path, needed: int, free: int | None, newest: str | None) -> None:
        self.needed, self.free, self.newest = needed, free, newest
        room = "unknown" if free is None else format_bytes(free)
        left = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
        super().__init__(
            f"{'; '.join(reasons)}. A checkpoint needs about {format_bytes(needed)}, {folder} has {room} free; {left}"
        )


def with_margin(size: int) -> int:
    """Free bytes to ask for before writing a checkpoint of ``size`` bytes."""
    return int(size * (1 + MARGIN_SHARE)) + MARGIN_BYTES


def free_bytes(folder: Path) -> int | None:
    """Bytes that this user may still write below ``folder``, which need not exist; None where the system cannot tell
    (some network file systems report a size of 0)."""
    usage = shutil.disk_usage(next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir()))
    return usage.free if usage.total else None
