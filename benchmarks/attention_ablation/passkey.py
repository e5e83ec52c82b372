"""Passkey retrieval: one short key somewhere in filler, asked for at the end (after Mohtashami and Jaggi 2023,
"Landmark attention", arXiv 2305.16300, section 4.2, there in words).

What is generated: filler tokens, independent, token of rank r with probability in proportion to 1 / r. Among them is
one *needle*, ``marker digit ... digit``, its place uniform over the row; and at the end the marker again and the
digits, which are the only targets. Each place of the key has ten ids of its own and is uniform over them: 10% are right
by chance. Finding the needle is all there is to learn, not the order of the digits. A causal model reads the digits
before the one that it must say, which do not tell it; a masked one finds masks in the place of all of them.

Held-out rows may be longer than those of training: that is recall at lengths and distances never trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.attention_ablation.forms import Objective
from benchmarks.attention_ablation.tasks import (
    HELD_OUT,
    DistanceBins,
    Drawn,
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

MARKER, MASK, FIRST_DIGIT, DIGITS = 0, 1, 2, 10
LENGTHS = "tokens of the row"
DEPTH_BINS = 5
FAR_WINDOWS = 4
LONG_ROWS = 128
"""Held-out rows of each length, where lengths are given: the longest would else be most of the work."""


class Needles(NamedTuple):
    """Rows of the task."""

    inputs: Ints
    """(B, N)."""
    labels: Ints
    """(B, N)."""
    start: Ints
    """(B,), position of the needle's marker in the inputs."""


@dataclass(frozen=True)
class Passkey(Drawn):
    """The task. ``window``: tokens, the unit of distances; a distance is from the last marker back to the needle's."""

    shape: Shape
    objective: Objective
    vocab_size: int
    digits: int
    window: int
    test_lengths: tuple[int, ...] = ()
    """Tokens of held-out rows, rising; none: those of training."""
    name: str = "passkey"
    main: str = "accuracy"

    def __post_init__(self) -> None:
        if self.digits < 1:
            raise UserError(f"--digits {self.digits}: the key needs at least one")
        if self.vocab_size <= self.filler:
            raise UserError(
                f"a vocabulary of {self.vocab_size} has no filler: {self.filler} ids are marker, mask and "
                f"digits; --set vocab_size={2 * self.filler} or more, or fewer --digits"
            )
        for option, length in (("--seq-len", self.shape.seq_len), *(("--test-seq-lens", n) for n in self.test_lengths)):
            if self.places(length) < 1:
                raise UserError(
                    f"rows of {length} tokens have no room for a needle and a question of {self.digits} digits: "
                    f"{option} {2 * self.digits + 2} or more"
                )

    @property
    def filler(self) -> int:
        """The filler's first id; those before are the marker, the mask and the digits."""
        return FIRST_DIGIT + DIGITS * self.digits

    def places(self, length: int) -> int:
        """Where the needle's marker can be in a row: before the last marker with room for the digits."""
        return self._question(length) - self.digits

    def _question(self, length: int) -> int:
        """Position of the last marker."""
        return length - self.digits - (self.objective == "mlm")

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "objective": self.objective,
            "vocab_size": self.vocab_size,
            "digits": self.digits,
            "window": self.window,
            "held_out_tokens": self.shape.held_out_tokens,
            **({"test_seq_lens": list(self.test_lengths)} if self.test_lengths else {}),
        }

    @property
    def groupings(self) -> dict[str, tuple[str, ...]]:
        depth = tuple(f"{100 * i // DEPTH_BINS}-{100 * (i + 1) // DEPTH_BINS}%" for i in range(DEPTH_BINS))
        lengths = {LENGTHS: tuple(map(str, self.test_lengths))} if self.test_lengths else {}
        return {**lengths, "distance in windows": self._bins.labels, "depth": depth}

    @property
    def far(self) -> Far | None:
        if self.test_lengths:
            last = len(self.test_lengths) - 1
            return Far(f"rows of {self.test_lengths[last]} tokens", LENGTHS, (last,))
        bins = self._bins.beyond(FAR_WINDOWS)
        return Far(f"{FAR_WINDOWS} windows back or more", "distance in windows", bins) if bins else None

    @property
    def chance(self) -> dict[str, float]:
        return {"any digit": 1 / DIGITS}

    def held_out(self) -> Iterator[Examples]:
        if not self.test_lengths:
            yield from super().held_out()
        for number, length in enumerate(self.test_lengths):
            batch = self._batch(generator(HELD_OUT, length), LONG_ROWS, length)
            groups = {**batch.groups, LENGTHS: np.full(batch.input_ids.shape, number)}
            yield from slices(batch._replace(groups=groups), max(1, self.shape.batch_tokens // length))

    def sample(self, rng: np.random.Generator, count: int) -> Examples:
        return self._batch(rng, count, self.shape.seq_len)

    def _batch(self, rng: np.random.Generator, count: int, length: int) -> Examples:
        rows = self.rows(rng, count, length)
        depth = rows.start * DEPTH_BINS // self.places(length)
        whole = {"distance in windows": self._bins(self._question(length) - rows.start), "depth": depth}
        groups = {name: np.broadcast_to(bins[:, None], rows.inputs.shape) for name, bins in whole.items()}
        return examples(rows.inputs, rows.labels, groups)

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Needles:
        """``count`` rows of ``length`` tokens as the module describes them."""
        question = self._question(length)
        weight = 1 / np.arange(1, self.vocab_size - self.filler + 1)
        tokens = self.filler + rng.choice(len(weight), size=(count, length + 1), p=weight / weight.sum()).astype(
            np.int64
        )
        key = FIRST_DIGIT + DIGITS * np.arange(self.digits) + rng.integers(0, DIGITS, (count, self.digits))
        start = rng.integers(0, self.places(length), count)
        needle = np.concatenate([np.full((count, 1), MARKER, dtype=np.int64), key], axis=1)
        np.put_along_axis(tokens, start[:, None] + np.arange(self.digits + 1), needle, axis=1)
        tokens[:, question : question + self.digits + 1] = needle
        inputs, labels = tokens[:, :length].copy(), no_labels((count, length))
        if self.objective == "clm":
            labels[:, question:] = key
        else:
            inputs[:, question + 1 :] = MASK
            labels[:, question + 1 :] = key
        return Needles(inputs, labels, start)

    @property
    def _bins(self) -> DistanceBins:
        return DistanceBins(self.window, self._question(max((self.shape.seq_len, *self.test_lengths))))
