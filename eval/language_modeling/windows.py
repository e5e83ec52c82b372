"""Windows over a stream of tokens, each with the tokens that it is to predict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from eval.language_modeling.measures import PART_TOKENS, rows_of
from eval.language_modeling.spans import Ints


@dataclass(frozen=True)
class Windows:
    """Window w reads ``widths[w]`` tokens from ``starts[w]`` on and predicts the last ``scored[w]`` of those that come
    one later: the tokens of the stream in [first(w), last(w)). All arrays (W,) int64."""

    starts: Ints
    widths: Ints
    scored: Ints

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
        step = max(1, PART_TOKENS // int(self.widths.max()))
        return [slice(start, min(start + step, len(self))) for start in range(0, len(self), step)]

    def batches(self, part: slice) -> Iterator[Ints]:
        """Numbers of windows of a part, so many of one shape as fit a forward pass, in order."""
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


def _windows(starts: object, widths: object, scored: object) -> Windows:
    return Windows(*(np.asarray(column, dtype=np.int64) for column in (starts, widths, scored)))
