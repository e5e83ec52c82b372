"""Rows of results, as a Markdown table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.presentation import markdown
from data_pipeline.files import write_atomic
from eval.tasks.efficiency.measure import Spread

SCHEMA = 1


@dataclass(frozen=True)
class Against:
    """One form beside a reference, at the same length in the same rounds."""

    ratio: Spread | None
    """Of the time of forward and backward, round by round; None where the reference was not measured."""
    forward_ratio: Spread | None
    flop_ratio: float
    """Of the arithmetic: the ratio if both ran at the same speed."""


@dataclass(frozen=True)
class Row:
    """One form at one length in one precision."""

    form: str
    title: str
    dtype: str
    length: int
    skipped: str | None
    """Why there are no numbers."""
    rounds: int = 0
    total_seconds: Spread | None = None
    forward_seconds: Spread | None = None
    forward_flops: float | None = None
    peak_share: float | None = None
    """3 times the forward pass's arithmetic per second, as a share of the measured peak."""
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    against: dict[str, Against] = field(default_factory=dict)
    """By the reference's name, the main one first."""


@dataclass(frozen=True)
class Stage:
    """One stage of one form; the shares need not add up to 1, as each stage runs alone and with its data in cache."""

    form: str
    stage: str
    dtype: str
    length: int
    rounds: int
    seconds: Spread
    share: float
    """Of the median time of the whole form."""


def write_json(
    path: Path,
    *,
    provenance: dict[str, Any],
    settings: dict[str, Any],
    peaks: dict[str, float],
    rows: Sequence[Row],
    stages: Sequence[Stage],
    goals: Sequence[dict[str, Any]],
    complete: bool,
) -> None:
    """Everything in one file; ``complete`` is false while lengths are still to come."""
    content = {
        "schema": SCHEMA,
        "complete": complete,
        "provenance": provenance,
        "settings": settings,
        "peak_flops_per_second": peaks,
        "rows": [asdict(row) for row in rows],
        "stages": [asdict(stage) for stage in stages],
        "goals": list(goals),
    }
    write_atomic(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line for each form and reference."""
    on_gpu = any(row.peak_bytes is not None for row in rows)
    head = ["precision", "n", "form", "time / exact (quartiles)", "arithmetic / exact", "exact is", "forward / exact"]
    head += ["ms", "of peak", "kept, MiB", *(["peak, MiB"] if on_gpu else []), "rounds"]
    lines = []
    for row in rows:
        start = [row.dtype, str(row.length), row.form]
        if row.skipped is not None or row.total_seconds is None:
            lines.append([*start, f"skipped: {row.skipped}", *[""] * (len(head) - 4)])
            continue
        memory = [_mib(row.kept_bytes), *([_mib(row.peak_bytes)] if on_gpu else [])]
        end = [f"{1000 * row.total_seconds.median:.3g}", _percent(row.peak_share), *memory, str(row.rounds)]
        for name, against in row.against.items():
            comparison = [
                _ratio(against.ratio),
                f"{against.flop_ratio:.3f}",
                name,
                _ratio(against.forward_ratio, False),
            ]
            lines.append([*start, *comparison, *end])
    return markdown(head, lines)


def stage_table(stages: Sequence[Stage]) -> str:
    """Markdown: one line for each stage."""
    lines = [
        [x.dtype, str(x.length), x.form, x.stage, _percent(x.share), f"{1000 * x.seconds.median:.3g}"] for x in stages
    ]
    return markdown(["precision", "n", "form", "stage by itself", "of the form's time", "ms"], lines)


def _ratio(spread: Spread | None, quartiles: bool = True) -> str:
    if spread is None:
        return "exact was skipped"
    return f"{spread.median:.3f}" + (f" ({spread.q1:.3f} to {spread.q3:.3f})" if quartiles else "")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"
