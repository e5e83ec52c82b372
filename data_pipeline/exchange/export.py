"""`nystrom data export`: shards as Parquet or as Megatron-LM's indexed dataset, read back and compared.

Files appear under their names only when whole, the index of a Megatron pair last. Memory is that of some mebitokens,
of the index of one shard, and of the longest document. An export is not resumed: it writes at the speed of the disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.exchange import megatron
from data_pipeline.exchange.tokenfile import IdsHash
from data_pipeline.files import TMP_SUFFIX, publish
from data_pipeline.prepare.worker import writing
from data_pipeline.shards.shardset import ShardSet

GROUP_TOKENS = 1 << 20  # a row group of Parquet ends with the document that reaches this
FILE_TOKENS = 1 << 27  # and a file
MEGATRON_SMALL = 65500  # vocabularies below this have uint16 in Megatron-LM, larger ones int32 (DType.optimal_dtype)
_PARQUET = re.compile(r"tokens-\d{5,}\.parquet(\.tmp)?")


class Run(NamedTuple):
    """Neighbouring documents of a shard, each with its end token."""

    ids: np.ndarray  # (sum of lengths,) in the stored dtype
    lengths: np.ndarray  # (documents,) int64
    first: int  # number of the first document in the stream
    sources: list[str]  # of each document


@dataclass(frozen=True)
class Exported:
    """What was written and then read back."""

    files: tuple[Path, ...]
    documents: int
    tokens: int
    ids_hash: str  # see IdsHash: documents with their end tokens


def export_parquet(
    shards: ShardSet,
    folder: Path,
    *,
    text: bool = False,
    overwrite: bool = False,
    file_tokens: int = FILE_TOKENS,
    group_tokens: int = GROUP_TOKENS,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> Exported:
    """Write ``tokens-NNNNN.parquet`` into ``folder``, a row for each document, and read all back.

    Columns: ``document`` (int64, from 0), ``source`` (string), ``input_ids`` (list of uint16 or uint32, the end token
    included), with ``text`` also ``text`` (the ids decoded, special tokens left out). The schema's metadata has the
    hash of the tokenizer, the ids of its special tokens and the fingerprint of the shards. ``on_tokens`` is called
    with the tokens that were written, and again when they were read back. Raises :class:`UserError` for a folder with
    other contents, for damaged shards, and if what is read back differs.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file_tokens < 1:
        raise UserError(f"a file must hold at least one token, got {file_tokens}")
    _clear(folder, overwrite)
    schema = _schema(shards, text)
    tokenizer = shards.tokenizer() if text else None
    written, files, left = IdsHash(), list[Path](), 0
    with writing(folder):
        writer: Any = None
        path = tmp = folder
        try:
            for run in runs(shards, min(group_tokens, file_tokens)):
                if writer is None:
                    path = folder / f"tokens-{len(files):05d}.parquet"
                    tmp, left = path.with_name(path.name + TMP_SUFFIX), file_tokens
                    writer = pq.ParquetWriter(tmp, schema, compression="zstd")
                offsets = np.cumsum([0, *run.lengths], dtype=np.int64)
                columns = [
                    pa.array(np.arange(run.first, run.first + len(run.lengths))),
                    pa.array(run.sources, pa.string()),
                    pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(run.ids)).cast(schema.field(2).type),
                ]
                if tokenizer is not None:
                    spans = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
                    columns.append(pa.array(tokenizer.decode_batch([run.ids[a : b - 1].tolist() for a, b in spans])))
                writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(run.lengths))
                written.update(run.ids, run.lengths)
                on_tokens(len(run.ids))
                left -= len(run.ids)
                if left <= 0:
                    _finish(writer, tmp, path, files)
                    writer = None
            if writer is not None:
                _finish(writer, tmp, path, files)
                writer = None
        finally:
            if writer is not None:
                writer.close()
                tmp.unlink(missing_ok=True)
    found = IdsHash()
    for file in files:
        opened = pq.ParquetFile(file)
        for group in range(opened.num_row_groups):
            for chunk in opened.read_row_group(group, columns=["input_ids"]).column(0).chunks:
                ids = chunk.flatten().to_numpy()
                found.update(ids, chunk.value_lengths().to_numpy())
                on_tokens(len(ids))
    return _compared(folder, tuple(files), shards, written, found)


