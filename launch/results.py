"""The results that :func:`launch.api.evaluate` gives back, as text and as a table of a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from data_pipeline.html import html_table

if TYPE_CHECKING:
    from eval.results.schema import Result


class MetricRow(TypedDict):
    """A metric of a suite; ``low`` and ``high`` bound its 95% interval, ``n`` counts what ``unit`` names."""

    suite: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    unit: str


class Results(Mapping[str, "Result"]):
    """The results of suites by name, a ``Mapping`` of :class:`eval.results.schema.Result`.

    ``results["lm"].metrics["perplexity"]`` has ``value``, ``low`` and ``high`` (95% interval), ``n`` and ``unit``.
    ``skipped`` has the reason of each suite that could not be run; asking for one is a ``KeyError`` that says it.
    ``folder`` is where the results are kept, a JSON file for each suite.
    """

    folder: Path
    """Where the results are kept, a JSON file for each suite."""
    skipped: dict[str, str]
    """The reason of each suite that could not be run, by name; empty where all could."""

    def __init__(self, results: Mapping[str, Result], folder: Path, skipped: Mapping[str, str] | None = None) -> None:
        """``folder`` is where they are kept, ``skipped`` the reasons of suites that could not be run."""
        self._results, self.folder, self.skipped = dict(results), folder, dict(skipped or {})

    def __getitem__(self, name: str) -> Result:
        if name in self.skipped:
            raise KeyError(f"suite {name} could not be run: {self.skipped[name]}")
        return self._results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __contains__(self, name: object) -> bool:
        return name in self._results

    def rows(self) -> list[MetricRow]:
        """A row for each metric: suite, metric, value, low and high (95%), n, unit. For ``pandas.DataFrame``."""
        return [
            {"suite": suite, "metric": name, "value": m.value, "low": m.low, "high": m.high, "n": m.n, "unit": m.unit}
            for suite, result in self.items()
            for name, m in result.metrics.items()
        ]

    def _table(self) -> list[tuple[str, str, str, str]]:
        from eval.console import describe, verdict
        from eval.task import described

        rows = [("suite", "metric", "value", "over")]
        for suite, result in self.items():
            if described(result.task).is_gate:
                rows.append((suite, *verdict(result), ""))
                continue
            for name, metric in result.metrics.items():
                rows.append((suite, name.replace("_", " "), describe(metric), metric.over))
        return rows

    def __repr__(self) -> str:
        """The table that ``nystrom eval`` prints, and the suites that could not be run."""
        from eval.console import aligned

        lines = [aligned(self._table())] if self._results else ["no results"]
        return "\n".join([*lines, *(f"{name} could not be run: {reason}" for name, reason in self.skipped.items())])

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        head, *rows = self._table()
        skipped = html_table(("could not be run", "why"), self.skipped.items()) if self.skipped else ""
        return (html_table(head, rows) if rows else "<p>no results</p>") + skipped
