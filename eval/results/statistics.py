"""Uncertainty of what is measured on a sample of items: the bootstrap, for one model and for two on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from eval.results.schema import Estimator

LEVEL = 0.95
RESAMPLES = 2000
# Items drawn at once: 2^24 indices are 128 MiB.
_BUDGET = 2**24

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Percentile interval of a bootstrap; ``p`` (paired comparisons): twice the smaller share on one side of zero."""

    value: float
    low: float
    high: float
    n: int
    p: float | None = None


def estimate(records: Sequence[dict[str, Any]], estimator: Estimator) -> float:
    """The metric on all records; NaN without any."""
    top, bottom = _columns(records, estimator)
    return float(_statistic(top.sum(), bottom.sum(), estimator)) if len(top) else float("nan")


def bootstrap(
    records: Sequence[dict[str, Any]], estimator: Estimator, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The metric with its percentile interval over the records (Efron 1979): items drawn with replacement."""
    top, bottom = _columns(records, estimator)
    draws = _resample(np.stack([top, bottom], 1), resamples, seed)
    values = _statistic(draws[:, 0], draws[:, 1], estimator)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(_statistic(top.sum(), bottom.sum(), estimator)), float(low), float(high), len(top))


def paired_bootstrap(
    first: Sequence[dict[str, Any]],
    second: Sequence[dict[str, Any]],
    estimator: Estimator,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The metric of ``second`` minus that of ``first`` over the items both have, drawn together (Koehn 2004).

    Raises :class:`UserError` where the two have no item in common.
    """
    by_id = {record["id"]: record for record in second}
    pairs = [(record, by_id[record["id"]]) for record in first if record["id"] in by_id]
    if not pairs:
        raise UserError("the two have no item in common: they were measured on different data")
    a, b = (_columns([pair[side] for pair in pairs], estimator) for side in (0, 1))
    draws = _resample(np.stack([*a, *b], 1), resamples, seed)
    change = _statistic(draws[:, 2], draws[:, 3], estimator) - _statistic(draws[:, 0], draws[:, 1], estimator)
    value = _statistic(b[0].sum(), b[1].sum(), estimator) - _statistic(a[0].sum(), a[1].sum(), estimator)
    low, high = np.quantile(change, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    p = min(1.0, 2 * min(float((change <= 0).mean()), float((change >= 0).mean())))
    return Interval(float(value), float(low), float(high), len(pairs), p)


def _columns(records: Sequence[dict[str, Any]], estimator: Estimator) -> tuple[Floats, Floats]:
    top = np.array([record[estimator.numerator] for record in records], dtype=np.float64)
    if estimator.denominator is None:
        return top, np.ones_like(top)
    return top, np.array([record[estimator.denominator] for record in records], dtype=np.float64)


def _statistic(top: Any, bottom: Any, estimator: Estimator) -> Any:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value = estimator.scale * np.asarray(top, dtype=np.float64) / bottom
        return np.exp(value) if estimator.exponential else value


def _resample(columns: Floats, resamples: int, seed: int) -> Floats:
    """Sums of the columns over ``resamples`` draws of as many rows as there are, (resamples, columns)."""
    rng = np.random.default_rng(seed)
    n = len(columns)
    step = max(1, _BUDGET // max(n, 1))
    sums = []
    for start in range(0, resamples, step):
        index = rng.integers(0, n, (min(step, resamples - start), n))
        sums.append(np.stack([column[index].sum(1) for column in columns.T], 1))
    return np.concatenate(sums)
