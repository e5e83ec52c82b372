"""Sizes and numbers as people read them."""

from __future__ import annotations

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def format_bytes(size: float) -> str:
    """``310.5 MiB``: one decimal in a power of 1024, and ``512 bytes`` below 1 KiB."""
    power = min((max(int(size), 1).bit_length() - 1) // 10, len(_UNITS))
    return f"{size:.0f} bytes" if power == 0 else f"{size / 1024**power:.1f} {_UNITS[power - 1]}"


def count(number: int, what: str) -> str:
    """``1 step``, ``1,234 steps``."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")
