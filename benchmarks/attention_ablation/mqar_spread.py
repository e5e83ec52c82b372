"""Associative recall with spread pairs as a task to train on: the rows of :mod:`eval.tasks.recall.spread`.

Pairs stand anywhere in the first part of the row and queries anywhere in the rest. With several values a key is asked
for each of them. The target of a query is its value, at the query's last token. Nothing else is a target. ``mlm`` reads
the same rows bidirectionally. With a gap of a window or more no query finds its pair in its window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.attention_ablation.mqar import FILLER, Recall
from benchmarks.attention_ablation.tasks import (
    HELD_OUT,
    TRAIN,
    DistanceBins,
    Examples,
    Far,
    Shape,
    examples,
    generator,
    no_labels,
    slices,
)
from data_pipeline.errors import UserError
from eval.tasks.recall.spread import Layout, draw_spread

FAR_WINDOWS = 16


@dataclass(frozen=True)
class SpreadRecall:
    """The task. ``window``: tokens, the unit of distances."""

    shape: Shape
    vocab_size: int
    pairs: int
    values: int
    spread: float
    gap: int
    window: int
    name: str = "mqar-spread"
    main: str = "accuracy"

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.values < 1 or self.gap < 0 or not 0 < self.spread < 1:
            raise UserError(
                f"--pairs {self.pairs}, --values {self.values}, --gap {self.gap}, --spread {self.spread}: at least one "
                "pair and one value, no negative gap, a spread between 0 and 1"
            )
        if self.half // self.values < self.pairs:
            least = FILLER + 2 * self.pairs * self.values + self._layout.marks
            raise UserError(
                f"a vocabulary of {self.vocab_size} has too few values for {self.pairs} keys with {self.values} each "
                f"({FILLER} ids are filler): --set vocab_size={least} or more, or fewer --pairs or --values"
            )
        if not self._layout.fits:
            raise UserError(
                f"rows of {self.shape.seq_len} tokens have no room for {self.pairs} keys with {self.values} value(s) "
                f"in their first {self.spread:.0%} and as many queries behind a gap of {self.gap}: longer --seq-len, "
                "fewer --pairs or --values, another --spread or a smaller --gap"
            )

    @property
    def half(self) -> int:
        """Keys, and values of all kinds, to choose from."""
        return (self.vocab_size - FILLER - self._layout.marks) // 2

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "pairs": self.pairs,
            "values": self.values,
            "spread": self.spread,
            "gap": self.gap,
            "window": self.window,
            "held_out_tokens": self.shape.held_out_tokens,
        }

    @property
    def groupings(self) -> dict[str, tuple[str, ...]]:
        return {"distance in windows": self._bins.labels}

    @property
    def far(self) -> Far | None:
        bins = self._bins.beyond(FAR_WINDOWS)
        return Far(f"{FAR_WINDOWS} windows back or more", "distance in windows", bins) if bins else None

    @property
    def chance(self) -> dict[str, float]:
        return {
            "one of the row's values of a kind": 1 / self.pairs,
            "one of all values of a kind": 1 / (self.half // self.values),
        }

    def train_batches(self, seed: int) -> Iterator[Examples]:
        index = 0
        while True:
            rows = self.rows(generator(TRAIN, seed, index), self.shape.rows)
            yield examples(rows.inputs, rows.labels)
            index += 1

    def held_out(self) -> Iterator[Examples]:
        rows = self.rows(generator(HELD_OUT), self.shape.held_out_rows)
        groups = {"distance in windows": self._bins(rows.distance)}
        return slices(examples(rows.inputs, rows.labels, groups), self.shape.rows)

    def rows(self, rng: np.random.Generator, count: int) -> Recall:
        """``count`` rows of these ids: filler, then keys, then values, then marks."""
        drawn = draw_spread(rng, count, self._layout, filler=FILLER, half=self.half)
        at = drawn.queries.reshape(count, -1)
        labels, distance = no_labels(drawn.inputs.shape), np.zeros_like(drawn.inputs)
        np.put_along_axis(labels, at, drawn.values.reshape(count, -1), axis=1)
        np.put_along_axis(distance, at, at - drawn.places.reshape(count, -1), axis=1)
        return Recall(drawn.inputs, labels, distance)

    @property
    def _layout(self) -> Layout:
        return Layout(self.shape.seq_len, self.pairs, self.values, self.spread, self.gap)

    @property
    def _bins(self) -> DistanceBins:
        return DistanceBins(self.window, self.shape.seq_len - 1)
