"""Sizes in words."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """``1.5 GB``: three digits, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
