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
from eval.results.schema import Estimator, Metric, Outcome, Result, Series, Table
from eval.results.statistics import bootstrap
from eval.shared.pooling import check_pooling
from eval.subject import Subject, choose_precision
from eval.tasks.classification import MAJORITY_ROW, MODEL_ROW, TABLE, ClassifySettings, FineTuneSettings
from eval.tasks.classification.budgets import TABLE as LABELS_TABLE
from eval.tasks.classification.budgets import budgets, by_labels, searched, told
from eval.tasks.classification.dataset import ClassifyData, overlap_warning, sources
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
from eval.tasks.classification.recipe import default_lr
from eval.tasks.classification.search import said_of, search_table

VERSION = 5
AnyFineTune = TypeVar("AnyFineTune", bound=FineTuneSettings)
SEEDS_TABLE = "by seed"


def resolve(subject: Subject, settings: AnyFineTune) -> AnyFineTune:
    """The data, the length, the learning rate and the precision filled in; raises for what is missing or cannot be."""
    settings = sources(settings)
    check_pooling(settings.pooling, subject.causal)
    _check(subject, settings)
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


def _check(subject: Subject, settings: FineTuneSettings) -> None:
    layers = subject.loaded.model_config.num_layers
    if settings.freeze > layers:
        raise UserError(f"--freeze {settings.freeze} is more than the {layers} layers of the model")
    if settings.search and settings.lr is not None:
        raise UserError(f"--search chooses the learning rate: leave out --lr, or say --search-lrs {settings.lr:g}")
    if isinstance(settings, ClassifySettings) and settings.labels and settings.train_records is not None:
        raise UserError("--labels says how many training records: leave out --train-records")


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
    groups = budgets(fits, settings)
    found_by_search = searched(fits, groups, settings, parts) if settings.search else []
    asked = [(group, job) for group in groups for job in group.jobs()]
    mine = parts.share([job for _, (_, _, job) in asked])
    for one in {id(one): one for group in groups for one in group.fits}.values():
        one.share = mine
    values = parts.map([job for _, (_, _, job) in asked])
    truth, lengths = fits.test.examples.labels, fits.test.lengths
    positive = data.positive(settings.positive_label)
    by_group = {id(group): Scored(truth, {MODEL_ROW: []}, data.classes, positive) for group in groups}
    curves: dict[str, list[Any]] = {}
    seed_rows: list[list[Any]] = []
    last = groups[-1]
    for (group, (row, seed, _)), value in zip(asked, values, strict=True):
        found = predictions(value)
        by_group[id(group)].rows.setdefault(row, []).append(found)
        if "chosen" in value and group is last:
            curves.setdefault(row, []).append(value["curve"])
            chosen, score = value["chosen"], scores(truth, found)
            epoch = int(chosen["epoch"]) if float(chosen["epoch"]).is_integer() else chosen["epoch"]
            seed_rows.append([row, seed, epoch, chosen["figure"], score["accuracy"], score["macro_f1"], score["mcc"]])
    scored = by_group[id(last)]
    ids = data.test.item_ids()
    scored.rows[MAJORITY_ROW] = [majority(fits.train.examples.labels, len(data.classes), len(truth))]

    records = records_of(scored, ids, lengths, seen)
    extra: list[Table] = []
    drawn: list[Series] = []
    more: dict[str, Metric] = {}
    estimated: dict[str, Estimator] = {}
    if settings.labels:
        pairs = [(group.labels or 0, by_group[id(group)]) for group in groups]
        curve, drawn, more, estimated = by_labels(pairs, ids, records)
        extra.append(curve)
    if found_by_search:
        extra.append(search_table(found_by_search, fits.goal.figure))
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
    if settings.labels:
        note += f" With {settings.labels[-1]:,} labels; fewer are in the table {extra[0].name}."
    if found_by_search:
        note += f" {said_of(found_by_search[-1])}"
    table, metrics = rows_table(scored, note, ids)
    metrics |= gains
    for name in ("accuracy", "brier"):  # with the very intervals that a comparison of two models resamples
        metrics[name] = _bounded(metrics[name], measured[name].low, measured[name].high)
    if "accuracy_unseen" in measured:
        rest, number = measured["accuracy_unseen"], int((~seen).sum())
        metrics["accuracy_unseen"] = Metric(rest.value, True, n=number, low=rest.low, high=rest.high, unit="texts")
    metrics["share_of_texts_trained_on"] = Metric(float(seen.mean()), None, n=len(truth), unit="texts")
    metrics |= more
    metrics["share_of_texts_cut"] = Metric(cut, None, n=len(truth), unit="texts")
    length_table, length_series = by_length(scored, records, lengths)
    calibration_table, calibration_series = calibration(scored)
    columns = ["predictor", "seed", "epoch chosen", "dev accuracy", "accuracy", "macro F1", "MCC"]
    return Outcome(
        metrics,
        [
            table,
            *extra,
            Table(SEEDS_TABLE, columns, seed_rows),
            length_table,
            calibration_table,
            by_class(scored, ids),
        ],
        [*drawn, *length_series, *calibration_series, *dev_curves(curves)],
        confusion(scored),
        samples=mistakes(scored, data.test.texts),
        records=records,
        estimators=estimators | estimated,
    )


def lines(result: Result, records: Path) -> list[str]:
    """For the terminal: which is better, and what the figures can't say."""
    table, curve = result.table(TABLE), result.table(LABELS_TABLE)
    return [
        *(textwrap.wrap(table.note, 118) if table is not None else []),
        *(told(curve) if curve is not None else []),
    ]


def _bounded(metric: Metric, low: float, high: float) -> Metric:
    return replace(metric, low=low, high=high)
