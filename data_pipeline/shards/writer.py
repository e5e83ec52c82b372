"""Writing the shards of one unit of work: token files and their Arrow companions, hashed while they are written."""

from __future__ import annotations

import os
import re
import secrets
from array import array
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.files import TMP_SUFFIX, FileEntry, FileHasher, hash_stream, publish
from data_pipeline.shards.manifest import BLOCK_BYTES, ShardEntry


def token_dtype(vocab_size: int) -> str:
    """The narrowest unsigned type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class UnitWriter:
    """Writes documents to shards ``tokens-UUUUU-SSSSS.bin`` and ``index-UUUUU-SSSSS.arrow`` of unit U, or to
    ``tokens-UUUUU-PPPPP-SSSSS.bin`` and its index of part P of unit U.

    A shard ends with the first document that brings it to ``shard_tokens``, so that documents are never divided. Files
    appear under their names only when whole. Not for reuse after :meth:`finish`.
    """

    def __init__(
        self, folder: Path, unit: int, *, dtype: str, shard_tokens: int, eos_id: int, part: int | None = None
    ) -> None:
        self._folder, self._unit = folder, unit
        self._label = f"{unit:05d}" if part is None else f"{unit:05d}-{part:05d}"
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._eos = np.array([eos_id], dtype=self._dtype)
        self._done: list[ShardEntry] = []
        self._open: _OpenShard | None = None

    def add(self, ids: np.ndarray, source: str) -> None:
        """Append a document, ids (n,) in any integer dtype (its ``</s>`` is added here), that came from ``source``."""
        if self._open is None:
            name = f"{self._label}-{len(self._done):05d}"
            self._open = _OpenShard(self._folder, name)
        shard = self._open
        shard.write(np.ascontiguousarray(ids, dtype=self._dtype))
        shard.write(self._eos)
        shard.end_document(source)
        if shard.num_tokens >= self._shard_tokens:
            self._close_shard(shard)

    def finish(self) -> tuple[ShardEntry, ...]:
        """Close the last shard and return what was written; nothing if there was no document."""
        if self._open is not None:
            self._close_shard(self._open)
        return tuple(self._done)

    def abort(self) -> None:
        """After an error: close and remove the unfinished files. Those of a killed process go with the next run."""
        if self._open is not None:
            self._open.abandon()

    def _close_shard(self, shard: _OpenShard) -> None:
        self._done.append(shard.close(self._unit))
        self._open = None


@dataclass(frozen=True)
class _Names:
    tokens: str
    index: str


class _OpenShard:
    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._names = _Names(f"tokens-{name}.bin", f"index-{name}.arrow")
        # A name of its own for each attempt: a process believed dead cannot spoil what its successor writes.
        self._attempt = f".{secrets.token_hex(4)}{TMP_SUFFIX}"
        self.file = open(folder / (self._names.tokens + self._attempt), "wb", buffering=1 << 20)  # noqa: SIM115 - open until the shard is full
        self._hasher = FileHasher(BLOCK_BYTES)
        self.num_tokens = 0
        self.ends = array("Q")  # 8 bytes a document: bounded by the size of a shard
        self.sources = array("i")  # place of each document's input among the names
        self._numbers: dict[str, int] = {}

    def write(self, tokens: np.ndarray) -> None:
        data = tokens.data.cast("B")
        self.file.write(data)
        self._hasher.update(data)
        self.num_tokens += len(tokens)

    def end_document(self, source: str) -> None:
        self.ends.append(self.num_tokens)
        self.sources.append(self._numbers.setdefault(source, len(self._numbers)))

    def close(self, unit: int) -> ShardEntry:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        tokens = self._hasher.entry(self._names.tokens)
        index = self._write_index()
        publish(self._folder / (tokens.name + self._attempt), self._folder / tokens.name)
        return ShardEntry(unit, self.num_tokens, len(self.ends), tokens, index)

    def abandon(self) -> None:
        with suppress(OSError):  # what is still in the buffer does not go on a full disk either
            self.file.close()
        remove_files(self._folder, [name + self._attempt for name in (self._names.tokens, self._names.index)])

    def _write_index(self) -> FileEntry:
        import pyarrow as pa

        # From buffers: pa.array() would look for pandas, whose import costs each process 0.3 s.
        names = [name.encode(errors="replace") for name in self._numbers]  # a file name may be no UTF-8
        edges = np.cumsum([0, *map(len, names)], dtype=np.int32)
        text = [None, pa.py_buffer(edges), pa.py_buffer(b"".join(names))]
        dictionary = pa.Array.from_buffers(pa.utf8(), len(names), text)
        count = len(self.ends)
        numbers = pa.Array.from_buffers(pa.int32(), count, [None, pa.py_buffer(self.sources)])
        ends = pa.Array.from_buffers(pa.uint64(), count, [None, pa.py_buffer(self.ends)])
        sources = pa.DictionaryArray.from_arrays(numbers, dictionary)
        table = pa.Table.from_arrays([ends, sources], names=["end", "source"])
        tmp = self._folder / (self._names.index + self._attempt)
        with open(tmp, "w+b") as f:
            with pa.ipc.new_file(f, table.schema) as writer:
                writer.write_table(table)
            f.flush()
            os.fsync(f.fileno())
            f.seek(0)
            entry = hash_stream(f, self._names.index, BLOCK_BYTES)
        publish(tmp, self._folder / entry.name)
        return entry


_SHARD_FILE = re.compile(
    r"(?=tokens-[-\d]+\.bin|index-[-\d]+\.arrow)"
    r"(?:tokens|index)-(?P<unit>\d{5,})(?:-(?P<part>\d{5,}))?-\d{5,}\.(?:bin|arrow)(?:\.[0-9a-f]{8}\.tmp)?"
)


def unit_of(name: str) -> int | None:
    """The unit whose shard file has this name (finished or not); None for other names."""
    place = place_of(name)
    return place[0] if place else None


def place_of(name: str) -> tuple[int, int] | None:
    """Unit and part, 0 where it is not divided, as :func:`unit_of`."""
    found = _SHARD_FILE.fullmatch(name)
    return (int(found["unit"]), int(found["part"] or 0)) if found else None


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files that may be there."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
