"""Variable tracking as a task to train on: the rows of :mod:`eval.tasks.recall.variables`.

Every variable of every chain is asked for, so that the first ones, which need one look-up, are learned on the way to
the later ones. The target of a question is the value, at the name's own position. Nothing else is a target. ``mlm``
reads the same rows bidirectionally.

A variable behind h hops needs h + 1 look-ups, one after the other. L layers of exact attention suffice for 2^(L - 2) of
them (Sanford et al. 2024, "Transformers, parallel computation, and logarithmic depth", arXiv 2402.09268): two layers
for no hops, three for one, four for three.

Training may begin with short rows, the *lead-in*: a row of n tokens has n / 16 chains and n / 32 hops, but two chains
at least, and at most those of the task.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from eval.tasks.recall.variables import draw, room

FILLER = 16
"""Ids 0 to 15."""


class Assigned(NamedTuple):
    """Rows of the task."""

    inputs: Ints
    """(B, N)."""
    labels: Ints
    """(B, N)."""
    distance: Ints
    """(B, N), tokens from a question back to the assignment of its variable; 0 elsewhere."""
    hops: Ints
    """(B, N), assignments between the value and the variable asked for; 0 elsewhere."""


@dataclass(frozen=True)
class VariableTracking(Drawn):
    """The task. ``window``: tokens, the unit of distances."""

    shape: Shape
    vocab_size: int
    chains: int
    hops: int
    window: int
    lead_in: tuple[int, ...] = ()
    lead_in_tokens: int = 0
    name: str = "variables"
    main: str = "accuracy"

    def __post_init__(self) -> None:
        if self.chains < 2 or self.hops < 0:
            raise UserError(f"--chains {self.chains} and --hops {self.hops}: at least two chains, no negative hops")
        names = self.chains * (self.hops + 1)
        if self.half < names:
            raise UserError(
                f"a vocabulary of {self.vocab_size} has {max(self.half, 0)} names ({FILLER} ids are filler, the rest "
                f"is halved), {self.chains} chains of {self.hops} hops need {names}: --set vocab_size="
                f"{FILLER + 2 * names} or more, or fewer --chains or --hops"
            )
        if any(n < 16 or n > self.shape.seq_len for n in self.lead_in):
            raise UserError(
                f"--lead-in {','.join(map(str, self.lead_in))}: lengths from 16 to those of the rows, "
                f"{self.shape.seq_len}"
            )
        least = room(self.chains, self.hops, every=True)
        if self.shape.seq_len < least:
            raise UserError(
                f"rows of {self.shape.seq_len} tokens have no room for {self.chains} chains of {self.hops} hops and "
                f"their questions: --seq-len {least} or more, fewer --chains or --hops"
            )

    @property
    def half(self) -> int:
        """Names, and values, to choose from."""
        return (self.vocab_size - FILLER) // 2

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "chains": self.chains,
            "hops": self.hops,
            "window": self.window,
            "held_out_tokens": self.shape.held_out_tokens,
            **({"lead_in": list(self.lead_in), "lead_in_tokens": self.lead_in_tokens} if self.lead_in else {}),
        }

    @property
    def groupings(self) -> dict[str, tuple[str, ...]]:
        return {"hops": tuple(map(str, range(self.hops + 1))), "distance in windows": self._bins.labels}

    @property
    def far(self) -> Far | None:
        return Far(f"{self.hops} hops", "hops", (self.hops,))

    @property
    def chance(self) -> dict[str, float]:
        return {"one of the row's values": 1 / self.chains, "one of all values": 1 / self.half}

    def sample(self, rng: np.random.Generator, count: int) -> Examples:
        rows = self.rows(rng, count)
        groups = {"hops": rows.hops, "distance in windows": self._bins(rows.distance)}
        return examples(rows.inputs, rows.labels, groups)

    def short(self, rng: np.random.Generator, count: int, length: int) -> Examples:
        chains, hops = min(self.chains, max(2, length // 16)), min(self.hops, length // 32)
        shape = replace(self.shape, seq_len=length)
        return replace(self, shape=shape, chains=chains, hops=hops, lead_in=()).sample(rng, count)

    def rows(self, rng: np.random.Generator, count: int) -> Assigned:
        """``count`` rows of these ids: filler, then names, then values."""
        drawn = draw(
            rng,
            count,
            length=self.shape.seq_len,
            chains=self.chains,
            hops=self.hops,
            filler=FILLER,
            half=self.half,
            every=True,
        )
        labels = no_labels(drawn.inputs.shape)
        distance, hops = np.zeros_like(drawn.inputs), np.zeros_like(drawn.inputs)
        shape = drawn.questions.shape
        at = drawn.questions.reshape(count, -1)
        for rows, values in (
            (labels, np.broadcast_to(drawn.values[..., None], shape)),
            (distance, drawn.questions - drawn.places),
            (hops, np.broadcast_to(np.arange(self.hops + 1), shape)),
        ):
            np.put_along_axis(rows, at, values.reshape(count, -1), axis=1)
        return Assigned(drawn.inputs, labels, distance, hops)

    @property
    def _bins(self) -> DistanceBins:
        return DistanceBins(self.window, self.shape.seq_len - 1)
