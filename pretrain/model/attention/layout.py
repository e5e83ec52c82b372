"""Which tokens of a batch belong together: padding, packed documents, and the landmarks of each sequence.

A :class:`Layout` describes the batch; a :class:`Partition` of it, built once and shared by all layers, is what
attention runs on. Nothing is ever masked across sequences. Instead the sequences of a batch (padded rows, or documents
packed in one row) are *taken apart* into rectangles of similar length. Attention runs on each rectangle as if nothing
had been packed, and the results are put back. This

* makes "packed equals separate" and "padding changes nothing" true by construction: a sequence's landmarks, inverse,
  softmax and convolution are computed from that sequence alone;
* costs what the sequences cost. A mask over packed rows costs (tokens of the row) x (landmarks of all its documents); a
  rectangle of one octave of lengths wastes at most half its slots, whatever the mix. (The shortest sequences, of at
  most m tokens, share one.)
* needs no mask at all for causal attention, where padding lies in every real token's future.

Rows that are full and hold one sequence each take the fast path: no index, no mask, only Python integers, so that the
forward pass is free of synchronisation and compiles to one graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Segments(NamedTuple):
    """The m segments of each of R sequences, a landmark each; of :func:`even_segments`."""

    tokens: Tensor
    """(R, m, s) int64, s the longest segment: where its tokens stand; the last one again where it has fewer."""
    sizes: Tensor
    """(R, m) int64, tokens of each segment."""


def even_segments(lengths: Tensor, count: int, longest: int) -> Segments:
    """``lengths`` (R,) int64, each from ``count`` to ``longest``: segment j has the tokens from floor(j n / m) on.

    So every sequence has exactly m = ``count`` segments, of floor(n / m) or ceil(n / m) tokens, and the longer ones are
    spread over it. Segments of ceil(n / m) tokens would leave 33 landmarks of 64 at n = 65. Longer segments first and
    shorter ones behind them had up to 1.6 times the error.
    """
    edges = lengths[:, None] * torch.arange(count + 1, device=lengths.device) // count
    first, sizes = edges[:, :-1], edges.diff(dim=1)
    offsets = torch.arange((longest + count - 1) // count, device=lengths.device)
    return Segments(first.unsqueeze(2) + torch.minimum(offsets, sizes.unsqueeze(2) - 1), sizes)


@dataclass(frozen=True)
class Rectangle:
    """R sequences in a rectangle of R rows and L columns, each from column 0, padded on the right."""

    length: int
    """L, columns."""
    longest: int
    """Tokens of the longest sequence, at most L."""
    index: Tensor | None = None
    """(R, L) int64: where each slot's token is in the batch flattened to (B * N); None if the batch is the
    rectangle."""
    mask: Tensor | None = None
    """(R, 1, 1, L) bool, True on real tokens; None if all are real or no real token can see the padding (causal)."""
    segments: Segments | None = None
    """Only with a mask, and for sequences of more than m tokens."""

    def take(self, x: Tensor) -> Tensor:
        """(B, N, H, d) -> (R, H, L, d). A padding slot repeats the first token of its own sequence; ``mask`` hides
        it."""
        if self.index is None:
            return x.transpose(1, 2)
        rows, length = self.index.shape
        return x.flatten(0, 1).index_select(0, self.index.flatten()).view(rows, length, *x.shape[2:]).transpose(1, 2)


@dataclass(frozen=True)
class Partition:
    """The rectangles of a batch, and the way back."""

    rectangles: tuple[Rectangle, ...]
    slots: Tensor | None
    """(B * N,) int64: each token's row in the rectangles' outputs laid end to end, the last row standing for
    padding."""

    def merge(self, outputs: Sequence[Tensor], like: Tensor) -> Tensor:
        """One (R, H, L, d) per rectangle -> (B, N, H, d), the shape of ``like``.

        Padding gets zeros, or anything finite where the batch is the rectangle.
        """
        parts = [x.transpose(1, 2) for x in outputs]
        if self.slots is None:
            return parts[0]
        padding = like.new_zeros(1, *like.shape[2:])
        return torch.cat([*(x.flatten(0, 1) for x in parts), padding]).index_select(0, self.slots).view_as(like)


@dataclass(frozen=True)
class Layout:
    """Sequences of a (B, N) batch of tokens. Use :meth:`full`, :meth:`from_lengths` or :meth:`from_documents`.

    Immutable; what is derived from it (positions, partitions) is computed on first use and kept, so one object serves
    every layer, and every micro-batch of the same shape.
    """

    batch: int
    length: int
    starts: np.ndarray | None = None
    """(D,) int64, each sequence's first token in the flattened batch, increasing; None if rows are full and single."""
    lengths: np.ndarray | None = None
    """(D,) int64, tokens of each sequence, all at least 1; sequences of no token (empty rows) are not listed."""
    _cache: dict = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def full(cls, batch: int, length: int) -> Layout:
        """Every row is one sequence of ``length`` tokens."""
        return cls(batch, length)

    @classmethod
    def from_lengths(cls, lengths: Tensor | Sequence[int], length: int) -> Layout:
        """Row b is one sequence of ``lengths[b]`` tokens (0 to ``length``) and padding on its right.

        ``lengths``: (B,) integers, best kept on the CPU (reading them from a GPU waits for it).
        Raises ValueError for a length outside [0, ``length``].
        """
        sizes = np.asarray(torch.as_tensor(lengths).cpu(), dtype=np.int64)
        if sizes.ndim != 1:
            raise ValueError(f"lengths must have one dimension, got shape {sizes.shape}")
        if sizes.size and (sizes.min() < 0 or sizes.max() > length):
            raise ValueError(f"lengths must lie in [0, {length}], got {sizes.min()} to {sizes.max()}")
        starts = np.arange(len(sizes), dtype=np.int64) * length
        return cls._of(len(sizes), length, starts[sizes > 0], sizes[sizes > 0])

    @classmethod
    def from_documents(cls, document_ids: Tensor) -> Layout:
        """Packed rows: ``document_ids`` (B, N) integers; a run of one id along a row is a document, negative is
        padding.

        Padding may stand anywhere (left-padded prompts too). Two runs of one id are two documents.
        """
        ids = np.asarray(torch.as_tensor(document_ids).cpu(), dtype=np.int64)
        if ids.ndim != 2:
            raise ValueError(f"document_ids must be (batch, length), got shape {ids.shape}")
        first = np.ones(ids.shape, dtype=bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = np.flatnonzero(first)
        lengths = np.diff(np.append(starts, ids.size))
        real = ids.reshape(-1)[starts] >= 0 if ids.size else np.zeros(0, dtype=bool)
        return cls._of(ids.shape[0], ids.shape[1], starts[real], lengths[real])

    @classmethod
    def _of(cls, batch: int, length: int, starts: np.ndarray, lengths: np.ndarray) -> Layout:
        if len(starts) == batch and (lengths == length).all():
            return cls(batch, length)
        return cls(batch, length, starts, lengths)

    @property
    def is_full(self) -> bool:
        """Every row is one sequence without padding: the fast path."""
        return self.starts is None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        if self.lengths is None:
            return self.length
        return int(self.lengths.max(initial=0))

    def positions(self, device: torch.device) -> Tensor:
        """(1, N) or (B, N) int64: each token's position in its own sequence; 0 at padding."""
        if self.starts is None or self.lengths is None:
            return torch.arange(self.length, device=device).unsqueeze(0)
        key = ("positions", device)
        if key not in self._cache:
            positions = np.zeros(self.batch * self.length, dtype=np.int64)
            offsets = offsets_within(self.lengths)
            positions[np.repeat(self.starts, self.lengths) + offsets] = offsets
            self._cache[key] = torch.from_numpy(positions).view(self.batch, self.length).to(device)
        return self._cache[key]

    def partition(self, device: torch.device, *, causal: bool, num_landmarks: int | None = None) -> Partition:
        """Rectangles for attention.

        causal: no real token sees what is on its right, so no masks are built and right-padded rows need no taking
        apart. num_landmarks: m of the bidirectional Nystrom form. Sequences of at most m tokens, of more, and of 2 m or
        more, never share a rectangle: up to where attention is exact depends on the form. One of more than m has m
        segments (:func:`even_segments`), by its own length: the same packed, padded or by itself.
        """
        if self.starts is None or self.lengths is None:
            return Partition((Rectangle(self.length, self.length),), None)
        key = ("partition", device, causal, num_landmarks)
        if key not in self._cache:
            self._cache[key] = self._partition(self.starts, self.lengths, device, causal, num_landmarks)
        return self._cache[key]

    def _partition(
        self, starts: np.ndarray, lengths: np.ndarray, device: torch.device, causal: bool, num_landmarks: int | None
    ) -> Partition:
        octaves = _octaves(lengths, 64) if num_landmarks is None else _octaves(lengths, num_landmarks, open_end=True)
        one_per_row = len(starts) == self.batch and (starts % self.length == 0).all()
        if one_per_row and (causal or (octaves == octaves[0]).all()):
            return Partition((_rectangle(None, lengths, self.length, device, causal, num_landmarks),), None)

        rectangles: list[Rectangle] = []
        slots = np.full(self.batch * self.length, -1, dtype=np.int64)
        used = 0
        for octave in np.unique(octaves):
            chosen = octaves == octave
            first, sizes = starts[chosen], lengths[chosen]
            width = int(sizes.max())
            columns = np.arange(width)
            index = first[:, None] + np.where(columns < sizes[:, None], columns, 0)
            row = np.repeat(np.arange(len(sizes)), sizes)
            offsets = offsets_within(sizes)
            slots[np.repeat(first, sizes) + offsets] = used + row * width + offsets
            used += index.size
            at = torch.from_numpy(index).to(device)
            rectangles.append(_rectangle(at, sizes, width, device, causal, num_landmarks))
        slots[slots < 0] = used
        return Partition(tuple(rectangles), torch.from_numpy(slots).to(device))


def offsets_within(lengths: np.ndarray) -> np.ndarray:
    """The place of every token in its sequence, from the sequences' lengths: [3, 2] -> [0, 1, 2, 0, 1]."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _octaves(lengths: np.ndarray, first: int, *, open_end: bool = False) -> np.ndarray:
    """0 for lengths up to ``first``, 1 up to 2 * first, 2 up to 4 * first, and so on; ``open_end``: 1 below 2 * first,
    2 below 4 * first."""
    octaves = (lengths > first).astype(np.int64)
    edge = 2 * first - open_end
    while (lengths > edge).any():
        octaves += lengths > edge
        edge = 2 * edge + open_end
    return octaves


def _rectangle(
    index: Tensor | None, lengths: np.ndarray, width: int, device: torch.device, causal: bool, num_landmarks: int | None
) -> Rectangle:
    longest = int(lengths.max())
    if causal or (lengths == width).all():
        return Rectangle(width, longest, index)
    sizes = torch.from_numpy(lengths).to(device)
    columns = torch.arange(width, device=device)
    mask = columns < sizes[:, None]
    segments = None
    if num_landmarks is not None and longest > num_landmarks:
        segments = even_segments(sizes, num_landmarks, longest)
    return Rectangle(width, longest, index, mask[:, None, None, :], segments)
