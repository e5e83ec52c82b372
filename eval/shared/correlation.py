"""Spearman's and Pearson's correlation, their intervals over the items, and what each item adds to them.

A correlation is no ratio of two sums over the items, so records can't give it as they are. :func:`influences` gives a
number for each item whose mean is the correlation, and whose spread is that of the correlation (jackknife
pseudo-values, Tukey 1958). Two models are compared by them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eval.results.statistics import RESAMPLES, percentiles

Floats = NDArray[np.float64]
Kind = Literal["spearman", "pearson"]
KINDS: tuple[Kind, ...] = ("spearman", "pearson")
# Values held at once: 2^22 float64 are 32 MiB, of which a handful is alive.
_BUDGET = 2**22


def correlation(x: Floats, y: Floats, kind: Kind) -> Floats:
    """(...) correlations of x and y (..., n) over their last axis; ties have their mean rank.

    NaN where one of the two is constant: the correlation is not defined there.
    """
    if kind == "spearman":
        from scipy.stats import rankdata

        x, y = rankdata(x, axis=-1), rankdata(y, axis=-1)
    x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
    below = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    # Where all are one number, the mean is off by a rounding, and what is left is nothing but that.
    flat = np.minimum(np.ptp(x, axis=-1), np.ptp(y, axis=-1)) == 0
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(flat, np.nan, (x * y).sum(-1) / below)


def interval(
    x: Sequence[Floats],
    y: Floats,
    kind: Kind,
    ids: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the correlation of ``y`` (n,) with each of ``x`` ((n,) each), their mean where there are
    several: items are drawn with replacement, those of one id together.

    Draws in which the correlation is not defined are left out. NaN where most are.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, item in enumerate(ids):
        groups.setdefault(item, []).append(place)
    members = [np.array(group) for group in groups.values()]
    rng = np.random.default_rng(seed)
    draws: list[Floats] = []
    if len(members) == len(y):
        step = max(1, _BUDGET // len(y))
        for start in range(0, resamples, step):
            index = rng.integers(0, len(y), (min(step, resamples - start), len(y)))
            draws.append(np.mean([correlation(v[index], y[index], kind) for v in x], axis=0))
    else:
        for _ in range(resamples):
            index = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
            draws.append(np.mean([correlation(v[index], y[index], kind) for v in x], axis=0)[None])
    found = np.concatenate(draws)
    found = found[np.isfinite(found)]
    return percentiles(found, len(members)) if 2 * len(found) > resamples else (float("nan"), float("nan"))


def influences(x: Floats, y: Floats, kind: Kind) -> Floats:
    """(n,) numbers whose mean is the correlation: jackknife pseudo-values n r - (n - 1) r_i, moved to have that mean.

    r_i is the correlation without item i. NaN where the correlation is not defined, with or without an item.
    """
    n = len(y)
    whole = float(correlation(x, y, kind))
    left_out = np.concatenate([_without(x, y, part, kind) for part in _blocks(n)])
    found = n * whole - (n - 1) * left_out
    return found - found.mean() + whole


def _blocks(n: int) -> list[slice]:
    step = max(1, _BUDGET // n)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _without(x: Floats, y: Floats, part: slice, kind: Kind) -> Floats:
    """(b,) correlations without item i, for each i in ``part``. An item's rank falls by 1 without a lesser one, by
    half without an equal one."""
    n = len(y)
    kept = np.ones((part.stop - part.start, n))
    kept[np.arange(len(kept)), np.arange(part.start, part.stop)] = 0.0

    def centred(values: Floats) -> Floats:
        if kind == "spearman":
            from scipy.stats import rankdata

            rows = rankdata(values) - np.heaviside(values - values[part, None], 0.5)
        else:
            rows = np.broadcast_to(values, kept.shape)
        return (rows - (rows * kept).sum(1, keepdims=True) / (n - 1)) * kept

    a, b = centred(x), centred(y)
    below = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 1e-12 * max(1.0, float(below.max())), (a * b).sum(1) / below, np.nan)
