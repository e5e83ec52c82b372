"""Several sources in fixed proportions: which source each draw takes, by arithmetic from the number of the draw.

Draws are dealt to the sources so that after any number of them each source has had its share to within one draw. With
random numbers this holds on average only. The method is that of Tijdeman 1980, "The chairman assignment problem". The
sequence repeats every 65,536 draws and is tabulated once, so what any draw takes, and how much of each source was used
by then, is found in constant time: a resume costs nothing. Weights may change where a stage of the curriculum begins.
Each source counts its own draws through all changes and so goes through its own epochs, every block once in each.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from heapq import heappop, heappush

import numpy as np

from data_pipeline.batches.blocks import Blocks, StreamBlocks
from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet

PERIOD = 1 << 16
"""Draws after which the sequence of sources repeats; weights are rounded to multiples of 1/PERIOD."""


def quotas(weights: Sequence[float], names: Sequence[str] | None = None) -> tuple[int, ...]:
    """Draws of each source in a period: weights of any scale, rounded to a sum of ``PERIOD`` by largest remainder.

    Raises :class:`UserError` for negative weights, for weights without a positive one, and for a positive weight that
    would be rounded to nothing. ``names`` name the sources in messages.
    """
    names = names or [str(i) for i in range(len(weights))]
    for name, weight in zip(names, weights, strict=True):
        if not 0.0 <= weight < float("inf"):
            raise UserError(f"the weight of source {name} is {weight}: give a number that is not negative")
    exact = [Fraction(weight) for weight in weights]  # floats are binary fractions: no rounding before the one meant
    total = sum(exact)
    if not total:
        raise UserError(f"all weights are 0 ({', '.join(names)}): at least one source must be read")
    shares = [weight * PERIOD / total for weight in exact]
    out = [int(share) for share in shares]
    by_remainder = sorted(range(len(out)), key=lambda s: (out[s] - shares[s], s))
    for s in by_remainder[: PERIOD - sum(out)]:
        out[s] += 1
    for name, weight, quota in zip(names, weights, out, strict=True):
        if weight and not quota:
            raise UserError(
                f"the weight of source {name}, {weight}, is less than one draw in {PERIOD:,} beside the others: "
                "raise it, or leave the source out (weight 0)"
            )
    return tuple(out)


def chairman_sequence(counts: Sequence[int]) -> np.ndarray:
    """A sequence of sources, ``counts[s]`` times s, whose every prefix is nearly proportional to ``counts``.

    After n of N = sum(counts) places, source s stands on n * counts[s] / N places to within 1 - 1 / (2k - 2). Here k is
    the number of sources with a positive count. No better bound is possible (Tijdeman 1980, theorem 1). The j-th place
    of s may come once n * counts[s] / N - (j - 1) reaches 1 / (2k - 2). It must come before that exceeds 1 - 1 / (2k -
    2). Of those that may come, the one with the earliest deadline does. Returns (N,) int64.
    """
    total = sum(counts)
    present = [s for s, count in enumerate(counts) if count]
    if len(present) == 1:
        return np.full(total, present[0], dtype=np.int64)
    release, deadline = [], []
    d = 2 * len(present) - 2
    for s in present:
        j = np.arange(1, counts[s] + 1, dtype=np.int64)
        divisor = d * counts[s]
        release.append(-(-((j - 1) * d + 1) * total // divisor))
        deadline.append((j * d - 1) * total // divisor)
    # One integer for each place: ordered by deadline, it tells the source.
    keys = np.concatenate(deadline) * len(counts) + np.repeat(present, [counts[s] for s in present])
    order = np.argsort(np.concatenate(release), kind="stable")
    waiting = keys[order].tolist()
    released = np.searchsorted(np.concatenate(release)[order], np.arange(1, total + 1), side="right").tolist()
    out, begin = [0] * total, 0
    heap: list[int] = []
    for place, end in enumerate(released):
        for i in range(begin, end):
            heappush(heap, waiting[i])
        begin = end
        out[place] = heappop(heap)
    return np.array(out, dtype=np.int64) % len(counts)


class _Table:
    """The period of one set of quotas."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        self.counts = np.array(counts, dtype=np.int64)
        self.source = chairman_sequence(counts)
        # own[i]: how many places before i the source of place i has in the period.
        self.own = np.empty(PERIOD, dtype=np.int64)
        self.own[np.argsort(self.source, kind="stable")] = np.concatenate([np.arange(count) for count in counts])

    def used(self, draws: int) -> np.ndarray:
        """(S,) int64, draws of each source among the first ``draws``."""
        periods, rest = divmod(draws, PERIOD)
        return periods * self.counts + np.bincount(self.source[:rest], minlength=len(self.counts))


@dataclass(frozen=True)
class _Span:
    first: int
    before: np.ndarray  # (S,) draws of each source before `first`
    table: _Table


