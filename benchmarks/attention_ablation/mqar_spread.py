"""Associative recall with spread pairs as a task to train on: the rows of :mod:`eval.tasks.recall.spread`.

Pairs stand anywhere in the first part of the row and queries anywhere in the rest. With several values a key is asked
for each of them. The target of a query is its value, at the query's last token. Nothing else is a target. ``mlm`` reads
the same rows bidirectionally. With a gap of a window or more no query finds its pair in its window.

With several numbers of pairs each training row draws one of them, and held-out rows, as many of each, are scored by it.

Training may begin with short rows, the *lead-in*: half of a row of n tokens has n / 8 or n / 4 pairs, the other half
their queries, and there is no gap. Looking up a key is learned there, where one token in four is a target and few pairs
compete. docs/attention.md ("How the far forms rank") has what it is worth. A form with a window or recalled segments is
exact in the shortest rows, and learns about landmarks in longer ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.attention_ablation.mqar import FILLER, Recall
from benchmarks.attention_ablation.tasks import (
    HELD_OUT,
    DistanceBins,
    Drawn,
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
class SpreadRecall(Drawn):
    """The task. ``window``: tokens, the unit of distances."""

    shape: Shape
    vocab_size: int
    pairs: tuple[int, ...]
    """Numbers of pairs, rising."""
    values: int
    spread: float
    gap: int
    window: int
    lead_in: tuple[int, ...] = ()
    lead_in_tokens: int = 0
    name: str = "mqar-spread"
    main: str = "accuracy"

    def __post_init__(self) -> None:
        most = max(self.pairs)
        if min(self.pairs) < 1 or self.values < 1 or self.gap < 0 or not 0 < self.spread < 1:
            raise UserError(
                f"--pairs {min(self.pairs)}, --values {self.values}, --gap {self.gap}, --spread {self.spread}: at "
                "least one pair and one value, no negative gap, a spread between 0 and 1"
            )
        if any(n < 16 or n > self.shape.seq_len or n // 4 * self.values > self.half for n in self.lead_in):
            raise UserError(
                f"--lead-in {','.join(map(str, self.lead_in))}: lengths from 16 to {self.shape.seq_len} whose quarter "
                f"is at most the {self.half // self.values} keys and values that there are"
            )
        marks = self._layout(most).marks
        if self.half // self.values < most:
            least = FILLER + 2 * most * self.values + marks
            raise UserError(
                f"a vocabulary of {self.vocab_size} has too few values for {most} keys with {self.values} each "
                f"({FILLER} ids are filler): --set vocab_size={least} or more, or fewer --pairs or --values"
            )
        if not self._layout(most).fits:
            raise UserError(
                f"rows of {self.shape.seq_len} tokens have no room for {most} keys with {self.values} value(s) "
                f"in their first {self.spread:.0%} and as many queries behind a gap of {self.gap}: longer --seq-len, "
                "fewer --pairs or --values, another --spread or a smaller --gap"
            )

    @property
    def half(self) -> int:
        """Keys, and values of all kinds, to choose from."""
        return (self.vocab_size - FILLER - self._layout(1).marks) // 2

    @property
    def settings(self) -> dict[str, Any]:
        lead_in = {"lead_in": list(self.lead_in), "lead_in_tokens": self.lead_in_tokens} if self.lead_in else {}
        return {
            "vocab_size": self.vocab_size,
            "pairs": self.pairs[0] if len(self.pairs) == 1 else list(self.pairs),
            "values": self.values,
            "spread": self.spread,
            "gap": self.gap,
            "window": self.window,
            "held_out_tokens": self.shape.held_out_tokens,
            **lead_in,
        }

    @property
    def groupings(self) -> dict[str, tuple[str, ...]]:
        distance = {"distance in windows": self._bins.labels}
        return distance if len(self.pairs) == 1 else {"pairs": tuple(map(str, self.pairs)), **distance}

    @property
    def far(self) -> Far | None:
        if len(self.pairs) > 1:
            return Far(f"{self.pairs[-1]} pairs", "pairs", (len(self.pairs) - 1,))
        bins = self._bins.beyond(FAR_WINDOWS)
        return Far(f"{FAR_WINDOWS} windows back or more", "distance in windows", bins) if bins else None

    @property
    def chance(self) -> dict[str, float]:
        row = {"one of the row's values of a kind": 1 / self.pairs[0]} if len(self.pairs) == 1 else {}
        return {**row, "one of all values of a kind": 1 / (self.half // self.values)}

    def short(self, rng: np.random.Generator, count: int, length: int) -> Examples:
        return self._mix(rng, [Layout(length, n, self.values, 0.5, 0) for n in (length // 8, length // 4)], count)

    def sample(self, rng: np.random.Generator, count: int) -> Examples:
        return self._mix(rng, list(map(self._layout, self.pairs)), count)

    def held_out(self) -> Iterator[Examples]:
        layouts = list(map(self._layout, self.pairs))
        counts = [max(1, self.shape.held_out_rows // len(layouts))] * len(layouts)
        return slices(self._rows(generator(HELD_OUT), layouts, counts), self.shape.rows)

    def rows(self, rng: np.random.Generator, layout: Layout, count: int) -> Recall:
        """``count`` rows of these ids: filler, then keys, then values, then marks."""
        drawn = draw_spread(rng, count, layout, filler=FILLER, half=self.half)
        at = drawn.queries.reshape(count, -1)
        labels, distance = no_labels(drawn.inputs.shape), np.zeros_like(drawn.inputs)
        np.put_along_axis(labels, at, drawn.values.reshape(count, -1), axis=1)
        np.put_along_axis(distance, at, at - drawn.places.reshape(count, -1), axis=1)
        return Recall(drawn.inputs, labels, distance)

    def _mix(self, rng: np.random.Generator, layouts: Sequence[Layout], count: int) -> Examples:
        """Each row of a layout drawn among these."""
        many = len(layouts) > 1
        counts = rng.multinomial(count, [1 / len(layouts)] * len(layouts)).tolist() if many else [count]
        return self._rows(rng, layouts, counts)

    def _rows(self, rng: np.random.Generator, layouts: Sequence[Layout], counts: Sequence[int]) -> Examples:
        """So many rows of each layout."""
        parts = [self.rows(rng, layout, count) for layout, count in zip(layouts, counts, strict=True) if count]
        inputs, labels, distance = (np.concatenate(part) for part in zip(*parts, strict=True))
        number = np.repeat(np.arange(len(layouts)), counts)
        groups = {"distance in windows": self._bins(distance), "pairs": np.broadcast_to(number[:, None], inputs.shape)}
        return examples(inputs, labels, groups)

    def _layout(self, pairs: int) -> Layout:
        return Layout(self.shape.seq_len, pairs, self.values, self.spread, self.gap)

    @property
    def _bins(self) -> DistanceBins:
        return DistanceBins(self.window, self.shape.seq_len - 1)
