"""What the attention must reach on a CPU, and whether it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.attention.report import Row

SETTING = {"device": "cpu", "batch": 1, "heads": 12, "head_dim": 64, "threads": 1}
"""The goals are for this, with ModelConfig's landmarks, segments and convolution."""

DTYPES = ("float32", "bfloat16")


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


def judge(rows: Sequence[Row], dtypes: Sequence[str] = DTYPES) -> list[Verdict]:
    """Every goal in every precision of the goals' among ``dtypes``."""
    verdicts = []
    for dtype in (dtype for dtype in DTYPES if dtype in dtypes):
        measured = {(row.form, row.length): row for row in rows if row.dtype == dtype}
        for goal in GOALS:
            row = measured.get((goal.form, goal.length))
            against = None if row is None else next(iter(row.against.values()), None)
            ratio = None if against is None or against.ratio is None else against.ratio.median
            verdicts.append(Verdict(goal.form, dtype, goal.length, goal.limit, ratio))
    return verdicts
