"""Examples of a long-range task: sequences of small whole numbers (symbols, bytes, pixels), one or two, and a class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Split:
    """``columns``: a list of sequences (uint8) for each input of the network; ``labels`` (n,) int64.

    Token ids are the numbers themselves: padding needs none of its own, for attention and pooling know the lengths.
    """

    columns: tuple[Sequence[np.ndarray], ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, tokens of the (longer) sequence of each example."""
        return np.max([[len(sequence) for sequence in column] for column in self.columns], axis=0).astype(np.int64)

    def tokens(self, indices: np.ndarray) -> int:
        """Tokens of these examples, in all their sequences."""
        return sum(len(column[i]) for column in self.columns for i in indices)

    def take(self, indices: np.ndarray) -> Split:
        """These examples only."""
        return Split(tuple([column[i] for i in indices] for column in self.columns), self.labels[indices])

    def cut(self, length: int) -> Split:
        """Every sequence cut to its first ``length`` tokens."""
        return Split(tuple([sequence[:length] for sequence in column] for column in self.columns), self.labels)

    def ids(self) -> list[str]:
        """A hash of each example's sequences: copies of an example have one, and are one item."""
        return [_hash(sequences).hexdigest()[:20] for sequences in zip(*self.columns, strict=True)]

    def collate(self, indices: np.ndarray) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """For each column (ids (B, N) int64 padded to the longest, lengths (B,) int64), and labels (B,)."""
        import torch

        inputs = []
        for column in self.columns:
            sequences = [column[i] for i in indices]
            lengths = np.array([len(sequence) for sequence in sequences])
            ids = np.zeros((len(indices), int(lengths.max())), dtype=np.int64)
            for row, sequence in zip(ids, sequences, strict=True):
                row[: len(sequence)] = sequence
            inputs.append((torch.from_numpy(ids), torch.from_numpy(lengths)))
        return inputs, torch.from_numpy(self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """The three splits. ``test`` is scored once; ``dev`` chooses the weights."""

    name: str
    train: Split
    dev: Split
    test: Split
    vocabulary: int
    classes: list[str]
    origin: str

    def describe(self) -> dict[str, Any]:
        """What the result says about the data."""
        digest = hashlib.sha256()
        for split in (self.train, self.dev, self.test):
            for column in split.columns:
                digest.update(_hash(column).digest())
            digest.update(split.labels.tobytes())
        return {
            "dataset": self.name,
            "origin": self.origin,
            **{f"{name}_examples": len(split) for name, split in self.splits().items()},
            "longest": int(max(split.lengths.max() for split in self.splits().values())),
            "classes": self.classes,
            "hash": digest.hexdigest(),
        }

    def splits(self) -> dict[str, Split]:
        """By name."""
        return {"train": self.train, "dev": self.dev, "test": self.test}

    def checked(self, max_length: int) -> Dataset:
        """With sequences cut to ``max_length``; raises :class:`UserError` for an empty split or sequence."""
        for name, split in self.splits().items():
            if not len(split):
                raise UserError(f"{self.origin}: no {name} example for {self.name}")
            if any(not len(sequence) for column in split.columns for sequence in column):
                raise UserError(f"{self.origin}: a {name} example of {self.name} is empty")
        if len(set(self.train.labels.tolist())) < 2:
            raise UserError(f"{self.origin}: all training examples of {self.name} have one label: nothing to learn")
        train, dev, test = (split.cut(max_length) for split in (self.train, self.dev, self.test))
        return replace(self, train=train, dev=dev, test=test)


def _hash(sequences: Sequence[np.ndarray]) -> Any:
    """SHA-256 over sequences with their lengths, so that no two lists of sequences look alike."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(sequence, dtype=np.uint8).tobytes())
    return digest
