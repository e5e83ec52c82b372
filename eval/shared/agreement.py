"""Predictions of several rows against scores: their correlations as a table, as metrics, and a record for each item."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from eval.results.schema import Estimator, Metric, Table
from eval.results.statistics import bootstrap
from eval.shared.correlation import KINDS, correlation, influences, interval
from eval.shared.labelled import Labelled


def check_scores(part: Labelled) -> None:
    """Raises :class:`UserError` where no correlation with the scores is defined, or it says nothing."""
    if len(part) < 3:
        raise UserError(
            f"{part.path} has {len(part)} record{'s' if len(part) > 1 else ''} with a score: a correlation of fewer "
            "than 3 says nothing"
        )
    if len(set(part.labels)) == 1:
        raise UserError(
            f"{part.path}: every score is {part.labels[0]}, and a correlation with a constant is not defined: is "
            "--score-field the right one?"
        )


def correlations(
    rows: dict[str, list[np.ndarray]],
    truth: np.ndarray,
    ids: list[str],
    prefixes: dict[str, str],
    whole: tuple[str, ...],
    unit: str,
) -> tuple[Table, dict[str, Metric], list[str]]:
    """The table (without a name), the metrics, and in words which rows have no correlation.

    Metrics are both correlations of the rows ``whole``, and Spearman's of the others.
    ``rows``: for each the predictions (n,) of one network or of several, whose correlations are averaged.
    """
    cells: list[list[Any]] = []
    metrics: dict[str, Metric] = {}
    undefined: list[str] = []
    for row, runs in rows.items():
        cell: list[Any] = [row]
        for kind in KINDS:
            values = [float(correlation(run, truth, kind)) for run in runs]
            if not np.isfinite(values).all():
                cell += [None] * 4
                continue
            low, high = interval(runs, truth, kind, ids)
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
            cell += [float(np.mean(values)), std, low, high]
            if row in whole or kind == "spearman":
                n, of = (len(truth), unit) if std is None else (len(values), "networks" if unit == "pairs" else "seeds")
                metrics[prefixes[row] + kind] = Metric(float(np.mean(values)), True, std, n, low, high, of)
        if cell[1] is None:
            undefined.append(f"{row}: all predictions are equal, and no correlation is defined.")
        cells.append([*cell, len(runs)])
    columns = ["predictor", "Spearman", "± std", "low", "high", "Pearson", "± std", "low", "high", "seeds"]
    return Table("", columns, cells), metrics, undefined


def records_of(
    rows: dict[str, list[np.ndarray]],
    truth: np.ndarray,
    ids: list[str],
    prefixes: dict[str, str],
    whole: tuple[str, ...],
    gains: dict[str, str],
) -> list[dict[str, Any]]:
    """A record for each item. Its ``spearman`` and ``pearson`` are its influences: numbers whose mean is the
    correlation (:func:`eval.shared.correlation.influences`), so that two models can be compared by them."""
    columns: dict[str, Any] = {"id": ids, "score": truth.tolist()}

    def add(name: str, values: np.ndarray) -> None:
        if np.isfinite(values).all():
            columns[name] = values.tolist()

    def mean(row: str, kind: Any) -> np.ndarray:
        return np.mean([influences(run, truth, kind) for run in rows[row]], axis=0)

    for row in whole:
        for kind in KINDS:
            if row in rows:
                add(prefixes[row] + kind, mean(row, kind))
    for name, row in gains.items():
        if row in rows:
            add(name, mean(whole[0], "spearman") - mean(row, "spearman"))
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def estimators_of(
    records: list[dict[str, Any]], metrics: dict[str, Metric], gains: dict[str, str]
) -> dict[str, Estimator]:
    """Of the metrics that are means of the records' influences."""
    return {name: Estimator(name) for name in (*metrics, *gains) if name in records[0]}


def gains_of(records: list[dict[str, Any]], gains: dict[str, str], unit: str) -> dict[str, Metric]:
    """Differences of Spearman's correlations, with intervals over the items of their influences."""
    found = {name: bootstrap(records, Estimator(name)) for name in gains if name in records[0]}
    return {name: Metric(b.value, True, n=b.n, low=b.low, high=b.high, unit=unit) for name, b in found.items()}
