"""Megatron-LM's indexed datasets: NAME.bin holds tokens, NAME.idx says where sequences and documents end.

The layout is that of ``megatron/core/datasets/indexed_dataset.py``, little-endian throughout. In order, the index has:

- the magic ``MMIDIDX\\0\\0``, the version (uint64, 1), the code of the token's dtype (uint8);
- the numbers of sequences n and of entries d of the document index (uint64 both);
- the lengths of the sequences in tokens (n int32), and the byte at which each begins in the .bin (n int64);
- the document index (d int64): the sequence with which each document begins, and at last n.

A document may have several sequences, or none. Multimodal datasets have n int8 more.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.exchange.tokenfile import TokenDocument, map_file
from data_pipeline.sources.pieces import Piece

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CODES = {name: code for code, name in DTYPES.items()}
KIND = "megatron"
_OLD_MAGIC = b"TNTIDX\x00\x00"
_FLOATS = {6: "float64 or float32", 7: "float32 or float64"}  # which of them depends on the version of Megatron
_AT_ONCE = 1 << 18  # entries of the index that are looked at together


class MegatronFile:
    """A pair of .bin and .idx; ``path`` is the .bin. The ids themselves are not looked at.

    Raises :class:`UserError` for an index that is damaged, cut short or of another version, for tokens that are not
    integers, and for a .bin whose size is not what the index says. ``checked`` says that all of this was seen before.
    """

    def __init__(self, path: Path, checked: bool = False) -> None:
        self.path, self.index = path, path.with_suffix(".idx")
        self.described_by: tuple[Path, ...] = (self.index,)
        header = _header(self.index)
        self.dtype = np.dtype(DTYPES[header.code]).newbyteorder("<")
        begin = HEADER.size
        self._lengths = map_file(self.index, "<i4", begin, header.sequences)
        begin += 4 * header.sequences
        self._pointers = map_file(self.index, "<i8", begin, header.sequences)
        begin += 8 * header.sequences
        self._firsts = map_file(self.index, "<i8", begin, header.documents)
        self.documents: int | None = header.documents - 1
        self._bytes = _size(path, "the tokens of the index beside it")
        self.tokens = self._bytes // self.dtype.itemsize
        if not checked:
            self._check()
        self._tokens = map_file(path, self.dtype)

    def _check(self) -> None:
        total = 0
        for start in range(0, len(self._lengths), _AT_ONCE):
            lengths = self._lengths[start : start + _AT_ONCE].astype(np.int64)
            if lengths.min() < 0:
                at = start + int(np.argmax(lengths < 0))
                raise _damaged(self.index, f"sequence {at:,} has a length of {self._lengths[at]} tokens")
            ends = total + np.cumsum(lengths) * self.dtype.itemsize
            begins = np.append(total, ends[:-1])
            wrong = begins != self._pointers[start : start + _AT_ONCE]
            if wrong.any():
                at = start + int(np.argmax(wrong))
                raise _damaged(
                    self.index,
                    f"sequence {at:,} begins at byte {self._pointers[at]:,}, those before it end at "
                    f"{begins[at - start]:,}; only sequences that follow each other are read",
                )
            total = int(ends[-1])
        if total != self._bytes:
            raise UserError(
                f"{self.path} has {self._bytes:,} bytes, its index {self.index.name} says {total:,}: it was cut short, "
                "or the two do not belong together"
            )
        last = 0
        for start in range(0, len(self._firsts), _AT_ONCE):
            part = self._firsts[start : start + _AT_ONCE]
            if (np.diff(part, prepend=last) < 0).any() or (start == 0 and part[0] != 0):
                raise _damaged(self.index, "its documents do not follow each other")
            last = int(part[-1])
        if last != len(self._lengths):
            raise _damaged(self.index, f"its documents end at sequence {last:,} of {len(self._lengths):,}")
        if not self.tokens:
            raise UserError(f"{self.path} holds no token")

    def _begin(self, document: int) -> int:
        """The byte at which a document begins."""
        sequence = int(self._firsts[document])
        return int(self._pointers[sequence]) if sequence < len(self._pointers) else self._bytes

    def pieces(self, name: str, target_bytes: int) -> list[Piece]:
        """See :class:`~data_pipeline.exchange.tokenfile.TokenFile`; ``rows`` are the documents."""
        edges, documents = [0], len(self._firsts) - 1
        while edges[-1] < documents:
            full = self._begin(edges[-1]) + target_bytes
            edges.append(bisect_left(range(documents), full, lo=edges[-1] + 1, key=self._begin))
        places = [self._begin(edge) for edge in edges]
        return [
            Piece(name, str(self.path), KIND, places[i], places[i + 1], (edges[i], edges[i + 1]), size, self._bytes)
            for i, size in enumerate(np.diff(places).tolist())
        ]

    def read(self, piece: Piece) -> Iterator[TokenDocument]:
        """See :class:`~data_pipeline.exchange.tokenfile.TokenFile`: a document is all its sequences."""
        assert piece.rows is not None
        first, stop = piece.rows
        for start in range(first, stop, _AT_ONCE):
            sequences = np.asarray(self._firsts[start : min(stop, start + _AT_ONCE) + 1])
            inside = np.minimum(sequences, len(self._pointers) - 1)
            begins = np.where(sequences < len(self._pointers), self._pointers[inside], self._bytes)
            edges = (begins // self.dtype.itemsize).tolist()
            for number in range(len(edges) - 1):
                ids = self._tokens[edges[number] : edges[number + 1]]
                yield TokenDocument(start + number, edges[number] * self.dtype.itemsize, ids)


class _Header:
    def __init__(self, code: int, sequences: int, documents: int) -> None:
        self.code, self.sequences, self.documents = code, sequences, documents


def _header(path: Path) -> _Header:
    size = _size(path, "the index that tells where documents end")
    with open(path, "rb") as stream:
        data = stream.read(HEADER.size)
    if data.startswith(_OLD_MAGIC):
        raise UserError(
            f"{path} is of Megatron's older format (--dataset-impl lazy or cached), which is not read: write it anew "
            "with --dataset-impl mmap, or prepare the text itself"
        )
    if not data.startswith(MAGIC):
        raise UserError(f"{path} is not an index of Megatron-LM: it begins with {data[:9]!r}, not {MAGIC!r}")
    if len(data) < HEADER.size:
        raise _damaged(path, f"it ends in its header, after {len(data)} bytes")
    _, version, code, sequences, documents = HEADER.unpack(data)
    if version != VERSION:
        raise UserError(f"{path} has version {version} of Megatron-LM's format, this program reads version {VERSION}")
    if code not in DTYPES:
        kind = f"{_FLOATS[code]} values, not token ids" if code in _FLOATS else "values of an unknown type"
        raise UserError(f"{path}: the .bin holds {kind} (dtype code {code}); codes that are read: {_codes()}")
    if not sequences or documents < 2:
        raise UserError(f"{path} lists no documents: move the pair away, or name the others by a quoted pattern")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size == expected + sequences:
        raise UserError(f"{path} is of a multimodal dataset (a mode for each sequence), which is not read")
    if size != expected:
        raise _damaged(
            path,
            f"it has {size:,} bytes, and {sequences:,} sequences in {documents - 1:,} documents take {expected:,}: it "
            "was cut short or changed",
        )
    return _Header(code, sequences, documents)


def _codes() -> str:
    return ", ".join(f"{code} ({name})" for code, name in DTYPES.items())


def _size(path: Path, role: str) -> int:
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it holds {role}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not size:
        raise UserError(f"{path} is empty")
    return size


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}")
