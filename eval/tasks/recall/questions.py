"""Rows with questions: what every recall task generates, and what is scored and trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
TRAIN, HELD_OUT = 0, 1
"""First word of a generator's seed: no row that is scored is drawn for training from the same state."""


@dataclass(frozen=True)
class Cell:
    """Rows of one kind: a length with a depth, a number of pairs, or a distance. ``facts`` go into its records."""

    name: str
    length: int
    facts: dict[str, int]


@dataclass(frozen=True)
class Questions:
    """B rows of N tokens with T questions each, of K options (one: nothing to choose, only likelihood)."""

    inputs: Ints
    """(B, N)."""
    at: Ints
    """(B, T): positions whose logits answer; a causal model's are one before the answer, a masked model's have it
    hidden."""
    options: Ints
    """(B, T, K) token ids, different ones."""
    answer: Ints
    """(B, T): which option is right."""
    distance: Ints
    """(B, T): tokens from the answer's place back to where it can be read: its only other occurrence as an answer, or
    the first of several."""
    controls: dict[str, Ints] = field(default_factory=dict)
    """Name -> inputs (B, N) with the same questions whose answer is not there: ``without`` (nothing of the options
    in its place), ``other`` (another option in its place)."""

    @property
    def right(self) -> Ints:
        """Token ids of the right answers, (B, T)."""
        return np.take_along_axis(self.options, self.answer[..., None], axis=2)[..., 0]

    def first(self, count: int) -> Questions:
        """The first rows, without their controls."""
        rows = slice(count)
        return Questions(self.inputs[rows], self.at[rows], self.options[rows], self.answer[rows], self.distance[rows])

    def ids(self) -> list[str]:
        """A hash of the content of each row: tokens, questions, options."""
        return [
            hashlib.sha256(b"".join(np.ascontiguousarray(part).astype("<i8").tobytes() for part in row)).hexdigest()[
                :32
            ]
            for row in zip(self.inputs, self.at, self.options, self.answer, strict=True)
        ]


class Kind(Protocol):
    """A recall task on the vocabulary of a model."""

    @property
    def cells(self) -> Sequence[Cell]: ...

    @property
    def axes(self) -> tuple[str, str] | None:
        """The facts that are the rows and columns of the heat map; None: no heat map."""
        ...

    def rows(self, cell: Cell, rng: np.random.Generator, count: int, *, training: bool) -> Questions:
        """``count`` rows of a cell; ``training``: text, where there is any, comes from the part for training."""
        ...


def generator(*words: int) -> np.random.Generator:
    """A generator that is a function of these numbers."""
    return np.random.default_rng(list(words))


def choices(rng: np.random.Generator, count: int, size: int, chosen: int) -> Ints:
    """(count, chosen): numbers below ``size`` in random order, no row with the same one twice."""
    return rng.permuted(np.tile(np.arange(size, dtype=np.int64), (count, 1)), axis=1)[:, :chosen]
