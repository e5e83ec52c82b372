"""From predictions to the suite's numbers: rows, intervals, gains, lengths, calibration, and a record for each item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.results.schema import Estimator, Grid, Metric, Series, Table
from eval.results.statistics import bootstrap
from eval.tasks.classification import MAJORITY_ROW, MODEL_ROW, SCRATCH_ROW, TABLE, TFIDF_CUT_ROW, TFIDF_ROW
from eval.tasks.classification.metrics import (
    BINS,
    Bin,
    Predictions,
    brier,
    f1_of,
    intervals,
    reliability,
    scores,
    statistics,
)

LENGTH_TABLE = "accuracy by length"
CALIBRATION_TABLE = "calibration"
CLASS_TABLE = "by class"
CONFUSION = "confusion matrix"
MOST_CLASSES = 60
PREFIXES = {
    MODEL_ROW: "",
    SCRATCH_ROW: "scratch_",
    TFIDF_ROW: "tfidf_",
    TFIDF_CUT_ROW: "tfidf_cut_",
    MAJORITY_ROW: "majority_",
}
_NAMES = {"accuracy": "accuracy", "macro_f1": "macro F1", "mcc": "MCC", "f1": "F1", "brier": "Brier", "ece": "ECE"}
GAINS = {"gain_over_scratch": SCRATCH_ROW, "gain_over_tfidf": TFIDF_ROW}


@dataclass(frozen=True)
class Scored:
    """The predictions of every row (one for each seed) on the test items, with the truth (n,) as class numbers."""

    truth: np.ndarray
    rows: dict[str, list[Predictions]]
    classes: list[str]
    positive: int | None = None

    def correct(self, row: str) -> np.ndarray:
        """(n,) share of the seeds that are right."""
        return np.mean([run.classes == self.truth for run in self.rows[row]], axis=0)


def rows_table(scored: Scored, note: str, ids: list[str]) -> tuple[Table, dict[str, Metric]]:
    """The table of all rows, and their metrics; items of one of the ``ids`` are copies, drawn together."""
    wanted = statistics(scored.positive)
    metrics: dict[str, Metric] = {}
    rows: list[list[Any]] = []
    names: list[str] = []
    for row, runs in scored.rows.items():
        found = [scores(scored.truth, run, scored.positive) for run in runs]
        names = list(found[0])
        bounds = intervals(scored.truth, np.stack([run.classes for run in runs]), len(scored.classes), wanted, ids=ids)
        cells: list[Any] = [row]
        for name in names:
            values = [values[name] for values in found]
            mean, std = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
            cells += [mean, std]
            if row == MODEL_ROW or name in wanted:
                low, high = bounds.get(name, (None, None))
                n = len(values) if std is not None else len(scored.truth)
                unit = "texts" if std is None else "seeds"
                metrics[PREFIXES[row] + name] = Metric(mean, name not in ("brier", "ece"), std, n, low, high, unit)
        rows.append([*cells, len(runs)])
    columns = ["predictor", *(cell for name in names for cell in (_NAMES[name], "± std")), "seeds"]
    return Table(TABLE, columns, rows, note), metrics


def by_class(scored: Scored, ids: list[str]) -> Table:
    """Precision, recall and F1 of each class, means over the seeds of the fine-tuned model."""
    from sklearn.metrics import precision_recall_fscore_support

    runs, numbers = scored.rows[MODEL_ROW], range(len(scored.classes))
    found = np.stack(
        [
            precision_recall_fscore_support(scored.truth, run.classes, labels=list(numbers), zero_division=0.0)[:3]
            for run in runs
        ]
    )  # (seeds, 3, classes)
    predicted = np.stack([run.classes for run in runs])
    wanted = {str(number): f1_of(number) for number in numbers}
    bounds = intervals(scored.truth, predicted, len(scored.classes), wanted, ids=ids)
    rows: list[list[Any]] = []
    for number in numbers:
        precision, recall, f1 = found[:, :, number].mean(0).tolist()
        std = float(found[:, 2, number].std(ddof=1)) if len(runs) > 1 else None
        items = int((scored.truth == number).sum())
        low, high = bounds[str(number)]
        rows.append([scored.classes[number], items, precision, recall, f1, std, low, high])
    columns = ["class", "test items", "precision", "recall", "F1", "± std", "low", "high"]
    note = "Fine-tuned, means over the seeds. A class that is never predicted has precision 0. Intervals are of F1."
    return Table(CLASS_TABLE, columns, rows, note)


def confusion(scored: Scored) -> list[Grid]:
    """The confusion matrix of the fine-tuned model: of the items of each class, the share that each class got.

    None for more than :data:`MOST_CLASSES`, which no picture shows; the records have every prediction.
    """
    size = len(scored.classes)
    if size > MOST_CLASSES:
        return []
    runs = scored.rows[MODEL_ROW]
    counts = np.zeros((size, size))
    for run in runs:
        np.add.at(counts, (scored.truth, run.classes), 1 / len(runs))
    values: list[list[float | None]] = [(row / row.sum()).tolist() if row.any() else [None] * size for row in counts]
    rows = [f"{name} ({row.sum():.0f})" for name, row in zip(scored.classes, counts, strict=True)]
    note = "Each row: of the test items of one class (in brackets: how many), the share that was taken for each class."
    return [Grid(CONFUSION, scored.classes, rows, values, "predicted", "true class", 0.0, 1.0, note)]


def records_of(scored: Scored, ids: list[str], lengths: np.ndarray, seen: np.ndarray) -> list[dict[str, Any]]:
    """A record for each test item; ``correct``, ``probability`` and ``brier`` are means over the seeds.

    ``seen`` (n,) bool: whether the text was trained on too. Where some were and some were not, each record says so.
    """
    runs = scored.rows[MODEL_ROW]
    items = np.arange(len(scored.truth))
    columns: dict[str, list[Any]] = {
        "id": ids,
        "label": [scored.classes[c] for c in scored.truth],
        "tokens": lengths.tolist(),
        "correct": scored.correct(MODEL_ROW).tolist(),
        "probability": np.mean([run.probabilities[items, scored.truth] for run in runs], axis=0).tolist(),
        "brier": np.mean([brier(scored.truth, run.probabilities) for run in runs], axis=0).tolist(),
    }
    for seed, run in enumerate(runs):
        columns[f"predicted_{seed}"] = [scored.classes[c] for c in run.classes]
    if seen.any() and not seen.all():
        unseen = (~seen).astype(int)
        columns["unseen"], columns["correct_unseen"] = unseen.tolist(), (scored.correct(MODEL_ROW) * unseen).tolist()
    for name, row in GAINS.items():
        if row in scored.rows:
            columns[name] = (scored.correct(MODEL_ROW) - scored.correct(row)).tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def estimators_of(records: list[dict[str, Any]]) -> dict[str, Estimator]:
    """The metrics that are means over the records."""
    names = {"accuracy": "correct", "brier": "brier"} | {name: name for name in GAINS if name in records[0]}
    unseen = {"accuracy_unseen": Estimator("correct_unseen", "unseen")} if "unseen" in records[0] else {}
    return {name: Estimator(column) for name, column in names.items()} | unseen


def verdict(gains: dict[str, Metric]) -> str:
    """In words whether the model or a control is better, as far as the intervals tell."""
    lines = []
    for name, other in (("gain_over_tfidf", TFIDF_ROW), ("gain_over_scratch", f"the {SCRATCH_ROW}")):
        gain = gains.get(name)
        if gain is None or gain.low is None or gain.high is None:
            continue
        size = f"{abs(gain.value):.3f} {'above' if gain.value > 0 else 'below'}"
        size += f" (95% interval of the difference {gain.low:+.3f} to {gain.high:+.3f})"
        if gain.high < 0:
            lines.append(f"{other} is better than the fine-tuned model, whose accuracy is {size}.")
        elif gain.low > 0:
            lines.append(f"the fine-tuned model is better than {other}: its accuracy is {size}.")
        else:
            lines.append(f"the fine-tuned model and {other} cannot be told apart: its accuracy is {size}.")
    return " ".join(line[0].upper() + line[1:] for line in lines)


def few_seeds(seeds: int) -> str:
    """What the table cannot say about the training where there are fewer than three seeds; with more, nothing."""
    if seeds == 1:
        return " 1 seed: how far another one would be off is not known."
    return f" {seeds} seeds: the standard deviation over them says little." if seeds < 3 else ""


def by_length(scored: Scored, records: list[dict[str, Any]], lengths: np.ndarray) -> tuple[Table, list[Series]]:
    """Accuracy in buckets of the items' whole lengths: up to 64 tokens, to 128, to 256 and so on."""
    place = np.maximum(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int), 6)
    shown = [row for row in scored.rows if row != MAJORITY_ROW]
    right = {row: scored.correct(row) for row in shown}
    rows: list[list[Any]] = []
    x: list[float] = []
    bounds: list[tuple[float, float]] = []
    for bucket in np.unique(place):
        members = place == bucket
        name = f"{2 ** (bucket - 1) + 1 if bucket > 6 else 1} to {2**bucket}"
        rows.append([name, int(members.sum()), *(float(right[row][members].mean()) for row in shown)])
        x.append(float(lengths[members].mean()))
        interval = bootstrap([records[i] for i in np.flatnonzero(members)], Estimator("correct"))
        bounds.append((interval.low, interval.high))
    note = "Lengths are those of the whole texts, in the model's tokens, also where fewer are read."
    table = Table(LENGTH_TABLE, ["tokens", "test items", *shown], rows, note)
    xlabel = "length of the whole text, tokens (mean of the bucket)"
    series = [
        Series(
            f"{LENGTH_TABLE}, {row}", x, [values[2 + i] for values in rows], xlabel, "accuracy", LENGTH_TABLE,
            [low for low, _ in bounds] if row == MODEL_ROW else None,
            [high for _, high in bounds] if row == MODEL_ROW else None,
            reference=row != MODEL_ROW,
        )
        for i, row in enumerate(shown)
    ]  # fmt: skip
    series.append(Series("test items by length", x, [values[1] for values in rows], xlabel, "test items"))
    return table, series


