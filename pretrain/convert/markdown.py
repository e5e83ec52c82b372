"""Small pieces of Markdown, in which text from a run's files cannot become anything but text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells hold one line each."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def code(text: Any) -> str:
    """``text`` as code on one line, whatever characters it has."""
    return "`" + " ".join(str(text).replace("`", "'").split()) + "`"


def block(text: str, language: str = "python") -> str:
    """A block of code."""
    return f"```{language}\n{text.strip()}\n```"


def number(value: Any, *, padded: bool = False) -> str:
    """Four significant digits (``padded``: trailing zeros too), with thousands from 1,000 on.

    What is not a finite number is "unknown".
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "unknown"
    if isinstance(value, int) or 1e3 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:#.4g}".rstrip(".") if padded and value else f"{value:.4g}"


def listed(names: Sequence[str], most: int) -> str:
    """Names as code, commas between them; of more than ``most`` the first ones, and how many are left."""
    shown = ", ".join(code(name) for name in names[:most])
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")
