"""Uncertainty of what is measured on a sample of items: the bootstrap, for one model and for two on the same items.

Items are drawn, not records. Records of one ``id`` (the same text scored with several seeds, or a text that stands
twice in a test file) are not independent, so they are drawn together. Every metric here is a function of two sums over
the items (:class:`eval.results.schema.Estimator`), so a draw costs two sums.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from eval.results.schema import Estimator

LEVEL = 0.95
RESAMPLES = 2000
FEW = 30
"""Below so many items a percentile interval is clearly too narrow (of 5 items it holds the truth in 83% of cases, not
in 95%; widened in 91%), so it is widened, and what prints it says how few they are."""
# Indices drawn at once: 2^22 of them and what they pick are 64 MiB.
_BUDGET = 2**22

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Percentile interval of a bootstrap over ``n`` items, of a proportion Wilson's: NaN bounds for fewer than two
    items, or where a draw is not finite.

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

    Of a proportion, where each item counts as all or nothing, it is the score interval (Wilson 1927): a bootstrap of
    items that are all right says that nothing else can be. Of fewer than :data:`FEW` items it is expanded (Hesterberg
    2015, section 5.3), which makes it as wide as Student's t.

    Raises :class:`UserError` for records without the numbers that the estimator names.
    """
    _, sums = _sums(records, estimator)
    if len(sums) > 1 and _is_proportion(sums, estimator):
        low, high = wilson(_value(sums, estimator), float(sums[:, 1].sum() ** 2 / np.square(sums[:, 1]).sum()))
    else:
        low, high = percentiles(_statistic(_resample(sums, resamples, seed), estimator), len(sums))
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
    low, high = percentiles(change, len(a))
    value = _value(b, estimator) - _value(a, estimator)
    p = float("nan")
    if np.isfinite(change).all() and len(a) > 1:
        side = min(int((change <= 0).sum()), int((change >= 0).sum()))
        p = _expanded_p(min(1.0, 2 * (side + 1) / (len(change) + 1)), len(a))
    return Interval(value, low, high, len(a), p)


def _sums(records: Sequence[dict[str, Any]], estimator: Estimator) -> tuple[list[Hashable], Floats]:
    """Items and, (n, 2), their sums of numerator and denominator. A null is NaN: a metric with one has no value."""
    records = estimator.counted(records)
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


def wilson(share: float, n: float) -> tuple[float, float]:
    """The score interval of a proportion ``share`` of ``n`` items (Wilson 1927); of unequal items, of so many equal
    ones as say as much (Kish 1965)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(share * (1 - share), 0.0) / n + z * z / (4 * n * n))
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def _is_proportion(sums: Floats, estimator: Estimator) -> bool:
    """Whether each item is all right or all wrong, of a figure that is the share of what is right."""
    top, bottom = sums.T
    plain = estimator.scale == 1.0 and not estimator.exponential
    return plain and bool((bottom > 0).all() and ((top == 0) | (top == bottom)).all())


def percentiles(draws: Floats, n: int) -> tuple[float, float]:
    """The interval of a statistic from its ``draws`` over ``n`` items, expanded for few; NaN where one is not
    finite."""
    if n < 2 or not np.isfinite(draws).all():
        return float("nan"), float("nan")
    tail = (1 - LEVEL) / 2
    if n < FEW:
        from scipy.stats import norm, t

        tail = float(norm.cdf(-math.sqrt(n / (n - 1)) * t.ppf(1 - tail, n - 1)))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _expanded_p(p: float, n: int) -> float:
    """The level at which the expanded interval reaches zero, where the plain one does at ``p``."""
    if n >= FEW or p >= 1.0:
        return p
    from scipy.stats import norm, t

    return float(2 * t.cdf(norm.ppf(p / 2) / math.sqrt(n / (n - 1)), n - 1))


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