def calibration(scored: Scored) -> tuple[Table, list[Series]]:
    """The reliability diagram of the fine-tuned model, the items of all seeds together."""
    runs = scored.rows[MODEL_ROW]
    confidence = np.concatenate([run.probabilities.max(1) for run in runs])
    correct = np.concatenate([run.classes == scored.truth for run in runs])
    bins: list[Bin] = [found for found in reliability(confidence, correct) if found.n]
    table = Table(
        CALIBRATION_TABLE,
        ["confidence", "predictions", "mean confidence", "accuracy"],
        [[f"{b.low:.3f} to {b.high:.3f}", b.n, b.confidence, b.accuracy] for b in bins],
        f"Fine-tuned, all seeds. ECE (Guo et al. 2017): the mean over predictions of |accuracy - mean confidence| of "
        f"their bin, {BINS} bins of equal width, for each seed by itself. Brier: squared distance summed over classes, "
        "0 to 2.",
    )
    labels = "confidence", "accuracy", "reliability"
    return table, [
        Series("reliability", [b.confidence for b in bins], [b.accuracy for b in bins], *labels, scale="linear"),
        Series("perfect calibration", [0.0, 1.0], [0.0, 1.0], *labels, scale="linear", reference=True),
    ]


def dev_curves(curves: dict[str, list[list[dict[str, float]]]]) -> list[Series]:
    """Accuracy on the development split by epoch, the mean of the seeds that went so far."""
    series = []
    for row, runs in curves.items():
        at: dict[float, list[float]] = {}
        for run in runs:
            for place in run:
                at.setdefault(place["epoch"], []).append(place["figure"])
        x = sorted(at)
        series.append(
            Series(
                f"dev accuracy, {row}",
                x,
                [float(np.mean(at[epoch])) for epoch in x],
                "epoch",
                "accuracy on the split that chooses",
                "dev accuracy by epoch",
                scale="linear",
                reference=row != MODEL_ROW,
            )
        )
    return series


def mistakes(scored: Scored, texts: list[str], count: int = 6, characters: int = 400) -> list[dict[str, Any]]:
    """The test items that the seeds together are most sure about, and wrong."""
    mean = np.mean([run.probabilities for run in scored.rows[MODEL_ROW]], axis=0)
    found = mean.argmax(1)
    wrong = np.flatnonzero(found != scored.truth)
    order = wrong[np.argsort(-mean[wrong, found[wrong]], kind="stable")][:count]
    return [
        {
            "kind": "misclassified",
            "text": texts[i][:characters],
            "label": scored.classes[scored.truth[i]],
            "predicted": scored.classes[found[i]],
            "probability": float(mean[i, found[i]]),
        }
        for i in order
    ]
