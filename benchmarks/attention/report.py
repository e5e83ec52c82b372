"""Rows of results, as a Markdown table and as JSON, and the goals that the attention must reach on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import Any

from benchmarks import common
from benchmarks.common import markdown
from eval.tasks.efficiency.measure import Spread

SCHEMA = 1
GOAL_SETTING = {"device": "cpu", "batch": 1, "heads": 12, "head_dim": 64, "threads": 1}
"""The goals are for this, with ModelConfig's landmarks, segments and convolution."""

GOAL_DTYPES = ("float32", "bfloat16")


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
    growth: Sequence[dict[str, Any]],
    complete: bool,
) -> None:
    """Everything in one file; ``complete`` is false while lengths are still to come."""
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "complete": complete,
        "provenance": provenance,
        "settings": settings,
        "peak_flops_per_second": peaks,
        "rows": [asdict(row) for row in rows],
        "stages": [asdict(stage) for stage in stages],
        "goals": list(goals),
        "growth": list(growth),
    }
    common.write_json(path, content, tell=False)


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


@dataclass(frozen=True)
class Growth:
    """How a form's time grows with the length: as n to the power of ``slope``, by least squares of the logarithms."""

    form: str
    dtype: str
    shortest: int
    longest: int
    slope: float


def growth(rows: Sequence[Row]) -> list[Growth]:
    """Of each form and precision that was measured at two lengths or more."""
    times: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if row.total_seconds is not None:
            times.setdefault((row.form, row.dtype), {})[row.length] = row.total_seconds.median
    found = []
    for (form, dtype), by_length in times.items():
        if len(by_length) > 1:
            slope = linear_regression([math.log(n) for n in by_length], [math.log(t) for t in by_length.values()]).slope
            found.append(Growth(form, dtype, min(by_length), max(by_length), slope))
    return found


def growth_table(found: Sequence[Growth]) -> str:
    """Markdown: one line for each form."""
    lines = [[x.dtype, x.form, f"{x.shortest} to {x.longest}", f"n^{x.slope:.2f}"] for x in found]
    return markdown(["precision", "form", "n", "time grows as"], lines)


def _ratio(spread: Spread | None, quartiles: bool = True) -> str:
    if spread is None:
        return "exact was skipped"
    return f"{spread.median:.3f}" + (f" ({spread.q1:.3f} to {spread.q3:.3f})" if quartiles else "")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


@dataclass(frozen=True)
class Goal:
    """Forward and backward take at most ``limit`` of exact attention's time."""

    form: str
    length: int
    limit: float


# With the convolution: what a default model runs.
GOALS = (
    Goal("nystrom+conv", 1024, 0.30),
    Goal("nystrom+conv", 4096, 0.07),
    Goal("nystrom+conv", 8192, 0.03),
    Goal("causal-nystrom+conv", 1024, 1.0),
    Goal("causal-nystrom+conv", 4096, 0.20),
    Goal("causal-nystrom+conv", 16384, 0.06),
)


@dataclass(frozen=True)
class Verdict:
    """A goal for one precision. ``ratio`` is the measured median, None where it was not measured."""

    form: str
    dtype: str
    length: int
    limit: float
    ratio: float | None

    @property
    def met(self) -> bool | None:
        """None: not measured."""
        return None if self.ratio is None else self.ratio <= self.limit

    def __str__(self) -> str:
        what = f"{self.form} {self.dtype} n={self.length}: "
        if self.ratio is None:
            return f"{what}not measured, the goal is {self.limit:.2f}"
        return f"{what}{self.ratio:.3f} of exact, the goal is {self.limit:.2f}: {'met' if self.met else 'not met'}"


def judge(rows: Sequence[Row], dtypes: Sequence[str] = GOAL_DTYPES) -> list[Verdict]:
    """Every goal in every precision of the goals' among ``dtypes``."""
    verdicts = []
    for dtype in (dtype for dtype in GOAL_DTYPES if dtype in dtypes):
        measured = {(row.form, row.length): row for row in rows if row.dtype == dtype}
        for goal in GOALS:
            row = measured.get((goal.form, goal.length))
            against = None if row is None else next(iter(row.against.values()), None)
            ratio = None if against is None or against.ratio is None else against.ratio.median
            verdicts.append(Verdict(goal.form, dtype, goal.length, goal.limit, ratio))
    return verdicts
