"""Sizes and numbers as people read them."""

from __future__ import annotations

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def format_bytes(size: float) -> str:
    """``310.5 MiB``: one decimal in a power of 1024, and ``512 bytes`` below 1 KiB."""
    power = min((max(int(size), 1).bit_length() - 1) // 10, len(_UNITS))
    return f"{size:.0f} bytes" if power == 0 else f"{size / 1024**power:.1f} {_UNITS[power - 1]}"


def count(number: int, what: str, several: str = "") -> str:
    """``1 step``, ``1,234 steps``; ``several``: the plural that is not formed with an s."""
    return f"{number:,} {what if number == 1 else several or what + 's'}"


def about(seconds: float) -> str:
    """A time that is not known exactly, in the unit that fits it: "about 40 s", "about 9 min", "about 2.5 h"."""
    if seconds < 90:
        return f"about {max(seconds, 1):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
