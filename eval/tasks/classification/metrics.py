"""Scores of class predictions: scikit-learn's, the Brier score, calibration, and intervals over the test items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.results.statistics import LEVEL, RESAMPLES

BINS = 15
# Counts held at once in the bootstrap: 2^24 float64 are 128 MiB.
_BUDGET = 2**24

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Statistic = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Predictions:
    """Of one predictor on the test items: class numbers (n,) and probabilities (n, classes) float64."""

    classes: Ints
    probabilities: Floats


def scores(truth: Ints, predictions: Predictions, positive: int | None = None) -> dict[str, float]:
    """accuracy, macro_f1, mcc (Matthews), brier, ece and, for a ``positive`` class, f1.

    A class that is never predicted counts as F1 0 in the macro average; one that neither occurs nor is predicted does
    not count.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    found = predictions.classes
    result = {
        "accuracy": float(accuracy_score(truth, found)),
        "macro_f1": float(f1_score(truth, found, average="macro", zero_division=0.0)),
        "mcc": float(matthews_corrcoef(truth, found)),
    }
    if positive is not None:
        result["f1"] = float(f1_score(truth == positive, found == positive, zero_division=0.0))
    result["brier"] = float(brier(truth, predictions.probabilities).mean())
    result["ece"] = calibration_error(truth, predictions)
    return result


def brier(truth: Ints, probabilities: Floats) -> Floats:
    """(n,) squared distance of the probabilities from the truth, summed over the classes, from 0 to 2 (Brier 1950)."""
    target = np.zeros_like(probabilities)
    target[np.arange(len(truth)), truth] = 1.0
    return np.square(probabilities - target).sum(1)


@dataclass(frozen=True)
class Bin:
    """Items whose confidence lies in (low, high]; the means are NaN where ``n`` is 0."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


def reliability(confidence: Floats, correct: NDArray[np.bool_], bins: int = BINS) -> list[Bin]:
    """Mean confidence and accuracy in ``bins`` intervals of equal width over (0, 1]."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    n = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, weights=confidence, minlength=bins) / n
        accuracy = np.bincount(place, weights=correct.astype(float), minlength=bins) / n
    return [
        Bin(float(edges[i]), float(edges[i + 1]), int(n[i]), float(mean[i]), float(accuracy[i])) for i in range(bins)
    ]


def calibration_error(truth: Ints, predictions: Predictions, bins: int = BINS) -> float:
    """Expected calibration error of the predicted class: sum over bins of n_b / n · |accuracy - confidence|.

    Guo et al. 2017, equation 3, with 15 bins of equal width.
    """
    confidence = predictions.probabilities.max(1)
    found = reliability(confidence, predictions.classes == truth, bins)
    return float(sum(b.n / len(truth) * abs(b.accuracy - b.confidence) for b in found if b.n))


def accuracy_of(confusion: Floats) -> Floats:
    """Accuracy (...) of confusion counts (..., classes, classes), truth by row."""
    return np.trace(confusion, axis1=-2, axis2=-1) / confusion.sum((-2, -1))


def macro_f1_of(confusion: Floats) -> Floats:
    """Macro-averaged F1 as in :func:`scores`."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    both = confusion.sum(-1) + confusion.sum(-2)
    return (2 * hits / np.maximum(both, 1.0)).sum(-1) / np.maximum((both > 0).sum(-1), 1)


def mcc_of(confusion: Floats) -> Floats:
    """Matthews' correlation for several classes (Gorodkin 2004), 0 where the truth or the predictions are constant."""
    total = confusion.sum((-2, -1))
    true, found = confusion.sum(-1), confusion.sum(-2)
    top = np.trace(confusion, axis1=-2, axis2=-1) * total - (true * found).sum(-1)
    below = (total**2 - (true**2).sum(-1)) * (total**2 - (found**2).sum(-1))
    return np.where(below > 0, top / np.sqrt(np.where(below > 0, below, 1.0)), 0.0)


def f1_of(positive: int) -> Statistic:
    """F1 of one class."""

    def statistic(confusion: Floats) -> Floats:
        both = confusion[..., positive, :].sum(-1) + confusion[..., :, positive].sum(-1)
        return 2 * confusion[..., positive, positive] / np.maximum(both, 1.0)

    return statistic


def statistics(positive: int | None = None) -> dict[str, Statistic]:
    """The scores that are functions of the confusion counts, by the names of :func:`scores`."""
    named: dict[str, Statistic] = {"accuracy": accuracy_of, "macro_f1": macro_f1_of, "mcc": mcc_of}
    return named if positive is None else named | {"f1": f1_of(positive)}


def intervals(
    truth: Ints,
    predicted: Ints,
    classes: int,
    wanted: dict[str, Statistic],
    *,
    ids: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals, over the test items, of statistics averaged over the seeds; ``predicted``: (seeds, n).

    ``ids`` (n,): those of one id are one item and are drawn together; left out: each is an item.

    The bootstrap of items (Efron 1979). Items with the same truth and the same predictions of all seeds are alike, so
    what is drawn is how often each such kind occurs: the same distribution as drawing items, at the cost of the kinds.
    The kind of an item with copies is that of all of them.
    """
    import scipy.sparse

    kinds, kind = np.unique(np.vstack([truth, predicted]), axis=1, return_inverse=True)
    items: dict[Hashable, list[int]] = {}
    for key, number in zip(range(len(truth)) if ids is None else ids, kind.ravel().tolist(), strict=True):
        items.setdefault(key, []).append(number)
    found = sorted(Counter(tuple(sorted(numbers)) for numbers in items.values()).items())
    counts = np.array([number for _, number in found])
    owner = np.repeat(np.arange(len(found)), [len(numbers) for numbers, _ in found])
    member = np.concatenate([numbers for numbers, _ in found])
    n, rng = len(items), np.random.default_rng(seed)
    # For each seed a matrix (kinds, classes * classes) that says where in the confusion matrix a kind is counted.
    cells = [
        scipy.sparse.csr_array(
            (np.ones(len(owner)), (owner, (kinds[0] * classes + row)[member])),
            shape=(len(counts), classes * classes),
        )
        for row in kinds[1:]
    ]
    step = max(1, _BUDGET // max(len(counts), classes * classes))
    values: dict[str, list[Floats]] = {name: [] for name in wanted}
    for start in range(0, resamples, step):
        draws = rng.multinomial(n, counts / n, size=min(step, resamples - start)).astype(np.float64)
        confusions = [(draws @ cell).reshape(-1, classes, classes) for cell in cells]
        for name, statistic in wanted.items():
            values[name].append(np.mean([statistic(confusion) for confusion in confusions], axis=0))
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    result: dict[str, tuple[float, float]] = {}
    for name, parts in values.items():
        low, high = np.quantile(np.concatenate(parts), ends)
        result[name] = (float(low), float(high))
    return result
