"""Uncertainty of what is measured on a sample of items: the bootstrap, for one model and for two on the same items.

Items are drawn, not records. Records of one ``id`` (the same text scored with several seeds, or a text that stands
twice in a test file) are not independent, so they are drawn together. Every metric here is a function of two sums over
the items (:class:`eval.results.schema.Estimator`), so a draw costs two sums.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from eval.results.schema import Estimator

LEVEL = 0.95
RESAMPLES = 2000
# Indices drawn at once: 2^22 of them and what they pick are 64 MiB.
_BUDGET = 2**22

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Percentile interval of a bootstrap over ``n`` items: NaN bounds for fewer than two, or where a draw is not
    finite.

    ``p`` (paired comparisons): two-sided, the level at which the interval would just reach zero.
    """

    value: float
    low: float
    high: float
    n: int
    p: float | None = None


def estimate(records: Sequence[dict[str, Any]], estimator: Estimator) -> float:
    """The metric on all records; NaN without any."""
    return _value(_sums(records, estimator)[1], estimator)


def bootstrap(
    records: Sequence[dict[str, Any]], estimator: Estimator, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The metric with its percentile interval (Efron 1979): as many items as there are, drawn with replacement.

    Raises :class:`UserError` for records without the numbers that the estimator names.
    """
    _, sums = _sums(records, estimator)
    low, high = _quantiles(_statistic(_resample(sums, resamples, seed), estimator), len(sums))
    return Interval(_value(sums, estimator), low, high, len(sums))


def paired_bootstrap(
    first: Sequence[dict[str, Any]],
    second: Sequence[dict[str, Any]],
    estimator: Estimator,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The metric of ``second`` minus that of ``first`` over the items both have, drawn together (Koehn 2004).

    ``p`` is twice the smaller share of draws on one side of zero, zero itself counted with both, and the observed
    difference counted as a draw (Davison and Hinkley 1997, 4.11): never 0, and 1 for two models that agree everywhere.
    Raises :class:`UserError` where the two have no item in common.
    """
    ids, a = _sums(first, estimator)
    other, b = _sums(second, estimator)
    place = {item: row for row, item in enumerate(other)}
    common = [(row, place[item]) for row, item in enumerate(ids) if item in place]
    if not common:
        raise UserError("the two have no item in common: they were measured on different data")
    rows = np.array(common)
    a, b = a[rows[:, 0]], b[rows[:, 1]]
    draws = _resample(np.concatenate([a, b], 1), resamples, seed)
    with np.errstate(invalid="ignore"):  # two perplexities beyond the range of floats
        change = _statistic(draws[:, 2:], estimator) - _statistic(draws[:, :2], estimator)
    low, high = _quantiles(change, len(a))
    value = _value(b, estimator) - _value(a, estimator)
    p = float("nan")
    if np.isfinite(change).all() and len(a) > 1:
        side = min(int((change <= 0).sum()), int((change >= 0).sum()))
        p = min(1.0, 2 * (side + 1) / (len(change) + 1))
    return Interval(value, low, high, len(a), p)


def _sums(records: Sequence[dict[str, Any]], estimator: Estimator) -> tuple[list[Hashable], Floats]:
    """Items and, (n, 2), their sums of numerator and denominator. A null is NaN: a metric with one has no value."""
    names = [estimator.numerator, *([] if estimator.denominator is None else [estimator.denominator])]
    try:
        columns = [np.array([record[name] for record in records], dtype=np.float64) for name in names]
    except KeyError as error:
        raise UserError(f"the records have no field {error}, of which the metric is computed") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"the records' {' or '.join(names)} is not a number everywhere: {error}") from None
    if estimator.denominator is None:
        columns.append(np.ones(len(records)))
    rows: dict[Hashable, int] = {}
    groups = np.array([rows.setdefault(record.get("id", i), len(rows)) for i, record in enumerate(records)], dtype=int)
    return list(rows), np.stack([np.bincount(groups, weights=c, minlength=len(rows)) for c in columns], 1)


def _value(sums: Floats, estimator: Estimator) -> float:
    return float(_statistic(sums.sum(0, keepdims=True), estimator)[0])


def _statistic(sums: Floats, estimator: Estimator) -> Floats:
    """The metric (R,) from sums (R, 2); NaN where there is nothing to divide by."""
    bottom = np.where(sums[:, 1] == 0, np.nan, sums[:, 1])
    value = estimator.scale * sums[:, 0] / bottom
    with np.errstate(over="ignore"):
        return np.exp(value) if estimator.exponential else value


def _quantiles(draws: Floats, n: int) -> tuple[float, float]:
    if n < 2 or not np.isfinite(draws).all():
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resample(columns: Floats, resamples: int, seed: int) -> Floats:
    """Sums of the columns over ``resamples`` draws of as many rows as there are, (resamples, columns)."""
    n = len(columns)
    if n == 0:
        return np.zeros((resamples, columns.shape[1]))
    rng = np.random.default_rng(seed)
    step = max(1, _BUDGET // n)
    sums = []
    for start in range(0, resamples, step):
        index = rng.integers(0, n, (min(step, resamples - start), n))
        sums.append(np.stack([column[index].sum(1) for column in columns.T], 1))
    return np.concatenate(sums)
