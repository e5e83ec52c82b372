"""Windows over a stream of tokens, or over each of its documents, each with the tokens that it is to predict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from data_pipeline.shards.shardset import concat_ranges
from eval.shared.scoring import PART_TOKENS, rows_of
from eval.tasks.language_modeling.spans import Ints


@dataclass(frozen=True)
class Windows:
    """Window w reads ``widths[w]`` tokens from ``starts[w]`` on and predicts the last ``scored[w]`` of those that come
    one later: the tokens of the stream in [first(w), last(w)). All arrays (W,) int64.

    ``ragged``: of many widths in no order, as windows of documents are; they are batched by width then.
    """

    starts: Ints
    widths: Ints
    scored: Ints
    ragged: bool = False

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def targets(self) -> int:
        """Tokens predicted by all windows."""
        return int(self.scored.sum())

    def bounds(self) -> tuple[Ints, Ints]:
        """The stretch of the stream that each window predicts, (first (W,), behind the last (W,))."""
        ends = self.starts + self.widths + 1
        return ends - self.scored, ends

    def parts(self) -> list[slice]:
        """Consecutive windows, of about :data:`PART_TOKENS` tokens together. They depend on the windows alone."""
        if self.ragged:
            return by_tokens(self.widths)
        step = max(1, PART_TOKENS // int(self.widths.max()))
        return [slice(start, min(start + step, len(self))) for start in range(0, len(self), step)]

    def batches(self, part: slice) -> Iterator[Ints]:
        """Numbers of windows of a part, so many of one shape as fit a forward pass, in order; ragged ones of about one
        width, the widest first."""
        if self.ragged:
            yield from by_size(self.widths, part)
            return
        shape = zip(self.widths[part].tolist(), self.scored[part].tolist(), strict=True)
        place = part.start
        for (width, _), group in groupby(shape):
            count, rows = len(list(group)), rows_of(width)
            for start in range(place, place + count, rows):
                yield np.arange(start, min(start + rows, place + count))
            place += count


def strided(available: int, length: int, stride: int, max_tokens: int | None) -> Windows:
    """Windows of ``length`` tokens, ``stride`` apart, over a stream of ``available`` + 1 tokens.

    The first predicts all that follow its tokens, each other one the ``stride`` tokens that none before it did: every
    token but the stream's first is predicted once, with at least ``length - stride + 1`` tokens before it except at
    the stream's start. The last one is shorter. With fewer ``max_tokens`` whole windows are spread evenly over the
    stream, so that they are a sample of all of it and not its first book, and each predicts ``stride`` tokens.
    """
    whole = 1 + (available - length) // stride if available >= length else 0
    if max_tokens is not None and max_tokens < available:
        if not whole:
            return _windows([0], [max_tokens], [max_tokens])
        count = min(max(max_tokens // stride, 1), whole)
        starts = np.arange(count, dtype=np.int64) * whole // count * stride
        return _windows(starts, np.full(count, length), np.full(count, min(stride, length)))
    starts = np.arange(whole, dtype=np.int64) * stride
    scored = np.full(whole, stride)
    scored[:1] = length
    widths = np.full(whole, length)
    left = available - int(scored.sum())
    if left:
        last = whole * stride if whole else 0
        starts, widths, scored = (
            np.append(starts, last),
            np.append(widths, available - last),
            np.append(scored, left),
        )
    return _windows(starts, widths, scored)


def strided_apart(edges: Ints, length: int, stride: int, max_tokens: int | None, seed: int) -> Windows:
    """The windows that :func:`strided` cuts, over each document by itself; document d is the tokens
    [``edges[d]``, ``edges[d + 1]``), its end included. No token is predicted from another document, and the first
    one of each is not predicted. With fewer ``max_tokens`` a sample, see :func:`thinned`."""
    available = np.maximum(np.diff(edges) - 1, 0)
    counts = np.where(available > 0, 1 - (np.minimum(length - available, 0) // stride), 0)
    document, number = np.repeat(np.arange(len(counts)), counts), concat_ranges(np.zeros_like(counts), counts)
    widths = np.minimum(length, available[document] - number * stride)
    scored = np.where(number > 0, widths - (length - stride), widths)
    kept = thinned(scored, max_tokens, seed)
    return Windows((edges[document] + number * stride)[kept], widths[kept], scored[kept], ragged=True)


def side_by_side(edges: Ints, length: int) -> tuple[Ints, Ints]:
    """Starts and sizes, each (W,), of windows of at most ``length`` tokens that fill each document by itself."""
    sizes = np.diff(edges)
    counts = -(-sizes // length)
    offsets = concat_ranges(np.zeros_like(counts), counts) * length
    return np.repeat(edges[:-1], counts) + offsets, np.minimum(length, np.repeat(sizes, counts) - offsets)


def thinned(tokens: Ints, wanted: int | None, seed: int) -> Ints:
    """Which windows, of ``tokens`` (W,) each, hold about ``wanted`` tokens together: rising numbers, at least one.

    One is drawn of each of equally many neighbours. Every n-th one would not do: of documents of n windows each it
    takes all the first ones, or none.
    """
    total = int(tokens.sum())
    if wanted is None or wanted >= total:
        return np.arange(len(tokens))
    count = max(1, wanted * len(tokens) // total)
    borders = np.arange(count + 1, dtype=np.int64) * len(tokens) // count
    return np.random.default_rng([seed, count]).integers(borders[:-1], borders[1:])


def by_tokens(sizes: Ints) -> list[slice]:
    """Consecutive windows of ``sizes`` (W,), of about :data:`PART_TOKENS` tokens together."""
    part = (np.cumsum(sizes) - sizes) // PART_TOKENS
    borders = [*np.flatnonzero(np.diff(part, prepend=-1)).tolist(), len(sizes)]
    return [slice(start, stop) for start, stop in pairwise(borders)]


def by_size(sizes: Ints, part: slice) -> Iterator[Ints]:
    """Numbers of a part's windows of ``sizes`` (W,), so many as fit a forward pass when each is filled up to the
    longest of its batch; the longest first, equal ones in order."""
    order = part.start + np.argsort(-sizes[part], kind="stable")
    place = 0
    while place < len(order):
        rows = rows_of(int(sizes[order[place]]))
        yield order[place : place + rows]
        place += rows


def _windows(starts: object, widths: object, scored: object) -> Windows:
    starts, widths, scored = (np.asarray(column, dtype=np.int64) for column in (starts, widths, scored))
    return Windows(starts, widths, scored)
