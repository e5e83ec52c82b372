"""Which results are in doubt, which is the best of them, and by how much two differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import UserError
from eval.report.runs import Run
from eval.results.comparable import obstacles, same_unit
from eval.results.records import read_records
from eval.results.schema import Metric, Result, Table
from eval.results.statistics import paired_bootstrap
from eval.task import described, gate
from eval.tasks.validity import CHECKS_TABLE

# Pairs of records above which a page would take minutes to write.
MAX_PAIRS = 100_000


@dataclass(frozen=True)
class Member:
    """One run's result of a suite: ``index`` is the run's place on the page, ``doubt`` why it proves nothing.

    ``outdated``: that the run has been trained on since, and how far it was when it was scored.
    """

    index: int
    run: Run
    result: Result
    doubt: str = ""

    @property
    def outdated(self) -> str:
        """See the class; "" where the run is as it was."""
        return self.run.outdated(self.result)


@dataclass(frozen=True)
class Difference:
    """``member`` minus ``first`` in one metric; ``verdict``: "better", "worse", "different" or "undecided"."""

    metric: str
    first: Member
    member: Member
    value: float
    low: float
    high: float
    p: float
    n: int
    verdict: str


def gate_result(run: Run) -> Result | None:
    """What the validity gate found."""
    return run.results.get(gate().name)


def failed_checks(run: Run) -> list[str]:
    """The names of the validity checks that the run failed."""
    table = checks_table(run)
    return [str(row[0]) for row in table.rows if not row[3]] if table else []


def checks_table(run: Run) -> Table | None:
    """The checks of the validity gate (check, measured, bound, passed, detail), or None if there is no result."""
    result = gate_result(run)
    table = result.table(CHECKS_TABLE) if result else None
    return table if table and len(table.columns) == 5 else None


def doubt(run: Run, result: Result) -> str:
    """Why a score of this run is not to be trusted, or "": the gate failed, whether --force was given or not."""
    if described(result.task).is_gate:
        return ""
    if result.gate == "forced":
        return "forced: the validity gate failed"
    validity = gate_result(run)
    same = validity is not None and validity.model.identity == result.model.identity and result.model.weights_hash != ""
    return "the validity gate failed" if same and failed_checks(run) else ""


def best_of(metrics: Sequence[Metric | None]) -> int | None:
    """Place of the best value; None with fewer than two, or where its interval meets another's.

    The interval is the metric's own, else one standard deviation to each side, else the value alone.
    """
    found = [(m, i) for i, m in enumerate(metrics) if m and math.isfinite(m.value)]
    if len(found) < 2 or found[0][0].higher_is_better is None:
        return None
    up = found[0][0].higher_is_better
    found.sort(key=lambda pair: pair[0].value, reverse=up)
    (first, place), *others = found
    low, high = _span(first)
    clear = all(low > _span(other)[1] if up else high < _span(other)[0] for other, _ in others)
    return place if clear else None


def differences(members: Sequence[Member]) -> list[Difference]:
    """Every member against the first, on the items both scored, for the metrics that follow from the records."""
    rows: list[Difference] = []
    first, *others = members
    mine = records_of(first) if others else []
    for other in others:
        if not mine or obstacles(first.result, other.result):
            continue
        theirs = records_of(other)
        if len(theirs) > MAX_PAIRS:
            continue
        for name, estimator in first.result.estimators.items():
            metric = first.result.metrics.get(name)
            if metric is None or other.result.estimators.get(name) != estimator:
                continue
            if not same_unit(name, [first.result, other.result]):
                continue
            try:
                change = paired_bootstrap(mine, theirs, estimator)
            except (UserError, KeyError, TypeError, ValueError):  # records that do not hold what the estimator names
                continue
            if not all(map(math.isfinite, (change.value, change.low, change.high))):
                continue
            verdict = _verdict(change.low, change.high, metric.higher_is_better)
            rows.append(
                Difference(
                    name, first, other, change.value, change.low, change.high, change.p or 0.0, change.n, verdict
                )
            )
    return rows


def records_of(member: Member) -> list[dict[str, Any]]:
    """The records beside the result; none where they are missing, or are not those the result was computed from."""
    if member.run.folder is None or not member.result.records.get("count"):
        return []
    try:
        return read_records(member.run.folder / f"{member.result.suite}.json")
    except UserError:
        return []


def _span(metric: Metric) -> tuple[float, float]:
    if metric.low is not None and metric.high is not None:
        return metric.low, metric.high
    return metric.value - (metric.std or 0.0), metric.value + (metric.std or 0.0)


def _verdict(low: float, high: float, up: bool | None) -> str:
    if low <= 0 <= high:
        return "undecided"
    if up is None:
        return "different"
    return "better" if (low > 0) == up else "worse"
