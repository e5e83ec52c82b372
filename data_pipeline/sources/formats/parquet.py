"""Parquet, by runs of row groups."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.sources.format import Chunk, Format, Found, Source, register
from data_pipeline.sources.pieces import Piece
from data_pipeline.sources.reading import Bad, Wanted, excerpt_of

if TYPE_CHECKING:
    import pyarrow as pa

    from data_pipeline.sources.inputs import CorpusFile

_BATCH_BYTES = 4 << 20  # of text decoded at a time; a batch of a fixed number of rows may be gigabytes of long ones
_BATCH_ROWS = 1000
_BUFFER = 1 << 20  # of a column read ahead; without it pyarrow reads the whole column of a row group


@register
class Parquet(Format):
    """``record`` is the row in the file."""

    name = "parquet"
    suffixes = (".parquet",)
    unit = "row"
    cut = "own"
    opens = "path"
    division = 2

    def pieces(self, file: CorpusFile, codec: str, target_bytes: int, wanted: Wanted) -> list[Piece]:
        """Runs of row groups with about ``target_bytes`` in the columns that are wanted. Reads the footer only.

        The byte ranges tile the file: each begins where its first row group does, the first at 0, the last ends with
        the file. Raises :class:`UserError` for a column that is missing or of another type than is wanted.
        """
        path = str(file.path)
        with _named(path):
            metadata = _metadata(path)
            columns_of(metadata.schema.to_arrow_schema(), wanted, path)  # told now, not when its turn comes
            groups = [_group(metadata.row_group(i), wanted) for i in range(metadata.num_row_groups)]
        edges, starts, total = [0], [0], 0
        for i, (start, size) in enumerate(groups):
            if total and total + size > target_bytes and starts[-1] < start < file.bytes:
                edges.append(i)
                starts.append(start)
                total = 0
            total += size
        ends = zip([*edges[1:], len(groups)], [*starts[1:], file.bytes], strict=True)
        return [
            Piece(
                name=file.name,
                location=path,
                kind=self.name,
                begin=start,
                end=end,
                rows=(first, last),
                size=sum(size for _, size in groups[first:last]),
                total=file.bytes,
            )
            for first, start, (last, end) in zip(edges, starts, ends, strict=True)
        ]

    def read(self, source: Source, wanted: Wanted) -> Iterator[Found]:
        """See :class:`Format`.

        Raises :class:`UserError` if the file lacks a column or a column is of another type than is wanted, and for a
        file that is no Parquet, damaged or changed.
        """
        excerpt = source.piece.excerpt
        if excerpt:
            with _named(source.location):
                yield from _numbered(_copied(excerpt.path), excerpt.before, wanted)
            return
        with _row_run(source, wanted) as (before, _, batches):
            yield from _numbered(batches, before, wanted)

    def chunks(self, source: Source, wanted: Wanted, target_bytes: int) -> Iterator[Chunk]:
        """See :class:`Format`. Arrow IPC streams, with the columns that are wanted.

        All are of one number of rows, but where rows are uneven a chunk ends before it has twice ``target_bytes``.
        """
        with _row_run(source, wanted) as (before, rows, batches):
            each = max(1, rows * target_bytes // max(source.piece.size, 1))
            held: list[pa.RecordBatch] = []
            count = size = 0
            for batch in batches:
                begin = 0
                while begin < batch.num_rows:
                    rest = batch.slice(begin, each - count)
                    fit = _rows_within(rest, 2 * target_bytes - size)
                    if fit or not held:
                        held.append(rest.slice(0, max(fit, 1)))
                        begin += held[-1].num_rows
                        count += held[-1].num_rows
                        size += _bytes_of(held[-1], held[-1].num_rows)
                    if count == each or fit < rest.num_rows:
                        yield Chunk(_copy(held), before)
                        before += count
                        held, count, size = [], 0, 0
            if held:
                yield Chunk(_copy(held), before)


def _rows_within(batch: pa.RecordBatch, room: int) -> int:
    """How many of its first rows have at most ``room`` bytes."""
    low, high = 0, batch.num_rows + 1  # low fits, high does not
    if _bytes_of(batch, batch.num_rows) <= room:
        return batch.num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if _bytes_of(batch, middle) <= room:
            low = middle
        else:
            high = middle
    return low


def _bytes_of(batch: pa.RecordBatch, rows: int) -> int:
    """Of its first rows, without what they share, as a dictionary."""
    return batch.slice(0, rows).nbytes - batch.slice(0, 0).nbytes


def _numbered(batches: Iterable[pa.RecordBatch], before: int, wanted: Wanted) -> Iterator[Found]:
    """The records of batches with ``before`` rows of the file in front."""
    row = before
    for batch in batches:
        for value in _values(batch, wanted):
            row += 1
            yield Found(value, row)


@contextmanager
def _row_run(source: Source, wanted: Wanted) -> Iterator[tuple[int, int, Iterable[pa.RecordBatch]]]:
    """Rows before those of a piece, their number, and the rows themselves."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    piece, path = source.piece, source.location
    with _named(path):
        if piece.total not in (-1, os.stat(path).st_size):
            raise UserError(f"{path} has changed since it was planned: it had {piece.total:,} bytes")
        with (
            pa.OSFile(path) as stream,
            pq.ParquetFile(stream, buffer_size=_BUFFER, page_checksum_verification=True) as file,
        ):
            columns = columns_of(file.schema_arrow, wanted, path)
            metadata = file.metadata
            first, last = piece.rows if piece.rows is not None else (0, metadata.num_row_groups)
            if last > metadata.num_row_groups:
                raise UserError(f"{path} has changed since it was planned: it has fewer row groups")
            before = sum(metadata.row_group(i).num_rows for i in range(first))
            rows = sum(metadata.row_group(i).num_rows for i in range(first, last))
            if not rows:
                yield before, 0, ()
                return
            yield (
                before,
                rows,
                file.iter_batches(
                    batch_size=max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(piece.size, 1))),
                    row_groups=list(range(first, last)),
                    columns=columns,
                    use_threads=False,  # a process is given one core
                ),
            )


