"""Which spans of words are masked (SpanBERT, Joshi et al. 2020, section 3.1), for all rows of a batch at once."""

from __future__ import annotations

import numpy as np

_NONE = np.uint64(0xFFFFFFFFFFFFFFFF)
_LOW = np.uint64((1 << 24) - 1)


def choose_spans(
    starts: np.ndarray,
    ordinary: np.ndarray,
    words: np.ndarray,
    edges: np.ndarray | None = None,
    *,
    rate: float,
    span_p: float,
    span_max: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions of the targets, ascending, and for each the flat position of its span's first token.

    ``starts`` (B, L) bool: the token begins a word; ``ordinary`` (B, L) bool: it may be masked; ``words``
    (B, L + 1) uint64: random words of each row, one a position and one more. ``edges`` (B, L) bool: further tokens that
    no span from before them may hold, the first ones of packed documents.

    SpanBERT draws a length in words from Geo(``span_p``) conditioned on at most ``span_max``, then a first word
    uniformly, again and again until the budget of ``rate`` times the row's ordinary tokens is spent. Here every word
    has a length and a priority drawn for it, and spans are taken by priority: the same process but that no word comes
    up twice, without a loop over spans. Spans begin with a word, hold whole words and end before the next special
    token; one that meets an earlier one adds what that left. (The authors' code differs from their text: it draws
    again for a start that is masked already, cuts the last span at the budget, and gives spans that touch one fate.)

    The budget b is met in expectation and nearly in each row. Spans are taken whole while they hold at most b tokens
    together. The next one, which would exceed b, is taken with the probability that makes the expected number of
    targets exactly b. A row's number of targets is so less than one span away from b. A word with few words before it,
    in the row and since the last special token, lies in fewer spans, as in SpanBERT. Of one-token words at rate 0.15
    the first are targets with rate 0.044, 0.073, 0.098, and from the eighth on with 0.15.
    """
    rows, length = starts.shape
    if length > 1 << 24:
        raise ValueError(f"rows of {length} tokens: spans are numbered with 24 bits")
    allowed = np.count_nonzero(ordinary, axis=1)
    if not allowed.any():
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    budget = rate * allowed
    fits = budget.astype(np.int64)
    spans = _Spans(starts, ordinary, words, edges, span_p, span_max)
    # Spans beyond the budget change nothing, so a few times the number it holds is looked at before all of them.
    needed = rate * spans.per_row / spans.mean
    for share in (min(1.0, (2 * needed + 6 * needed**0.5 + 6) / spans.per_row), 1.0):
        best = spans.first_over_tokens(share)
        # Of the tokens in the order of their spans, the one at place floor(b) is the first that does not fit whole.
        last = np.sort(best, axis=1)[np.arange(rows), fits]
        if (last[allowed > 0] < _NONE).all():
            break

    taken = np.count_nonzero(best < last[:, None], axis=1)
    size = np.count_nonzero(best == last[:, None], axis=1)
    uniform = (words[:, length] >> np.uint64(11)) * 2.0**-53
    limit = last + (uniform * size < budget - taken)  # bool: one more lets the last span in
    targets = np.flatnonzero(best < limit[:, None])
    columns = (best.reshape(-1)[targets] & _LOW).astype(np.int64)
    return targets, targets - targets % length + columns


class _Spans:
    """The spans that could be taken, one at each word of ordinary tokens, and the order they are taken in.

    The upper 40 bits of a word's random number are its span's priority, the lower 24 set its length.
    """

    def __init__(
        self,
        starts: np.ndarray,
        ordinary: np.ndarray,
        drawn: np.ndarray,
        edges: np.ndarray | None,
        span_p: float,
        span_max: int,
    ) -> None:
        self._shape = starts.shape
        begins = np.flatnonzero(starts)
        # The last column of `drawn` belongs to the row, not to a position.
        self._drawn = drawn.reshape(-1)[begins + begins // starts.shape[1]]
        self._drawn[~ordinary.reshape(-1)[begins]] = _NONE
        self._edges = np.append(begins, starts.size)
        borders = ~ordinary  # tokens that no span from before them may hold
        borders[:, 0] = True
        if edges is not None:
            borders |= edges
        self._borders = np.append(np.flatnonzero(borders), starts.size)
        self.per_row = len(begins) / len(starts)
        survival = (1.0 - span_p) ** np.arange(span_max + 1)  # P(Geo(span_p) > n)
        longer = (survival - survival[-1]) / (1.0 - survival[-1])  # the same, given that it is at most span_max
        self.mean = float(longer.sum())
        self._longer = np.round(longer[:0:-1] * 2.0**24).astype(np.uint64)  # ascending, without P(length > 0) = 1

    def first_over_tokens(self, share: float) -> np.ndarray:
        """For each token (B, L) uint64 the first span in order that holds it, all ones for none.

        40 bits of priority, 24 of the column where the span begins. Looks at the spans whose priority is among the
        first ``share`` of all there are.
        """
        looked = np.flatnonzero(self._drawn < (_NONE if share == 1.0 else np.uint64(share * 2.0**64)))
        begins, drawn = self._edges[looked], self._drawn[looked]
        words = 1 + len(self._longer) - np.searchsorted(self._longer, drawn & _LOW, side="right")
        ends = np.minimum(
            self._edges[np.minimum(looked + words, len(self._edges) - 1)],
            self._borders[np.searchsorted(self._borders, begins, side="right")],
        )
        spans = drawn & ~_LOW | (begins % self._shape[1]).astype(np.uint64)
        order = np.argsort(spans)[::-1]  # of the writes to one place the last stays: the first span comes last
        begins, sizes = begins[order], (ends - begins)[order]
        past = np.cumsum(sizes)
        tokens = np.arange(sizes.sum()) + np.repeat(begins - past + sizes, sizes)
        best = np.full(self._shape, _NONE)
        best.reshape(-1)[tokens] = np.repeat(spans[order], sizes)
        return best
