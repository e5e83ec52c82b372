"""Classification by fine-tuning: the checkpoint against the same network untrained, TF-IDF and the majority class.

The epoch is chosen on a split of the training text (or on a file for it); the test text is scored once for each seed,
with the chosen weights. Seeds change the split, the order and the dropout (and the start of the weights, from scratch).
"""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.errors import UserError
from eval.results.parts import Parts
from eval.results.schema import Metric, Outcome, Result, Table
from eval.results.statistics import bootstrap
from eval.shared.pooling import check_pooling
from eval.subject import Subject, choose_precision
from eval.tasks.classification import MAJORITY_ROW, MODEL_ROW, TABLE, ClassifySettings, FineTuneSettings
from eval.tasks.classification.dataset import ClassifyData, overlap_warning, sources
from eval.tasks.classification.finetune import default_lr
from eval.tasks.classification.jobs import Fits, majority, predictions
from eval.tasks.classification.metrics import scores
from eval.tasks.classification.outcome import (
    Scored,
    by_class,
    by_length,
    calibration,
    confusion,
    dev_curves,
    estimators_of,
    few_seeds,
    mistakes,
    records_of,
    rows_table,
    verdict,
)

VERSION = 4
AnyFineTune = TypeVar("AnyFineTune", bound=FineTuneSettings)
SEEDS_TABLE = "by seed"


def resolve(subject: Subject, settings: AnyFineTune) -> AnyFineTune:
    """The data, the length, the learning rate and the precision filled in; raises for what is missing or cannot be."""
    settings = sources(settings)
    check_pooling(settings.pooling, subject.causal)
    max_length = subject.check_length(settings.max_length or subject.trained_length, "--max-length")
    if settings.text_b_field and max_length < 3:
        raise UserError(f"--max-length {max_length} is too short for pairs: at least 3 tokens")
    return settings.model_copy(
        update={
            "max_length": max_length,
            "scratch_seeds": settings.seeds if settings.scratch_seeds is None else settings.scratch_seeds,
            "precision": choose_precision(settings.precision, subject.device),
            "lr": settings.lr or default_lr(subject.loaded.model_config.hidden_size),
        }
    )


def data(subject: Subject, settings: ClassifySettings) -> dict[str, Any]:
    """What was named, read."""
    found = ClassifyData.read(settings)
    found.positive(settings.positive_label)
    return found.describe()


def run(subject: Subject, settings: ClassifySettings, parts: Parts) -> Outcome:
    """Fine-tune for every seed, from the checkpoint and from random weights, and set the baselines beside them."""
    data = ClassifyData.read(settings)
    seen = data.seen()
    warning = overlap_warning(seen, settings)
    if warning:
        print(f"warning: {warning}", flush=True)
    fits = Fits(subject, settings, data)
    jobs = fits.jobs()
    fits.share = parts.share([job for _, _, job in jobs])
    values = parts.map([job for _, _, job in jobs])
    truth, lengths = fits.test.examples.labels, fits.test.lengths
    scored = Scored(truth, {MODEL_ROW: []}, data.classes, data.positive(settings.positive_label))
    curves: dict[str, list[Any]] = {}
    seed_rows: list[list[Any]] = []
    for (row, seed, _), value in zip(jobs, values, strict=True):
        found = predictions(value)
        scored.rows.setdefault(row, []).append(found)
        if "chosen" in value:
            curves.setdefault(row, []).append(value["curve"])
            chosen, score = value["chosen"], scores(truth, found)
            epoch = int(chosen["epoch"]) if float(chosen["epoch"]).is_integer() else chosen["epoch"]
            seed_rows.append([row, seed, epoch, chosen["figure"], score["accuracy"], score["macro_f1"], score["mcc"]])
    ids = data.test.item_ids()
    scored.rows[MAJORITY_ROW] = [majority(fits.train.examples.labels, len(data.classes), len(truth))]

    records = records_of(scored, ids, lengths, seen)
    estimators = estimators_of(records)
    measured = {name: bootstrap(records, estimator) for name, estimator in estimators.items()}
    gains = {
        name: Metric(found.value, True, n=found.n, low=found.low, high=found.high, unit="texts")
        for name, found in measured.items()
        if name.startswith("gain_")
    }
    cut = float(fits.test.cut.mean())
    note = verdict(gains) + f" {cut:.1%} of the test texts are longer than the {settings.max_length} tokens read."
    note += (f" {warning}" if warning else "") + few_seeds(settings.seeds)
    table, metrics = rows_table(scored, note, ids)
    metrics |= gains
    for name in ("accuracy", "brier"):  # with the very intervals that a comparison of two models resamples
        metrics[name] = _bounded(metrics[name], measured[name].low, measured[name].high)
    if "accuracy_unseen" in measured:
        rest, number = measured["accuracy_unseen"], int((~seen).sum())
        metrics["accuracy_unseen"] = Metric(rest.value, True, n=number, low=rest.low, high=rest.high, unit="texts")
    metrics["share_of_texts_trained_on"] = Metric(float(seen.mean()), None, n=len(truth), unit="texts")
    metrics["share_of_texts_cut"] = Metric(cut, None, n=len(truth), unit="texts")
    length_table, length_series = by_length(scored, records, lengths)
    calibration_table, calibration_series = calibration(scored)
    columns = ["predictor", "seed", "epoch chosen", "dev accuracy", "accuracy", "macro F1", "MCC"]
    return Outcome(
        metrics,
        [table, Table(SEEDS_TABLE, columns, seed_rows), length_table, calibration_table, by_class(scored, ids)],
        [*length_series, *calibration_series, *dev_curves(curves)],
        confusion(scored),
        samples=mistakes(scored, data.test.texts),
        records=records,
        estimators=estimators,
    )


def lines(result: Result, records: Path) -> list[str]:
    """For the terminal: which is better, and what the figures can't say."""
    table = result.table(TABLE)
    return textwrap.wrap(table.note, 118) if table is not None else []


def _bounded(metric: Metric, low: float, high: float) -> Metric:
    return replace(metric, low=low, high=high)
