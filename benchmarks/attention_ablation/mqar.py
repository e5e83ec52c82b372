"""Multi-query associative recall as a task to train on: the rows of :mod:`eval.tasks.recall.mqar`.

No query finds a pair in its window, so that what is measured is recall from far back. The default gap is the distance
over which the local parts of the base model pass information through all its layers: layers * max(window, convolution's
kernel).

The target of a query is its value, at the query's own position (also for a causal model: the value is not in the input
again). Nothing else is a target. ``mlm`` reads the same rows bidirectionally.

With several numbers of pairs each training row draws one of them, and held-out rows, as many of each, are scored by it:
one training ranks from easy to hard, and the easy rows teach what the hard ones need (Zoology trains such mixes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.attention_ablation.tasks import (
    HELD_OUT,
    TRAIN,
    DistanceBins,
    Examples,
    Far,
    Ints,
    Shape,
    examples,
    generator,
    no_labels,
    slices,
)
from data_pipeline.errors import UserError
from eval.tasks.recall.mqar import draw, slots

FILLER = 16
"""Ids 0 to 15."""


class Recall(NamedTuple):
    """Rows of the task."""

    inputs: Ints
    """(B, N)."""
    labels: Ints
    """(B, N)."""
    distance: Ints
    """(B, N), tokens from a query back to its key's first place; 0 elsewhere."""


@dataclass(frozen=True)
class MultiQueryRecall:
    """The task. ``window``: tokens, the unit of distances."""

    shape: Shape
    vocab_size: int
    pairs: tuple[int, ...]
    """Numbers of pairs, rising."""
    gap: int
    window: int
    name: str = "mqar"
    main: str = "accuracy"

    def __post_init__(self) -> None:
        if min(self.pairs) < 1 or self.gap < 0:
            raise UserError(f"--pairs {min(self.pairs)} and --gap {self.gap}: at least one pair and no negative gap")
        most = max(self.pairs)
        if self.half < most:
            raise UserError(
                f"a vocabulary of {self.vocab_size} has {max(self.half, 0)} keys ({FILLER} ids are filler, the rest is "
                f"halved), {most} pairs need as many: --set vocab_size={FILLER + 2 * most} or more, or fewer --pairs"
            )
        if slots(self.shape.seq_len, most, self.gap) < most:
            raise UserError(
                f"rows of {self.shape.seq_len} tokens have no room for {most} queries behind {most} pairs and a gap of "
                f"{self.gap}: --seq-len {4 * most + self.gap} or more, fewer --pairs or a smaller --gap"
            )

    @property
    def half(self) -> int:
        """Keys, and values, to choose from."""
        return (self.vocab_size - FILLER) // 2

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "pairs": self.pairs[0] if len(self.pairs) == 1 else list(self.pairs),
            "gap": self.gap,
            "window": self.window,
            "held_out_tokens": self.shape.held_out_tokens,
        }

    @property
    def groupings(self) -> dict[str, tuple[str, ...]]:
        distance = {"distance in windows": self._bins.labels}
        return distance if len(self.pairs) == 1 else {"pairs": tuple(map(str, self.pairs)), **distance}

    @property
    def far(self) -> Far | None:
        last = len(self.pairs) - 1
        return Far(f"{self.pairs[last]} pairs", "pairs", (last,)) if last else None

    @property
    def chance(self) -> dict[str, float]:
        row = {"one of the row's values" + f", {n} pairs" * (len(self.pairs) > 1): 1 / n for n in self.pairs}
        return {**row, "one of all values": 1 / self.half}

    def train_batches(self, seed: int) -> Iterator[Examples]:
        index = 0
        while True:
            rng = generator(TRAIN, seed, index)
            rows = self.shape.rows
            counts = rng.multinomial(rows, self._shares).tolist() if len(self.pairs) > 1 else [rows]
            yield self._examples(rng, counts)._replace(groups={})
            index += 1

    def held_out(self) -> Iterator[Examples]:
        rows = max(1, self.shape.held_out_rows // len(self.pairs))
        return slices(self._examples(generator(HELD_OUT), [rows] * len(self.pairs)), self.shape.rows)

    def rows(self, rng: np.random.Generator, count: int, pairs: int) -> Recall:
        """``count`` rows with ``pairs`` pairs of these ids: filler, then keys, then values."""
        inputs, at = draw(
            rng, count, length=self.shape.seq_len, pairs=pairs, gap=self.gap, filler=FILLER, half=self.half
        )
        labels, distance = no_labels(inputs.shape), np.zeros_like(inputs)
        np.put_along_axis(labels, at, inputs[:, 1 : 2 * pairs : 2], axis=1)
        np.put_along_axis(distance, at, at - 2 * np.arange(pairs), axis=1)
        return Recall(inputs, labels, distance)

    def _examples(self, rng: np.random.Generator, counts: Sequence[int]) -> Examples:
        """So many rows of each number of pairs."""
        parts = [self.rows(rng, count, pairs) for count, pairs in zip(counts, self.pairs, strict=True)]
        inputs, labels, distance = (np.concatenate(part) for part in zip(*parts, strict=True))
        groups = {"distance in windows": self._bins(distance)}
        if len(self.pairs) > 1:
            number = np.repeat(np.arange(len(self.pairs)), counts)
            groups["pairs"] = np.broadcast_to(number[:, None], inputs.shape)
        return examples(inputs, labels, groups)

    @property
    def _shares(self) -> list[float]:
        """Of training rows, for each number of pairs."""
        return [1 / len(self.pairs)] * len(self.pairs)

    @property
    def _bins(self) -> DistanceBins:
        return DistanceBins(self.window, self.shape.seq_len - 1)
