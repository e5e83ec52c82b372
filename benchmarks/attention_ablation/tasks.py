"""What a task gives to training and to evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batches import IGNORE

Ints = NDArray[np.int64]


class Examples(NamedTuple):
    """A batch. ``labels`` are -100 where there is no target and are never shifted by the model."""

    input_ids: Tensor
    """(B, N) int64."""
    labels: Tensor
    """(B, N) int64."""
    groups: Mapping[str, Ints] = {}
    """For each grouping of the task (B, N) int64: the bin that a position belongs to. Only in held-out batches."""


@dataclass(frozen=True)
class Far:
    """The bins of a grouping that together are 'far back', for a column of their own."""

    label: str
    grouping: str
    bins: tuple[int, ...]


class Task(Protocol):
    """Batches to train on and held-out rows, the same ones for every form."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the data, as plain values: part of a result's key."""
        ...

    @property
    def groupings(self) -> dict[str, tuple[str, ...]]:
        """Labels of the bins of each grouping of targets."""
        ...

    @property
    def main(self) -> str:
        """``loss`` or ``accuracy``: what the table compares."""
        ...

    @property
    def far(self) -> Far | None: ...

    @property
    def chance(self) -> dict[str, float]:
        """What can be had without recall: accuracies, or losses in nats, by name."""
        ...

    def train_batches(self, seed: int) -> Iterator[Examples]:
        """Batches without end or up to the tokens of the run; a function of the seed."""
        ...

    def measured(self, seed: int) -> Examples:
        """A training batch of full rows, whose time and memory are taken."""
        ...

    def held_out(self) -> Iterator[Examples]:
        """The same rows every time."""
        ...


@dataclass(frozen=True)
class Shape:
    """Rows and lengths of a task's batches."""

    seq_len: int
    batch_tokens: int
    held_out_tokens: int

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return max(1, self.batch_tokens // self.seq_len)

    @property
    def held_out_rows(self) -> int:
        """Rows of the held-out set."""
        return max(1, self.held_out_tokens // self.seq_len)


@dataclass(frozen=True)
class DistanceBins:
    """Distances in tokens to bins whose edges are 0, 1, 2, 4, 8, ... windows, up to ``longest`` tokens; by powers of
    ``factor``."""

    window: int
    longest: int
    factor: int = 2
    edges: Ints = field(init=False)

    def __post_init__(self) -> None:
        edges = [0, 1]
        while edges[-1] * self.window <= self.longest:
            edges.append(self.factor * edges[-1])
        object.__setattr__(self, "edges", np.array(edges, dtype=np.int64))

    @property
    def labels(self) -> tuple[str, ...]:
        """``4-8`` for distances from 4 windows to less than 8."""
        return tuple(f"{low}-{high}" for low, high in pairwise(self.edges))

    def __call__(self, distance: Ints) -> Ints:
        """Bin of each distance."""
        return np.searchsorted(self.edges * self.window, distance, side="right").astype(np.int64) - 1

    def beyond(self, windows: int) -> tuple[int, ...]:
        """Bins that begin at ``windows`` windows or farther."""
        return tuple(int(i) for i in np.flatnonzero(self.edges[:-1] >= windows))


def examples(inputs: Ints, labels: Ints, groups: Mapping[str, Ints] | None = None) -> Examples:
    """Arrays as a batch."""
    return Examples(torch.from_numpy(inputs), torch.from_numpy(labels), groups or {})


def slices(batch: Examples, rows: int) -> Iterator[Examples]:
    """``rows`` rows at a time."""
    for first in range(0, len(batch.input_ids), rows):
        part = slice(first, first + rows)
        groups = {name: bins[part] for name, bins in batch.groups.items()}
        yield Examples(batch.input_ids[part], batch.labels[part], groups)


def generator(*words: int) -> np.random.Generator:
    """A generator that is a function of these numbers."""
    return np.random.default_rng(list(words))


TRAIN, HELD_OUT = 0, 1
"""First word of a generator's seed: no held-out row is ever drawn for training from the same state."""


class Drawn:
    """A task whose rows are drawn anew for each batch. Subclasses draw them."""

    shape: Shape
    lead_in: tuple[int, ...] = ()
    """Tokens of the short rows that training begins with, rising."""
    lead_in_tokens: int = 0
    """To train on with each of them."""

    def sample(self, rng: np.random.Generator, count: int) -> Examples:
        """``count`` rows with their groups."""
        raise NotImplementedError

    def short(self, rng: np.random.Generator, count: int, length: int) -> Examples:
        """``count`` rows of a lead-in, easier than the others."""
        raise NotImplementedError

    def train_batches(self, seed: int) -> Iterator[Examples]:
        """Of the state (seed, number of the batch)."""
        seen = 0
        for index in itertools.count():
            rng = generator(TRAIN, seed, index)
            stage = seen // self.lead_in_tokens if self.lead_in else 0
            if stage < len(self.lead_in):
                length = self.lead_in[stage]
                batch = self.short(rng, self.shape.rows * self.shape.seq_len // length, length)
            else:
                batch = self.sample(rng, self.shape.rows)
            yield batch
            seen += batch.input_ids.numel()

    def measured(self, seed: int) -> Examples:
        """The first batch."""
        return self.sample(generator(TRAIN, seed, 0), self.shape.rows)

    def held_out(self) -> Iterator[Examples]:
        """In slices of a batch's rows."""
        return slices(self.sample(generator(HELD_OUT), self.shape.held_out_rows), self.shape.rows)


def no_labels(shape: Sequence[int]) -> Ints:
    """Labels without a target."""
    return np.full(shape, IGNORE, dtype=np.int64)