def _copy(batches: list[pa.RecordBatch]) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _copied(path: str) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with pa.OSFile(path) as stream, pa.ipc.open_stream(stream) as reader:
        yield from reader


def columns_of(schema: pa.Schema, wanted: Wanted, where: str) -> list[str] | None:
    """The columns to read, None for all; raises :class:`UserError` if one is missing or of another type than is
    wanted."""
    for field in wanted.fields:
        kind = _field_type(schema, field)
        if kind is None:
            columns = ", ".join(schema.names) or "none"
            raise UserError(f"{where}: no column '{field}'; its columns are: {columns}{wanted.choose(field)}")
        if wanted.types != "any" and not _text_type(kind, wanted.types == "values"):
            raise UserError(f"{where}: column '{field}' is not text but {kind}")
    return list(wanted.fields) or None


def _field_type(schema: pa.Schema, field: str) -> pa.DataType | None:
    """The type of a column, or of a field inside struct columns by its dotted path."""
    from pyarrow import types

    if field in schema.names:
        return schema.field(field).type
    kind: Any = schema
    for part in field.split("."):
        if not (kind is schema or types.is_struct(kind)) or part not in kind.names:
            return None
        kind = kind.field(part).type
    return kind


def _text_type(kind: pa.DataType, in_template: bool) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)
    return text or (in_template and number)


def _values(batch: pa.RecordBatch, wanted: Wanted) -> Iterator[dict[str, Any] | str | Bad | None]:
    """Records, or the texts of the one column that is wanted, which is faster."""
    plain = wanted.types == "text" and len(wanted.fields) == 1 and wanted.fields[0] in batch.schema.names
    try:
        yield from batch.column(wanted.fields[0]).to_pylist() if plain else batch.to_pylist()
    except UnicodeDecodeError:
        yield from _one_by_one(batch)


def _one_by_one(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Bad]:
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            detail = f"not UTF-8 ({error.reason}, byte {error.start + 1} of the text)"
            yield Bad("not UTF-8", detail, excerpt_of(error.object))


def _metadata(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pa.OSFile(path) as stream:  # a path as it is, also one that looks like a URI
        return pq.read_metadata(stream)


def _group(group: Any, wanted: Wanted) -> tuple[int, int]:
    """Where a row group begins, and the bytes of its text (of all columns if it lacks those asked for)."""
    start, size, everything = None, 0, 0
    for i in range(group.num_columns):
        column = group.column(i)
        for offset in (column.dictionary_page_offset, column.data_page_offset):
            if offset is not None and (start is None or offset < start):
                start = offset
        everything += column.total_uncompressed_size
        if column.path_in_schema in wanted.fields:
            size += column.total_uncompressed_size
    return start or 0, size or everything


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Errors of pyarrow and the operating system as :class:`UserError` naming the file."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
