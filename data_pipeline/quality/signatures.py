"""Signature files of a corpus, one for each unit, read as one long array without holding it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError

# Bytes that one document takes while its keys are sorted: keys, number, order, and the sorted copies.
_BYTES_A_KEY = 64
# However small the memory, this many documents are read and sorted at a time.
_LEAST = 16


class SignatureFiles:
    """Files of uint64 arrays (documents, width), in the corpus's order; a document's number counts through them all.

    :class:`UserError` if a file is not whole or its width is another.
    """

    def __init__(self, paths: Sequence[Path], width: int) -> None:
        self.paths = tuple(paths)
        self.width = width
        self.counts = tuple(len(self._open(unit)) for unit in range(len(self.paths)))
        self._ends = np.cumsum(np.array(self.counts, dtype=np.int64))
        self.documents = sum(self.counts)

    def _open(self, unit: int) -> np.ndarray:
        # Opened for each use and not kept: thousands of units are more than a process may hold open.
        path = self.paths[unit]
        try:
            array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise UserError(
                f"{path}: not a whole signature file ({error}); remove it and sign the unit again"
            ) from None
        if array.ndim != 2 or array.shape[1] != self.width or array.dtype != np.uint64:
            raise UserError(
                f"{path}: signatures of other settings, {array.dtype} {array.shape} where uint64 (documents, "
                f"{self.width}) belongs; remove it and sign the unit again"
            )
        return array

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """The whole corpus in order, at most ``rows`` documents at a time: the number of the first, the signatures."""
        for unit, count in enumerate(self.counts):
            array = self._open(unit)
            for start in range(0, count, rows):
                yield self.locate_start(unit) + start, array[start : start + rows]

    def locate_start(self, unit: int) -> int:
        """The number of the unit's first document."""
        return int(self._ends[unit]) - self.counts[unit]

    def locate(self, number: int) -> tuple[int, int]:
        """The unit of a document and its row there."""
        unit = int(np.searchsorted(self._ends, number, side="right"))
        return unit, number - self.locate_start(unit)

    def gather(self, numbers: np.ndarray) -> np.ndarray:
        """The signatures of the documents ``numbers``, in that order."""
        units = np.searchsorted(self._ends, numbers, side="right")
        signatures = np.empty((len(numbers), self.width), dtype=np.uint64)
        for unit in np.unique(units).tolist():
            chosen = units == unit
            signatures[chosen] = self._open(unit)[numbers[chosen] - self.locate_start(unit)]
        return signatures


def rows_at_once(max_bytes: int, width: int) -> int:
    """How many signatures to hold at a time: a quarter of ``max_bytes``, for copies of them are made."""
    return max(_LEAST, max_bytes // (4 * 8 * width))


def equal_pairs(
    files: SignatureFiles,
    keys: Callable[[np.ndarray, int], np.ndarray],
    count: int,
    max_bytes: int,
    keep: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Pairs (first, later) of documents with equal keys: every later one with the first in the corpus's order.

    ``keys(signatures, i)`` is the i-th of ``count`` kinds of key, uint64 (documents, columns), its first column evenly
    spread. ``keep`` (bool, by number) leaves documents out. Yields int64 (pairs, 2) for one kind and one part of the
    keys' range at a time. The range is cut so that about ``max_bytes`` are sorted at once; as many parts as fit are
    collected in one pass over the files. (Documents with one and the same key are never parted.)
    """
    documents_at_once = max(_LEAST, max_bytes // _BYTES_A_KEY)
    bits = max(0, (files.documents - 1) // documents_at_once).bit_length()
    jobs = [(kind, part) for kind in range(count) for part in range(1 << bits)]
    at_once = max(1, documents_at_once // max(1, files.documents >> bits))
    rows = rows_at_once(max_bytes, files.width)
    for begin in range(0, len(jobs), at_once):
        wanted = jobs[begin : begin + at_once]
        found: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {job: [] for job in wanted}
        for start, block in files.blocks(rows):
            numbers = np.arange(start, start + len(block))
            if keep is not None:
                numbers = numbers[keep[numbers]]
                block = block[numbers - start]
            for kind in dict.fromkeys(kind for kind, _ in wanted):
                of_kind = keys(block, kind)
                parts = of_kind[:, 0] >> np.uint64(64 - bits) if bits else None
                for job in wanted:
                    if job[0] == kind:
                        chosen = slice(None) if parts is None else np.flatnonzero(parts == job[1])
                        found[job].append((of_kind[chosen], numbers[chosen]))
        for job in wanted:
            collected = found.pop(job)
            if collected:
                yield _pairs(*(np.concatenate(arrays) for arrays in zip(*collected, strict=True)))


def _pairs(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    order = np.lexsort(keys.T[::-1])  # stable: equal keys stay in the corpus's order
    keys, numbers = keys[order], numbers[order]
    same = np.zeros(len(keys), dtype=bool)
    same[1:] = (keys[1:] == keys[:-1]).all(axis=1)
    heads = np.maximum.accumulate(np.where(same, 0, np.arange(len(keys))))
    return np.stack([numbers[heads[same]], numbers[same]], axis=1)
