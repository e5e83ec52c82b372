"""Results as text in the terminal."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.results.caution import few_items as caution_of
from eval.results.records import samples_path
from eval.results.schema import Metric, ModelInfo, Result, Table
from eval.task import described


def print_table(results: Sequence[tuple[str, Result, bool]], folder: Path) -> None:
    """Suite, metric, value and what it is over, one a line; below, what the tasks themselves show of their results."""
    rows: list[tuple[str, str, str, str]] = []
    for name, result, _ in results:
        if described(result.task).is_gate:
            rows.append((name, *verdict(result), ""))
            continue
        for place, (metric, value) in enumerate(result.metrics.items()):
            rows.append((name if place == 0 else "", metric.replace("_", " "), describe(value), value.over))
    print("\n" + aligned([("suite", "metric", "value", "over"), *rows]))
    for name, result, _ in results:
        lines = described(result.task).lines(result, samples_path(folder / f"{name}.json"))
        if lines:
            print("\n".join([f"\n{name}", *lines]))


def as_answer(
    model: ModelInfo | None,
    folder: Path,
    results: Sequence[tuple[str, Result, bool]],
    failures: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """The same for ``--json``: the model, and of each suite its file, its metrics, and whether it was computed now."""
    return {
        "model": asdict(model) if model is not None else None,
        "folder": str(folder),
        "results": [
            {
                "suite": name,
                "task": result.task,
                "file": str(folder / f"{name}.json"),
                "computed": fresh,
                "gate": result.gate,
                "metrics": {metric: asdict(value) for metric, value in result.metrics.items()},
            }
            for name, result, fresh in results
        ],
        "failed": [{"suite": name, "error": error} for error, names in failures.items() for name in names],
    }


def verdict(result: Result) -> tuple[str, str]:
    """What the validity gate says: "passed" with the number of its checks, or "FAILED" with that of those that did."""
    metric = result.metrics["passed"]
    checks = metric.n or 0
    if metric.value == 1.0:
        return "passed", f"all {checks} checks"
    failed = sum(not row[3] for table in result.tables[:1] for row in table.rows)
    return "FAILED", f"{failed} of {checks} checks"


def few_items(results: Sequence[tuple[str, Result, bool]]) -> list[str]:
    """A warning for each result whose intervals are over few items."""
    return [f"{name}: {caution}" for name, result, _ in results if (caution := caution_of(result))]


NARROWEST = 24
"""Columns that the last column of a table has at least, however narrow the terminal is."""


def terminal_width() -> int | None:
    """Columns of the terminal that standard output goes to; None where it goes to a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def aligned(rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Rows as columns of text, the first row underlined; the last column is wrapped so that ``width`` holds all."""
    if width is not None:
        before = sum(max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]) - 1))
        rows = [part for row in rows for part in _wrapped(row, max(width - before, NARROWEST))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _wrapped(row: Sequence[str], width: int) -> list[tuple[str, ...]]:
    """A row as several, whose last cells are the lines of its last one."""
    first, *others = textwrap.wrap(row[-1], width, break_on_hyphens=False, break_long_words=False) or [""]
    empty = ("",) * (len(row) - 1)
    return [(*row[:-1], first), *((*empty, line) for line in others)]


def table_lines(table: Table, width: int = 118) -> list[str]:
    """A table of a result as lines: its columns aligned, its note below. What has no value is left empty."""
    cells = [["" if v is None else plain(v) if isinstance(v, float) else str(v) for v in row] for row in table.rows]
    return [*aligned([table.columns, *cells]).split("\n"), *textwrap.wrap(table.note, width)]


def describe(metric: Metric) -> str:
    """A metric as text: value, ± standard deviation over seeds, 95% interval."""
    if math.isnan(metric.value):
        return "not finite"
    text = plain(metric.value)
    if metric.std is not None:
        text += f" ± {metric.std:.4f}"
    if metric.low is not None and metric.high is not None and not math.isnan(metric.low + metric.high):
        text += f" [{plain(metric.low)}, {plain(metric.high)}]"
    return text


def plain(value: float) -> str:
    """Four decimals, or five digits of a large number."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.5g}"