def export_megatron(
    shards: ShardSet,
    prefix: Path,
    *,
    overwrite: bool = False,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> Exported:
    """Write ``prefix.bin`` and ``prefix.idx``, and read both back: a document, its end token included, is one sequence.

    Raises :class:`UserError` for files that are there (unless ``overwrite``), for damaged shards, and if what is read
    back differs. ``on_tokens`` as in :func:`export_parquet`.
    """
    tokens, index = (prefix.with_name(prefix.name + end) for end in (".bin", ".idx"))
    if not overwrite and (taken := [path for path in (tokens, index) if path.exists()]):
        raise UserError(f"{taken[0]} is there already: choose another name, or --overwrite to replace it")
    _make(prefix.parent)
    dtype = np.dtype("<u2" if shards.vocab_size < MEGATRON_SMALL else "<i4")
    written = IdsHash()
    with writing(prefix.parent):
        index.unlink(missing_ok=True)  # first: without it the pair does not count
        with _whole(tokens) as file:
            for run in runs(shards, GROUP_TOKENS):
                file.write(np.ascontiguousarray(run.ids, dtype=dtype).data.cast("B"))
                written.update(run.ids, run.lengths)
                on_tokens(len(run.ids))
        with _whole(index) as file:
            _write_index(file, shards, dtype)
    found, pair = IdsHash(), megatron.MegatronFile(tokens)
    [piece] = pair.pieces(tokens.name, max(1, pair.tokens * dtype.itemsize))
    for document in pair.read(piece):
        found.update(document.ids, np.array([len(document.ids)]))
        on_tokens(len(document.ids))
    return _compared(prefix, (tokens, index), shards, written, found)


def runs(shards: ShardSet, tokens: int) -> Iterator[Run]:
    """All documents in order, as runs that end with the document that reaches so many tokens, or with their shard.

    Raises :class:`UserError` for shards that are damaged.
    """
    offset = document = 0
    for shard in shards.manifest.shards:
        ends = shards.document_ends(shard.index).astype(np.int64)
        names, places = shards.document_sources(shard.index)
        if len(ends) != shard.num_documents or int(ends[-1]) != shard.num_tokens:
            raise UserError(f"{shards.path / shard.index.name} does not fit {shard.tokens.name}; prepare them again")
        begin = start = 0
        while start < len(ends):
            stop = min(len(ends), int(np.searchsorted(ends, begin + tokens)) + 1)
            end = int(ends[stop - 1])
            ids = shards.read(np.array([offset + begin]), end - begin)[0].astype(shards.manifest.dtype)
            lengths = np.diff(ends[start:stop], prepend=begin)
            if (ids[np.cumsum(lengths) - 1] != shards.eos_id).any():
                raise UserError(f"{shards.path / shard.tokens.name}: a document has no end token; prepare it again")
            yield Run(ids, lengths, document + start, [names[at] for at in places[start:stop].tolist()])
            begin, start = end, stop
        offset, document = offset + shard.num_tokens, document + len(ends)


def _schema(shards: ShardSet, text: bool) -> Any:
    import pyarrow as pa

    ids = pa.list_(pa.field("element", pa.uint16() if shards.manifest.dtype == "uint16" else pa.uint32()))
    fields = [("document", pa.int64()), ("source", pa.string()), ("input_ids", ids)]
    about = {
        "nystrom.tokenizer_hash": shards.tokenizer_hash,
        "nystrom.fingerprint": shards.fingerprint,
        **{f"nystrom.{role}_id": str(id_) for role, id_ in shards.manifest.special_ids.items()},
    }
    return pa.schema([*fields, *([("text", pa.string())] if text else [])], metadata=about)


def _finish(writer: Any, tmp: Path, path: Path, files: list[Path]) -> None:
    writer.close()
    with open(tmp, "rb+") as file:
        os.fsync(file.fileno())
    publish(tmp, path)
    files.append(path)


def _write_index(file: IO[bytes], shards: ShardSet, dtype: np.dtype) -> None:
    """The three lists one after the other, each from the indexes of all shards."""
    count = shards.num_documents
    code = megatron.CODES[dtype.name]
    file.write(megatron.HEADER.pack(megatron.MAGIC, megatron.VERSION, code, count, count + 1))
    for shard in shards.manifest.shards:
        lengths = np.diff(shards.document_ends(shard.index).astype(np.int64), prepend=0)
        if int(lengths.max()) > np.iinfo(np.int32).max:
            raise UserError(f"{shards.path}: a document of {int(lengths.max()):,} tokens; Megatron-LM counts to 2^31")
        file.write(lengths.astype("<i4").data.cast("B"))
    offset = 0
    for shard in shards.manifest.shards:
        ends = shards.document_ends(shard.index).astype(np.int64)
        begins = (offset + np.append(0, ends[:-1])) * dtype.itemsize
        file.write(begins.astype("<i8").data.cast("B"))
        offset += shard.num_tokens
    for start in range(0, count + 1, GROUP_TOKENS):
        file.write(np.arange(start, min(count + 1, start + GROUP_TOKENS), dtype="<i8").data.cast("B"))


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when the block has ended without an error."""
    tmp = path.with_name(path.name + TMP_SUFFIX)
    try:
        with open(tmp, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def _clear(folder: Path, overwrite: bool) -> None:
    _make(folder)
    held = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in held if not _PARQUET.fullmatch(name)]
    if foreign:
        raise UserError(f"{folder} holds other files ({foreign[0]}): choose an empty or new folder")
    if held and not overwrite:
        raise UserError(f"{folder} holds an export already ({held[0]}): choose another folder, or --overwrite")
    for name in held:
        (folder / name).unlink()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from None


def _compared(out: Path, files: tuple[Path, ...], shards: ShardSet, written: IdsHash, found: IdsHash) -> Exported:
    counts = (found.documents, found.tokens)
    if counts != (shards.num_documents, shards.num_tokens) or written.hexdigest() != found.hexdigest():
        raise UserError(
            f"{out} does not read back as it was written: {counts[0]:,} documents and {counts[1]:,} tokens, of "
            f"{shards.num_documents:,} and {shards.num_tokens:,}; remove it and export again"
        )
    return Exported(files, *counts, found.hexdigest())
