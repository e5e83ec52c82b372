"""Accuracy by labels: the same fits on nested draws of the training records, each seed with a draw of its own.

The draw of a seed with 100 labels is part of its draw with 500. All rows, TF-IDF too, are trained on the same records.
So the deviation over seeds has that of the draw in it, and the intervals are over the test items as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from eval.results.parts import Job, Parts
from eval.results.schema import Estimator, Metric, Series, Table
from eval.results.statistics import bootstrap
from eval.tasks.classification import MODEL_ROW, SCRATCH_ROW, TFIDF_ROW, ClassifySettings, FineTuneSettings
from eval.tasks.classification.jobs import Fits
from eval.tasks.classification.outcome import GAINS, PREFIXES, Scored
from eval.tasks.classification.search import Found, search

TABLE = "accuracy by labels"
SHOWN = (MODEL_ROW, SCRATCH_ROW, TFIDF_ROW)


@dataclass(frozen=True)
class Budget:
    """So many training records, None for all that there are; ``fits``: for each seed."""

    labels: int | None
    fits: list[Fits]

    def jobs(self) -> list[tuple[str, int, Job]]:
        """(row, seed, job) of every fit; TF-IDF once for each draw."""
        if all(fits is self.fits[0] for fits in self.fits):
            return self.fits[0].jobs()
        return [job for seed, fits in enumerate(self.fits) for job in fits.jobs([seed])]


def budgets(fits: Fits, settings: ClassifySettings) -> list[Budget]:
    """The draws, the smallest first; without ``labels`` one budget, of all records.

    Raises :class:`UserError` for more labels than there are, or fewer than two of each class.
    """
    if not settings.labels:
        return [Budget(None, [fits] * settings.seeds)]
    there, least = len(fits.data.train), 2 * fits.data.outputs
    if settings.labels[-1] > there:
        raise UserError(f"--labels {settings.labels[-1]} is more than the {there:,} records of {fits.data.train.path}")
    if settings.labels[0] < least:
        raise UserError(f"--labels {settings.labels[0]} is too few for {fits.data.outputs} classes: at least {least}")
    found = []
    for labels in settings.labels:
        if labels == there:  # one draw, in the order of the file
            every = fits.only(np.arange(there))
            every.title = f"{labels} labels, "
            found.append(Budget(labels, [every] * settings.seeds))
            continue
        drawn = [fits.only(np.sort(fits.order(seed)[:labels])) for seed in range(settings.seeds)]
        for seed, one in enumerate(drawn):
            one.title = f"{labels} labels, draw {seed}, "
        found.append(Budget(labels, drawn))
    return found


def searched(fits: Fits, groups: Sequence[Budget], settings: FineTuneSettings, parts: Parts) -> list[Found]:
    """Search for each budget on the draw of seed 0, of at most ``search_records``; the fits then use what was chosen.

    Budgets above ``search_records`` share one search.
    """
    sizes = {id(group): min(group.labels or len(fits.data.train), settings.search_records) for group in groups}
    order = fits.order(0)
    found = search([fits.only(np.sort(order[:size])) for size in sorted(set(sizes.values()))], parts)
    by_size = {one.records: one for one in found}
    for group in groups:
        chosen = by_size[sizes[id(group)]].chosen
        for one in group.fits:
            one.trials.update({row: judged.trial for row, judged in chosen.items()})
    return found


def by_labels(
    groups: Sequence[tuple[int, Scored]], ids: Sequence[str], records: list[dict[str, Any]]
) -> tuple[Table, list[Series], dict[str, Metric], dict[str, Estimator]]:
    """The table and the curve of the budgets, their metrics, and those that follow from the ``records``, which are
    given the columns for that."""
    metrics: dict[str, Metric] = {}
    estimators: dict[str, Estimator] = {}
    rows: list[list[Any]] = []
    for labels, scored in groups:
        cells: list[Any] = [labels]
        shown = [row for row in SHOWN if row in scored.rows]
        columns = {f"{PREFIXES[row]}accuracy_at_{labels}": scored.correct(row) for row in shown}
        columns |= {
            f"{name}_at_{labels}": scored.correct(MODEL_ROW) - scored.correct(row)
            for name, row in GAINS.items()
            if row in scored.rows
        }
        for name, values in columns.items():
            items = [{"id": key, name: value} for key, value in zip(ids, values.tolist(), strict=True)]
            measured = bootstrap(items, Estimator(name))
            row = next((row for row in shown if name == f"{PREFIXES[row]}accuracy_at_{labels}"), None)
            std, n, unit = None, measured.n, "texts"
            if row is not None:
                runs = [float(np.mean(run.classes == scored.truth)) for run in scored.rows[row]]
                if len(runs) > 1:
                    std, n, unit = float(np.std(runs, ddof=1)), len(runs), "seeds"
                cells += [measured.value, std]
            metrics[name] = Metric(measured.value, True, std, n, measured.low, measured.high, unit)
            if name.startswith("gain_"):
                # Rounded, since a gain of nothing is 1e-18 by the order of summation.
                cells += [round(value, 9) + 0.0 for value in (measured.value, measured.low, measured.high)]
            if name.startswith(("gain_", "accuracy_")):
                estimators[name] = Estimator(name)
                for record, item in zip(records, items, strict=True):
                    record[name] = item[name]
        rows.append(cells)
    first = groups[0][1]
    names = [row for row in SHOWN if row in first.rows]
    columns_shown = ["labels", *(cell for name in names for cell in (name, "± std"))]
    columns_shown += [
        cell
        for name, row in GAINS.items()
        if row in first.rows
        for cell in (name.replace("_", " ").replace("tfidf", "TF-IDF"), "low", "high")
    ]
    seeds = len(first.rows[MODEL_ROW])
    note = (
        f"Accuracy on {len(first.truth):,} test texts, the mean of {seeds} draws of the training records and "
        "its deviation over them. Of each draw all predictors have the same records, and a smaller draw is part of a "
        "larger one. Intervals, 95%, are of the gains, over the test texts."
    )
    series = [_curve(row, metrics, [labels for labels, _ in groups]) for row in names]
    return Table(TABLE, columns_shown, rows, note), series, metrics, estimators


def _curve(row: str, metrics: dict[str, Metric], labels: Sequence[int]) -> Series:
    found = [metrics[f"{PREFIXES[row]}accuracy_at_{count}"] for count in labels]
    return Series(
        f"{TABLE}, {row}",
        [float(count) for count in labels],
        [metric.value for metric in found],
        "training records with a label",
        "accuracy",
        TABLE,
        [float(metric.low or 0) for metric in found],
        [float(metric.high or 0) for metric in found],
        scale="log10",
        reference=row != MODEL_ROW,
    )


def told(table: Table) -> list[str]:
    """For the terminal: a line for each budget."""
    lines = []
    for cells in table.rows:
        found = dict(zip(table.columns, cells, strict=False))
        shown = ", ".join(f"{name} {found[name]:.3f}" for name in SHOWN if name in found)
        lines.append(f"{cells[0]:,} labels: {shown}")
    return lines
