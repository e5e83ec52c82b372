"""Scores and intervals of classification against scikit-learn, naive loops and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, matthews_corrcoef

from eval.results.schema import Estimator
from eval.results.statistics import bootstrap
from eval.tasks.classification import metrics
from eval.tasks.classification.metrics import Predictions, brier, calibration_error, intervals, reliability, scores


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    counts = np.zeros((classes, classes))
    for t, p in zip(truth, predicted, strict=True):
        counts[t, p] += 1
    return counts


@pytest.mark.parametrize("classes", [2, 5])
def test_statistics_of_confusion_counts_are_those_of_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    tables, expected = [], []
    for _ in range(20):
        truth = rng.integers(0, classes, 30)
        predicted = np.where(rng.random(30) < 0.6, truth, rng.integers(0, max(classes - 1, 1), 30))
        tables.append(confusion(truth, predicted, classes))
        expected.append(
            [
                accuracy_score(truth, predicted),
                f1_score(truth, predicted, average="macro", zero_division=0.0),
                matthews_corrcoef(truth, predicted),
                f1_score(truth == 1, predicted == 1, zero_division=0.0),
            ]
        )
    found = [statistic(np.stack(tables)) for statistic in metrics.statistics(positive=1).values()]
    assert list(metrics.statistics(positive=1)) == ["accuracy", "macro_f1", "mcc", "f1"]
    np.testing.assert_allclose(np.stack(found, 1), expected, atol=1e-12)
    constant = confusion(np.array([0, 1, 0]), np.zeros(3, dtype=int), classes)
    assert metrics.mcc_of(constant) == 0.0
    assert metrics.macro_f1_of(constant) == pytest.approx(0.4)  # the class that neither has does not count


def test_brier_score_is_scikit_learns_and_has_its_closed_forms() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), size=50)
    truth = rng.integers(0, 4, 50)
    expected = brier_score_loss(truth, probabilities, labels=range(4), scale_by_half=False)
    assert brier(truth, probabilities).mean() == pytest.approx(expected, rel=1e-12)
    uniform = np.full((3, 4), 0.25)
    np.testing.assert_allclose(brier(np.arange(3), uniform), 0.75)  # (1 - 1/4)^2 + 3 / 16
    np.testing.assert_array_equal(brier(np.array([0, 1]), np.eye(2)[[0, 0]]), [0.0, 2.0])


def naive_ece(truth: np.ndarray, predicted: np.ndarray, confidence: np.ndarray, bins: int) -> float:
    total = 0.0
    for i in range(bins):
        inside = [k for k, c in enumerate(confidence) if i / bins < c <= (i + 1) / bins]
        if inside:
            accuracy = sum(truth[k] == predicted[k] for k in inside) / len(inside)
            total += len(inside) / len(truth) * abs(accuracy - sum(confidence[k] for k in inside) / len(inside))
    return total


def test_calibration_error_equals_a_naive_loop_and_closed_forms() -> None:
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.full(3, 0.4), size=400)
    truth = rng.integers(0, 3, 400)
    found = Predictions(probabilities.argmax(1), probabilities)
    expected = naive_ece(truth, found.classes, probabilities.max(1), 15)
    assert calibration_error(truth, found) == pytest.approx(expected, rel=1e-12)
    assert expected > 0.05
    # Sure and right half of the time: off by one half. Sure and always right: not off.
    sure = Predictions(np.zeros(10, dtype=int), np.tile([1.0, 0.0], (10, 1)))
    assert calibration_error(np.arange(10) % 2, sure) == pytest.approx(0.5)
    assert calibration_error(np.zeros(10, dtype=int), sure) == 0.0
    # A bin holds its upper end and not its lower one.
    bins = reliability(np.array([0.5, 0.6, 1.0]), np.array([True, False, True]), bins=2)
    assert [b.n for b in bins] == [1, 2]
    assert (bins[0].accuracy, bins[1].accuracy) == (1.0, 0.5)


def test_scores_of_one_predictor() -> None:
    truth = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]])
    found = scores(truth, Predictions(probabilities.argmax(1), probabilities), positive=1)
    assert list(found) == ["accuracy", "macro_f1", "mcc", "f1", "brier", "ece"]
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx(0.8)
    assert found["mcc"] == pytest.approx(1 / np.sqrt(3))
    assert "f1" not in scores(truth, Predictions(probabilities.argmax(1), probabilities))


def test_intervals_are_those_of_drawing_items() -> None:
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 3, 80)
    predicted = np.stack([np.where(rng.random(80) < p, truth, rng.integers(0, 3, 80)) for p in (0.6, 0.8)])
    found = intervals(truth, predicted, 3, metrics.statistics(), resamples=4000)
    draws = []
    for _ in range(1500):
        items = rng.integers(0, 80, 80)
        tables = [confusion(truth[items], run[items], 3) for run in predicted]
        draws.append(np.mean([metrics.mcc_of(table) for table in tables]))
    assert found["mcc"] == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.02)
    # The accuracy's is that of the records' bootstrap, up to the noise of 2000 draws.
    records = [{"id": str(i), "correct": float(x)} for i, x in enumerate((predicted == truth).mean(0))]
    interval = bootstrap(records, Estimator("correct"))
    assert found["accuracy"] == pytest.approx((interval.low, interval.high), abs=0.015)
    assert intervals(truth, predicted, 3, metrics.statistics(), resamples=4000) == found


def test_intervals_of_copies_are_those_of_the_items() -> None:
    """Twenty texts ten times each say what twenty texts say."""
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, 20)
    predicted = np.stack([np.where(rng.random(20) < 0.7, truth, 1 - truth)])
    ids = [str(i) for i in range(20)]
    once = intervals(truth, predicted, 2, metrics.statistics(), ids=ids)
    assert intervals(truth, predicted, 2, metrics.statistics()) == once
    tenfold = intervals(np.tile(truth, 10), np.tile(predicted, 10), 2, metrics.statistics(), ids=ids * 10)
    for name, bounds in once.items():
        assert tenfold[name] == pytest.approx(bounds)
    as_if_all_were_items = intervals(np.tile(truth, 10), np.tile(predicted, 10), 2, metrics.statistics())
    assert np.diff(as_if_all_were_items["accuracy"]) < 0.5 * np.diff(once["accuracy"])
