"""Correlations against scipy's, and intervals and influences against slow ways to the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from eval.results.schema import Estimator
from eval.results.statistics import bootstrap, paired_bootstrap
from eval.shared.correlation import KINDS, Kind, correlation, influences, interval

LIBRARY: dict[Kind, Any] = {"spearman": spearmanr, "pearson": pearsonr}


def pairs(n: int, seed: int = 0, noise: float = 1.0, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 11, n) / 2 if ties else rng.normal(size=n)
    return truth + noise * rng.normal(size=n), truth


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [3, 8, 200])
def test_correlations_are_those_of_scipy(kind: Kind, n: int) -> None:
    many = [pairs(n, seed) for seed in range(4)]
    found = correlation(np.stack([x for x, _ in many]), np.stack([y for _, y in many]), kind)
    assert found.tolist() == pytest.approx([LIBRARY[kind](x, y)[0] for x, y in many])


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_has_no_correlation(kind: Kind) -> None:
    x = np.full(7, 0.1)  # whose mean is not 0.1 to the last bit
    assert np.isnan(correlation(x, np.arange(7.0), kind))
    assert np.isnan(correlation(np.arange(7.0), x, kind))
    assert np.isnan(interval([x], np.arange(7.0), kind, list(range(7)))).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ties", [True, False])
def test_influences_are_the_jackknife_of_each_item(kind: Kind, ties: bool) -> None:
    x, y = pairs(40, ties=ties)
    x[3] = x[4]
    found = influences(x, y, kind)
    whole = LIBRARY[kind](x, y)[0]
    assert found.mean() == pytest.approx(whole)
    without = np.array([LIBRARY[kind](np.delete(x, i), np.delete(y, i))[0] for i in range(40)])
    pseudo = 40 * whole - 39 * without
    np.testing.assert_allclose(found, pseudo - pseudo.mean() + whole, atol=1e-9)


def test_influences_of_an_item_without_which_all_is_constant_are_not_defined() -> None:
    assert np.isnan(influences(np.array([0.0, 0.0, 0.0, 1.0]), np.arange(4.0), "spearman")).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_influences_give_the_interval_of_the_bootstrap(kind: Kind) -> None:
    x, y = pairs(300)
    low, high = interval([x], y, kind, list(range(300)))
    records = [{"id": i, "value": value} for i, value in enumerate(influences(x, y, kind))]
    found = bootstrap(records, Estimator("value"))
    whole = LIBRARY[kind](x, y)[0]
    assert low < whole < high
    # They are equal to first order: the widths differed by at most 5% in 80 such draws.
    assert found.high - found.low == pytest.approx(high - low, rel=0.15)


def test_a_paired_comparison_by_influences_is_that_by_drawing_pairs() -> None:
    x, y = pairs(300)
    better = y + 0.5 * (x - y)
    sides = [[{"id": i, "v": v} for i, v in enumerate(influences(side, y, "spearman"))] for side in (x, better)]
    found = paired_bootstrap(sides[0], sides[1], Estimator("v"))
    rng = np.random.default_rng(5)
    index = rng.integers(0, 300, (2000, 300))
    draws = correlation(better[index], y[index], "spearman") - correlation(x[index], y[index], "spearman")
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), rel=0.1)


def test_copies_are_drawn_together_and_networks_are_averaged() -> None:
    x, y = pairs(40)
    plain = interval([x], y, "spearman", list(range(40)), resamples=400)
    doubled = interval([np.tile(x, 2)], np.tile(y, 2), "spearman", [*range(40), *range(40)], resamples=400)
    assert doubled == pytest.approx(plain, abs=0.06)  # other draws of the same items
    independent = interval([np.tile(x, 2)], np.tile(y, 2), "spearman", list(range(80)), resamples=400)
    assert independent[1] - independent[0] < 0.85 * (plain[1] - plain[0])
    assert interval([x, x], y, "spearman", list(range(40)), resamples=400) == plain
