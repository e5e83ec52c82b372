"""Results as text in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from eval.results.schema import Metric, Result
from eval.results.statistics import FEW


def print_table(results: Sequence[tuple[str, Result, bool]]) -> None:
    """Suite, metric and value, one a line."""
    rows = [
        (name if first else "", metric.replace("_", " "), describe(value))
        for name, result, _ in results
        for first, (metric, value) in zip([True] + [False] * len(result.metrics), result.metrics.items(), strict=False)
    ]
    print("\n" + aligned([("suite", "metric", "value"), *rows]))


def few_items(results: Sequence[tuple[str, Result, bool]]) -> list[str]:
    """A warning for each result whose intervals are over few items."""
    return [
        f"{name}: {result.records['count']} items are few: its intervals are wide, and only roughly of 95%"
        for name, result, _ in results
        if result.estimators and 0 < result.records["count"] < FEW
    ]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns of text, the first row underlined."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def describe(metric: Metric) -> str:
    """A metric as text: value, ± standard deviation, 95% interval."""
    if math.isnan(metric.value):
        return "not finite"
    text = _plain(metric.value)
    if metric.std is not None:
        text += f" ± {metric.std:.4f} (n={metric.n})"
    if metric.low is not None and metric.high is not None and not math.isnan(metric.low + metric.high):
        text += f" [{_plain(metric.low)}, {_plain(metric.high)}]"
    return text


def _plain(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.5g}"
