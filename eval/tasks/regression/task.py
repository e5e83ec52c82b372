"""Regression by fine-tuning: the checkpoint against the same network untrained and TF-IDF, by rank correlation.

As classification: the epoch is chosen on a split of the training text (or on a file for it), by Spearman's correlation;
the test text is scored once for each seed, with the chosen weights.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from eval.results.parts import Parts
from eval.results.schema import Metric, Outcome, Result, Series, Table
from eval.shared.agreement import correlations, estimators_of, gains_of, records_of
from eval.shared.verdict import verdict
from eval.subject import Subject
from eval.tasks.classification import MODEL_ROW, SCRATCH_ROW
from eval.tasks.classification.budgets import Budget, searched
from eval.tasks.classification.dataset import overlap_warning
from eval.tasks.classification.outcome import few_seeds
from eval.tasks.classification.search import said_of, search_table
from eval.tasks.classification.task import resolve
from eval.tasks.regression import TABLE, TFIDF_CUT_ROW, TFIDF_ROW, RegressSettings
from eval.tasks.regression.jobs import RegressData, RegressFits

__all__ = ["VERSION", "data", "lines", "resolve", "run"]
VERSION = 2
PREFIXES = {MODEL_ROW: "", SCRATCH_ROW: "scratch_", TFIDF_ROW: "tfidf_", TFIDF_CUT_ROW: "tfidf_cut_"}
GAINS = {"gain_over_scratch": SCRATCH_ROW, "gain_over_tfidf": TFIDF_ROW}


def data(subject: Subject, settings: RegressSettings) -> dict[str, Any]:
    """What was named, read."""
    return RegressData.read(settings).describe()


def run(subject: Subject, settings: RegressSettings, parts: Parts) -> Outcome:
    """Fine-tune for every seed, from the checkpoint and from random weights, and set TF-IDF beside them."""
    data = RegressData.read(settings)
    seen = data.seen()
    warning = overlap_warning(seen, settings, "a correlation")
    if warning:
        print(f"warning: {warning}", flush=True)
    fits = RegressFits(subject, settings, data)
    found_by_search = searched(fits, [Budget(None, [fits])], settings, parts) if settings.search else []
    jobs = fits.jobs()
    fits.share = parts.share([job for _, _, job in jobs])
    rows: dict[str, list[np.ndarray]] = {MODEL_ROW: []}
    curves: list[list[dict[str, float]]] = []
    seeds: list[list[Any]] = []
    for (row, seed, _), value in zip(jobs, parts.map([job for _, _, job in jobs]), strict=True):
        rows.setdefault(row, []).append(np.array(value["predicted"]))
        if "chosen" in value:
            seeds.append([row, seed, value["chosen"]["epoch"], value["chosen"]["figure"], value["chosen"]["loss"]])
        if row == MODEL_ROW:
            curves.append(value["curve"])
    truth, ids = data.test.scores, data.test.item_ids()
    table, metrics, undefined = correlations(rows, truth, ids, PREFIXES, (MODEL_ROW,), "texts")
    records = records_of(rows, truth, ids, PREFIXES, (MODEL_ROW,), GAINS)
    predicted = np.mean(rows[MODEL_ROW], axis=0)
    for record, guess, length in zip(records, predicted.tolist(), fits.test.lengths.tolist(), strict=True):
        record |= {"predicted": guess, "tokens": length}
    gains = gains_of(records, GAINS, "texts")
    estimators = estimators_of(records, metrics, GAINS)
    cut = float(fits.test.cut.mean())
    error = float(np.mean([np.square(run - truth).mean() for run in rows[MODEL_ROW]]))
    metrics |= gains
    metrics["mean_squared_error"] = Metric(error, False, n=len(truth), unit="texts")
    metrics["share_of_texts_trained_on"] = Metric(float(seen.mean()), None, n=len(truth), unit="texts")
    metrics["share_of_texts_cut"] = Metric(cut, None, n=len(truth), unit="texts")
    said = [verdict(gains, "Spearman"), *undefined, warning]
    said.append(f"{cut:.1%} of the test texts are longer than the {settings.max_length} tokens read.")
    said += [said_of(one) for one in found_by_search]
    note = " ".join(filter(None, said)) + few_seeds(settings.seeds)
    trials = [search_table(found_by_search, fits.goal.figure)] if found_by_search else []
    columns = ["predictor", "seed", "epoch chosen", "dev Spearman", "dev squared error, standardised"]
    return Outcome(
        metrics,
        [Table(TABLE, table.columns, table.rows, note), *trials, Table("by seed", columns, seeds)],
        [_dev_curve(curves)],
        samples=_misses(data, truth, predicted),
        records=records,
        estimators=estimators,
    )


def lines(result: Result, records: Path) -> list[str]:
    """For the terminal: which is better, and what the figures can't say."""
    table = result.table(TABLE)
    return textwrap.wrap(table.note, 118) if table is not None else []


def _dev_curve(curves: list[list[dict[str, float]]]) -> Series:
    """Spearman's correlation on the development split by epoch, the mean of the seeds that went so far."""
    at: dict[float, list[float]] = {}
    for place in (place for curve in curves for place in curve):
        at.setdefault(place["epoch"], []).append(place["figure"])
    x = sorted(at)
    labels = "epoch", "Spearman on the split that chooses", "dev Spearman by epoch"
    return Series("dev Spearman", x, [float(np.mean(at[epoch])) for epoch in x], *labels, scale="linear")


def _misses(
    data: RegressData, truth: np.ndarray, predicted: np.ndarray, count: int = 6, characters: int = 300
) -> list[dict[str, Any]]:
    """The test items whose prediction is farthest from their score."""
    order = np.argsort(-np.abs(predicted - truth), kind="stable")[:count]
    found = []
    for i in order:
        second = {} if data.test.seconds is None else {"second text": data.test.seconds[i][:characters]}
        texts = {"text": data.test.texts[i][:characters], **second}
        found.append({"kind": "mispredicted", **texts, "score": float(truth[i]), "predicted": float(predicted[i])})
    return found
