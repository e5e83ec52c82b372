"""Reading prepared shards: one long stream of tokens, memory-mapped, gathered by the batch.

A shard folder holds ``manifest.json`` (``manifest.py``), a copy of ``tokenizer.json``, and two files for each shard.
One is a raw little-endian token file (uint16, or uint32 for vocabularies above 65,536). The other is an Arrow IPC file
with one row for each document. Its columns are ``end`` (uint64, tokens from the start of the shard to the end of the
document, its ``</s>`` included) and ``source`` (name of the input file). The shards in the order of the manifest, put
end to end, are the token stream: each document's tokens and then ``</s>``.
"""

from __future__ import annotations

import mmap
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from data_pipeline.errors import UserError
from data_pipeline.files import FileEntry, hash_file
from data_pipeline.html import html_facts
from data_pipeline.moved import renamed
from data_pipeline.shards.manifest import Manifest, read_manifest
from data_pipeline.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

__getattr__ = renamed(__name__, ramps="concat_ranges")


class ShardSet:
    """An opened shard folder. Use :meth:`open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.num_tokens = manifest.num_tokens
        self.num_documents = manifest.num_documents
        self.vocab_size = manifest.vocab_size
        self.tokenizer_hash = manifest.tokenizer_hash
        self.pad_id = manifest.special_ids["pad"]
        self.eos_id = manifest.special_ids["eos"]
        self.mask_id = manifest.special_ids.get("mask")
        self.special_ids = tuple(sorted({*manifest.special_ids.values(), *manifest.other_special_ids}))
        # offsets[s] is the position in the stream of the first token of shard s, offsets[-1] the length of the stream.
        self._offsets = np.cumsum([0, *(shard.num_tokens for shard in manifest.shards)], dtype=np.int64)
        _allow_open_files(len(manifest.shards))
        self._last_index: tuple[FileEntry, pa.Table] | None = None
        self._maps: list[mmap.mmap] = []
        self._tokens = [self._map(shard.tokens, shard.num_tokens) for shard in manifest.shards]

    @classmethod
    def open(cls, path: str | Path, expect_tokenizer: str | None = None) -> ShardSet:
        """Open a shard folder; checks the manifest and the size of every file it lists.

        The contents are checked by :func:`verify_shards`.

        ``expect_tokenizer`` is the hash of the tokenizer that the caller works with. Raises :class:`UserError` that
        names the file for anything missing, damaged or cut short, and for another tokenizer.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for entry in manifest.files():
            check_size(path, entry)
        if expect_tokenizer is not None and expect_tokenizer != manifest.tokenizer_hash:
            raise UserError(
                f"shards in {path} were made with another tokenizer (hash {manifest.tokenizer_hash[:12]}, vocabulary "
                f"of {manifest.vocab_size}) than the one given (hash {expect_tokenizer[:12]}); prepare the text again "
                "with that tokenizer, or use the copy of tokenizer.json in the shard folder"
            )
        return cls(path, manifest)

    def _map(self, entry: FileEntry, num_tokens: int) -> np.ndarray:
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        if entry.bytes != num_tokens * dtype.itemsize:
            raise UserError(
                f"{self.path / entry.name}: {entry.bytes} bytes are not {num_tokens} tokens of {dtype.name}"
            )
        try:
            with open(self.path / entry.name, "rb") as f:
                mapped = mmap.mmap(f.fileno(), entry.bytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # gone or cut short since its size was compared
            raise UserError(f"{self.path / entry.name} cannot be read: {error}") from None
        self._maps.append(mapped)
        # A plain array: np.memmap's own indexing costs about a microsecond more for each access.
        return np.frombuffer(mapped, dtype=dtype, count=num_tokens)

    def _present(self, shard: int) -> None:
        """Raise :class:`UserError` if a token file became shorter since it was opened: reading there would end the
        process by SIGBUS, with no message. Costs about a microsecond; what is cut in the very moment still does."""
        entry = self.manifest.shards[shard].tokens
        size = self._maps[shard].size()
        if size < entry.bytes:
            raise UserError(
                f"{self.path / entry.name} was cut short while it was read: it has {size} bytes, the manifest says "
                f"{entry.bytes}; put the file back or prepare the folder again"
            )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the shards were made with, from the copy in the folder."""
        tokenizer = Tokenizer.load(self.path)
        if tokenizer.hash != self.tokenizer_hash:
            raise UserError(
                f"{self.path / TOKENIZER_FILE} is not the tokenizer that the manifest names; it was changed"
            )
        return tokenizer

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Gather rows of ``length`` consecutive tokens of the stream; a row may run across shards.

        ``starts`` (B,) int64 positions in the stream. Returns (B, length) int64. Raises ``ValueError`` for a row that
        leaves the stream and :class:`UserError` naming the shard for a token outside the vocabulary (a damaged file).
        """
        starts = np.asarray(starts, dtype=np.int64)
        rows = np.argsort(starts)
        ascending = starts[rows]
        if length < 1 or (len(rows) and (ascending[0] < 0 or ascending[-1] + length > self.num_tokens)):
            raise ValueError(f"rows of {length} tokens must lie within the stream of {self.num_tokens} tokens")
        out = np.empty((len(rows), length), dtype=np.int64)
        begins = np.searchsorted(ascending, self._offsets).tolist()
        ends = np.searchsorted(ascending, self._offsets[1:] - length, side="right").tolist()
        largest = 0
        for shard, (begin, end) in enumerate(zip(begins[:-1], ends, strict=True)):
            if begin < end:
                self._present(shard)
                tokens = self._tokens[shard]
                # Row i of this view is tokens[i : i + length]: the gather is one call of NumPy, a memcpy for each row.
                windows = np.ndarray(
                    (len(tokens) - length + 1, length), tokens.dtype, buffer=tokens, strides=(tokens.itemsize,) * 2
                )
                alone = end - begin == len(rows)  # then no row needs to be put in its place, a tenth faster
                stored = windows[(starts if alone else ascending[begin:end]) - self._offsets[shard]]
                largest = max(largest, int(stored.max()))  # in the stored type, a quarter of the memory of int64
                out[slice(None) if alone else rows[begin:end]] = stored
            for row in rows[max(begin, end) : begins[shard + 1]].tolist():  # on into the next shard
                self._read_across(int(starts[row]), out[row])
                largest = max(largest, int(out[row].max()))
        if largest >= self.vocab_size:
            self._raise_damaged(starts, out)
        return out

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Runs of consecutive tokens laid end to end, (sum of ``lengths``,) int64.

        ``starts`` (n,) int64 positions in the stream, ascending; ``lengths`` (n,) int64 >= 0. No run may leave its
        shard (a document never does). Raises ``ValueError`` for runs that break these rules and :class:`UserError`
        naming the shard for a token outside the vocabulary (a damaged file).
        """
        shard = np.searchsorted(self._offsets, starts, side="right") - 1
        leaves = starts + lengths > self._offsets[np.minimum(shard + 1, len(self._offsets) - 1)]
        if (np.diff(starts, prepend=0) < 0).any() or (leaves & (lengths > 0)).any():
            raise ValueError("runs must be in ascending order, and each within one shard")
        position = concat_ranges(starts, lengths)
        out = np.empty(len(position), dtype=np.int64)
        edges = np.append(0, np.cumsum(lengths))[np.searchsorted(starts, self._offsets)]
        for number in np.flatnonzero(np.diff(edges)).tolist():
            part = slice(edges[number], edges[number + 1])
            self._present(number)
            out[part] = self._tokens[number][position[part] - self._offsets[number]]
        if out.size and out.max() >= self.vocab_size:
            bad = int(np.argmax(out >= self.vocab_size))
            self._raise_damaged(position[bad : bad + 1], out[bad : bad + 1, None])
        return out

    def _read_across(self, start: int, row: np.ndarray) -> None:
        shard = int(np.searchsorted(self._offsets, start, side="right")) - 1
        filled = 0
        while filled < len(row):
            self._present(shard)
            part = self._tokens[shard][start + filled - self._offsets[shard] :][: len(row) - filled]
            row[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1

    def _raise_damaged(self, starts: np.ndarray, out: np.ndarray) -> None:
        row, column = (int(i) for i in np.argwhere(out >= self.vocab_size)[0])
        position = int(starts[row]) + column
        shard = self.manifest.shards[int(np.searchsorted(self._offsets, position, side="right")) - 1]
        raise UserError(
            f"{self.path / shard.tokens.name} is damaged: token {int(out[row, column])} is outside the vocabulary of "
            f"{self.vocab_size}; `nystrom data verify {self.path}` says where"
        )

    def documents(self, limit: int | None = None) -> Iterator[np.ndarray]:
        """Token ids (n,) int64 of each document in the order of the stream, the closing ``</s>`` left out."""
        count = 0
        for number, (shard, tokens) in enumerate(zip(self.manifest.shards, self._tokens, strict=True)):
            start = 0
            for end in self.document_ends(shard.index):
                if limit is not None and count >= limit:
                    return
                self._present(number)
                document = tokens[start : int(end) - 1].astype(np.int64)
                if document.size and document.max() >= self.vocab_size:
                    self._raise_damaged(np.array([self._offsets[number] + start]), document[None])
                yield document
                start = int(end)
                count += 1

    def document_ends(self, index: FileEntry) -> np.ndarray:
        """The ``end`` column (documents,) uint64 of one shard's Arrow file; :class:`UserError` if that is damaged."""
        return np.asarray(self._index(index).column("end").to_numpy(), dtype=np.uint64)

    def document_sources(self, index: FileEntry) -> tuple[list[str], np.ndarray]:
        """The ``source`` column of one shard's Arrow file: the distinct names, and for each document (documents,) the
        place of its own among them. Raises :class:`UserError` if the file is damaged."""
        column = self._index(index).column("source").combine_chunks().dictionary_encode()
        return column.dictionary.to_pylist(), column.indices.to_numpy().astype(np.int64)

    def _index(self, entry: FileEntry) -> pa.Table:
        """A shard's Arrow file, its checksum compared: Arrow trusts what it reads, and one wrong bit gave other
        documents, crashes or worse. Measured on 100 files of 200,000 documents (2.4 MB each): 41 ms
        for all of them, 16 without the checksum."""
        import pyarrow as pa

        if self._last_index is not None and self._last_index[0] == entry:
            return self._last_index[1]
        file = self.path / entry.name
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        if xxhash.xxh3_128_hexdigest(data) != entry.xxh3_128:
            raise UserError(
                f"{file} is damaged: its contents do not match the manifest; `nystrom data verify {self.path}` says "
                "where; prepare the folder again"
            )
        try:
            table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        except (pa.ArrowInvalid, KeyError, OSError) as error:
            raise UserError(f"{file} is damaged: {error}") from None
        self._last_index = (entry, table)  # asked for twice in a row: for ends and sources, for windows of one shard
        return table

    def chunks(self, size: int = 1 << 20) -> Iterator[np.ndarray]:
        """The whole stream in order, ``size`` tokens at a time, in the stored dtype."""
        for number, tokens in enumerate(self._tokens):
            for start in range(0, len(tokens), size):
                self._present(number)
                yield tokens[start : start + size]

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet.open, (self.path,)  # another process maps the files itself

    def __repr__(self) -> str:
        return f"ShardSet({str(self.path)!r}, tokens={self.num_tokens}, documents={self.num_documents})"

    def _repr_html_(self) -> str:
        facts = [("folder", self.path), ("documents", self.num_documents), ("tokens", self.num_tokens)]
        return html_facts("Shards", [*facts, ("vocabulary", self.vocab_size), ("shards", len(self.manifest.shards))])


def concat_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Runs of consecutive integers laid end to end: [7, 2], [3, 2] -> [7, 8, 9, 2, 3]."""
    stops = np.cumsum(lengths)
    return np.repeat(starts - stops + lengths, lengths) + np.arange(stops[-1] if len(stops) else 0)


def _allow_open_files(count: int) -> None:
    """Raise the limit of open files (often 1,024) so that each shard can stay mapped: a map holds a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 512
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{count} shards need as many open files, and this system allows a process {hard}: raise the hard limit "
            "(ulimit -Hn), or prepare the text again with larger --shard-tokens"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_size(folder: Path, entry: FileEntry) -> None:
    """Raise :class:`UserError` unless the file is there with the size that the manifest says."""
    file = folder / entry.name
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{file} is missing though the manifest lists it; prepare the folder again") from None
    if size != entry.bytes:
        raise UserError(f"{file} has {size} bytes, the manifest says {entry.bytes}: it was cut short or changed")


def verify_shards(folder: str | Path, on_file: Callable[[FileEntry], None] = lambda entry: None) -> list[str]:
    """Read every file of a shard folder and compare it with the manifest.

    Returns one line for each fault (file, 4 MiB block, byte range), none if the folder is whole. ``on_file`` is called
    after each file. Raises :class:`UserError` if the manifest itself is missing or damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    faults: list[str] = []
    for entry in manifest.files():
        try:
            check_size(folder, entry)
            faults += _compare(folder, entry, manifest.block_bytes)
        except UserError as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(f"{folder / entry.name} cannot be read: {error.strerror}")
        on_file(entry)
    return faults or _cross_check(folder)


def _compare(folder: Path, entry: FileEntry, block_bytes: int) -> list[str]:
    found = hash_file(folder, entry.name, block_bytes)
    if found == entry:
        return []
    bad = [i for i, (a, b) in enumerate(zip(found.blocks, entry.blocks, strict=False)) if a != b]
    return [
        f"{folder / entry.name}, block {i} (bytes {i * block_bytes} to {min(entry.bytes, (i + 1) * block_bytes) - 1}): "
        "contents do not match the manifest"
        for i in bad
    ] or [f"{folder / entry.name}: contents do not match the manifest"]


def _cross_check(folder: Path) -> list[str]:
    """Do the files, each as it was written, agree with each other?"""
    shards = ShardSet.open(folder)
    shards.tokenizer()
    faults = []
    for shard, ends in ((shard, shards.document_ends(shard.index)) for shard in shards.manifest.shards):
        rising = bool(np.all(ends[1:] > ends[:-1]))
        if len(ends) != shard.num_documents or not rising or int(ends[-1]) != shard.num_tokens:
            faults.append(f"{folder / shard.index.name}: document ends do not fit {shard.tokens.name}")
    return faults
