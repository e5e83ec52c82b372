"""Loss by position in the window: does more context help, as far as one pass over the text tells.

A mean over few windows says more of these windows' texts than of the position: with a stride below the length, only the
first window predicts its first tokens. So every mean has its interval and the number of its windows, and there is none
over fewer than :data:`FEWEST`. ``nystrom eval context`` asks the same with the same tokens under every context.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.results.schema import Series, Table
from eval.results.statistics import LEVEL

POSITION_SERIES = "loss by position"
FEWEST = 10
"""Windows that a mean must be over: of fewer, a t interval depends on how their losses are distributed."""
COLUMNS = ["position in the window", "tokens", "windows", "loss, nats/token", "low", "high"]

Floats = NDArray[np.float64]


def bucket_edges(length: int) -> list[int]:
    """0, 8, 16, 32 and so on, the last at least ``length``."""
    edges = [0, 8]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return edges


def position_sums(nats: Floats, scored: NDArray[np.bool_], edges: list[int]) -> Floats:
    """What mean and interval of each bucket follow from, (7, buckets), of windows with ``nats`` (W, N) where ``scored``
    (W, N) is set: the windows with a token in it, sums over them of tokens t and nats s, of t², s², t·s, and of the
    tokens' positions. Those of several batches are added."""
    column = np.arange(nats.shape[1])
    member = (np.searchsorted(edges, column, side="right") - 1)[:, None] == np.arange(len(edges) - 1)
    tokens = scored.astype(np.float64) @ member
    sums = np.where(scored, nats, 0.0) @ member
    places = (scored * column).astype(np.float64) @ member
    rows = [tokens > 0, tokens, sums, tokens**2, sums**2, tokens * sums, places]
    return np.stack([row.sum(0, dtype=np.float64) for row in rows])


def by_position(totals: Floats, length: int, stride: int) -> tuple[list[Series], Table]:
    """The curve, of the buckets with enough windows (none for fewer than two), and the table of all buckets.

    ``totals``: see :func:`position_sums`. x is the mean position of the bucket's tokens. The loss is a ratio of two
    sums over the windows; its interval is that of its linearization (Cochran 1977, section 6.3) by Student's t.
    """
    points: list[list[float]] = []
    rows: list[list[Any]] = []
    few = False
    for (begin, end), values in zip(pairwise(bucket_edges(length)), totals.T, strict=False):
        windows, tokens, nats, _, _, _, places = values.tolist()
        if not tokens:
            continue
        row: list[Any] = [f"{begin} to {min(end, length) - 1}", int(tokens), int(windows)]
        if windows < FEWEST:
            rows.append([*row, None, None, None])
            few = True
            continue
        loss, half = nats / tokens, _half_width(values)
        rows.append([*row, loss, loss - half, loss + half])
        points.append([places / tokens, loss, loss - half, loss + half])
    note = "Intervals (95%) are over the windows."
    if few:
        note += f" Means over fewer than {FEWEST} windows are left out: they are of these windows' texts."
    if stride < length:
        note += (
            f" With a stride of {stride} only the first window of a text predicts the tokens before position "
            f"{length - stride}: leave the stride out to see them."
        )
    table = Table(POSITION_SERIES, COLUMNS, rows, note)
    if len(points) < 2:
        return [], table
    x, y, low, high = (list(column) for column in zip(*points, strict=True))
    labels = "position in the window, tokens", "loss, nats per token"
    return [Series(POSITION_SERIES, x, y, *labels, low=low, high=high)], table


def _half_width(values: Floats) -> float:
    from scipy.stats import t

    windows, tokens, nats, tokens2, nats2, product, _ = values.tolist()
    loss = nats / tokens
    squares = max(nats2 - 2 * loss * product + loss**2 * tokens2, 0.0)
    error = math.sqrt(squares * windows / (windows - 1)) / tokens
    return float(t.ppf((1 + LEVEL) / 2, windows - 1)) * error
