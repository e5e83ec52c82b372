"""Multi-query associative recall as a task to train on: the rows of :mod:`eval.tasks.recall.mqar`.

No query finds a pair in its window, so that what is measured is recall from far back. The default gap is the distance
over which the local parts of the base model pass information through all its layers: layers * max(window, convolution's
kernel).

The target of a query is its value, at the query's own position (also for a causal model: the value is not in the input
again). Nothing else is a target. ``mlm`` reads the same rows bidirectionally.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.attention_ablation.tasks import (
    DistanceBins,
    Drawn,
    Examples,
    Far,
    Ints,
    Shape,
    examples,
    no_labels,
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
class MultiQueryRecall(Drawn):
    """The task. ``window``: tokens, the unit of distances."""

    shape: Shape
    vocab_size: int
    pairs: int
    gap: int
    window: int
    name: str = "mqar"
    main: str = "accuracy"
    far: Far | None = None

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.gap < 0:
            raise UserError(f"--pairs {self.pairs} and --gap {self.gap}: at least one pair and no negative gap")
        if self.half < self.pairs:
            raise UserError(
                f"a vocabulary of {self.vocab_size} has {max(self.half, 0)} keys ({FILLER} ids are filler, the rest is "
                f"halved), {self.pairs} pairs need as many: --set vocab_size={FILLER + 2 * self.pairs} or more, or "
                "fewer --pairs"
            )
        if self.slots < self.pairs:
            raise UserError(
                f"rows of {self.shape.seq_len} tokens have no room for {self.pairs} queries behind {self.pairs} pairs "
                f"and a gap of {self.gap}: --seq-len {4 * self.pairs + self.gap} or more, fewer --pairs or a smaller "
                "--gap"
            )

    @property
    def half(self) -> int:
        """Keys, and values, to choose from."""
        return (self.vocab_size - FILLER) // 2

    @property
    def slots(self) -> int:
        """Places for queries."""
        return slots(self.shape.seq_len, self.pairs, self.gap)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "pairs": self.pairs,
            "gap": self.gap,
            "window": self.window,
            "held_out_tokens": self.shape.held_out_tokens,
        }

    @property
    def groupings(self) -> dict[str, tuple[str, ...]]:
        return {"distance in windows": self._bins.labels}

    @property
    def chance(self) -> dict[str, float]:
        return {"one of the row's values": 1 / self.pairs, "one of all values": 1 / self.half}

    def sample(self, rng: np.random.Generator, count: int) -> Examples:
        rows = self.rows(rng, count)
        groups = {"distance in windows": self._bins(rows.distance)}
        return examples(rows.inputs, rows.labels, groups)

    def rows(self, rng: np.random.Generator, count: int) -> Recall:
        """``count`` rows of these ids: filler, then keys, then values."""
        inputs, at = draw(
            rng,
            count,
            length=self.shape.seq_len,
            pairs=self.pairs,
            gap=self.gap,
            filler=FILLER,
            half=self.half,
        )
        labels, distance = no_labels(inputs.shape), np.zeros_like(inputs)
        np.put_along_axis(labels, at, inputs[:, 1 : 2 * self.pairs : 2], axis=1)
        np.put_along_axis(distance, at, at - 2 * np.arange(self.pairs), axis=1)
        return Recall(inputs, labels, distance)

    @property
    def _bins(self) -> DistanceBins:
        return DistanceBins(self.window, self.shape.seq_len - 1)