class MixturePlan:
    """Which source each draw of a run takes, and which draw of that source it is.

    ``stages``: for each stage its first draw (increasing from 0) and its quotas (see :func:`quotas`), equally many in
    all. The sequence starts anew where quotas change, and continues at an edge without a change.
    """

    def __init__(self, stages: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        if not stages or stages[0][0] != 0:
            raise ValueError("the first stage of a mixture begins at draw 0")
        self.num_sources = len(stages[0][1])
        self._changes: list[tuple[int, tuple[int, ...]]] = []
        for first, counts in stages:
            if len(counts) != self.num_sources or sum(counts) != PERIOD or min(counts) < 0:
                raise ValueError(f"quotas {counts} are not {self.num_sources} counts that sum to {PERIOD}")
            if not self._changes or counts != self._changes[-1][1]:
                self._changes.append((first, counts))
        self._firsts = [first for first, _ in self._changes]
        if self._firsts != sorted(set(self._firsts)):
            raise ValueError(f"the stages of a mixture must begin at increasing draws, got {self._firsts}")
        self._spans: list[_Span] = []
        self._making = threading.Lock()  # the loader's thread and the consumer both ask

    def place(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sources, own draws), each like ``draws`` (int64, any shape, >= 0): whose draw it is, and its number there.

        The draws of a source are numbered 0, 1, 2, ... in the order of the run.
        """
        draws = np.asarray(draws, dtype=np.int64)
        if self.num_sources == 1 or not draws.size:
            return np.zeros_like(draws), draws
        low, high = (bisect_right(self._firsts, int(edge)) - 1 for edge in (draws.min(), draws.max()))
        if low == high:
            return self._place(self._span(low), draws)
        sources, own = np.empty_like(draws), np.empty_like(draws)
        spans = np.searchsorted(self._firsts, draws, side="right") - 1
        for number in range(low, high + 1):
            here = spans == number
            sources[here], own[here] = self._place(self._span(number), draws[here])
        return sources, own

    def counts(self, draw: int) -> np.ndarray:
        """(S,) int64: how many of the draws before ``draw`` each source has had."""
        if self.num_sources == 1:
            return np.array([draw], dtype=np.int64)
        span = self._span(bisect_right(self._firsts, draw) - 1)
        return span.before + span.table.used(draw - span.first)

    def _place(self, span: _Span, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        periods, places = np.divmod(draws - span.first, PERIOD)
        sources = span.table.source[places]
        return sources, span.before[sources] + periods * span.table.counts[sources] + span.table.own[places]

    def _span(self, number: int) -> _Span:
        """Tabulated when first needed: 40 ms each, and a run that never changes its weights needs one."""
        with self._making:
            while len(self._spans) <= number:
                first, counts = self._changes[len(self._spans)]
                before = np.zeros(self.num_sources, dtype=np.int64)
                if self._spans:
                    last = self._spans[-1]
                    before = last.before + last.table.used(first - last.first)
                self._spans.append(_Span(first, before, _Table(counts)))
            return self._spans[number]


@dataclass(frozen=True)
class TrainingData:
    """The sources of a run, equally long blocks of one tokenizer's tokens, and how they are mixed.

    Raises :class:`UserError` for sources of different tokenizers, naming both folders.
    """

    names: tuple[str, ...]
    blocks: tuple[Blocks, ...]
    mixture: MixturePlan

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.blocks) == self.mixture.num_sources:
            raise ValueError(
                f"{len(self.names)} names, {len(self.blocks)} sources, a mixture of {self.mixture.num_sources}"
            )
        if len({blocks.block_length for blocks in self.blocks}) != 1:
            raise ValueError("the sources have blocks of different lengths")
        for blocks in self.blocks:
            if blocks.shards.tokenizer_hash != self.shards.tokenizer_hash:
                raise UserError(
                    f"the shards in {blocks.shards.path} were made with another tokenizer than those in "
                    f"{self.shards.path}: prepare both with the same"
                )

    @classmethod
    def single(cls, blocks: Blocks, name: str = "train") -> TrainingData:
        """One source and nothing to mix."""
        return cls((name,), (blocks,), MixturePlan([(0, (PERIOD,))]))

    @classmethod
    def stream(cls, shards: ShardSet, block_length: int) -> TrainingData:
        """One source, its documents laid end to end."""
        return cls.single(StreamBlocks(shards, block_length))

    @property
    def shards(self) -> ShardSet:
        """Of the first source; vocabulary and special tokens are those of all."""
        return self.blocks[0].shards

    @property
    def block_length(self) -> int:
        """Tokens of a block of any source."""
        return self.blocks[0].block_length

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all shards together."""
        return sum(blocks.shards.num_tokens for blocks in self.blocks)

    def epochs(self, draws: int) -> dict[str, float]:
        """How often each source was gone through after so many draws of the run."""
        used = self.mixture.counts(draws)
        return {
            name: int(count) / blocks.num_blocks
            for name, count, blocks in zip(self.names, used, self.blocks, strict=True)
        }
