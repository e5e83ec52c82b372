"""Documents streamed out of JSONL, JSONL.gz, Parquet and plain text files, through the `datasets` library.

A file is never whole in memory (a plain text file is one document, and a document may be). Nothing is written to the
Hugging Face cache and nothing is asked of the network. Text is passed on as it is; only a byte order mark at the
start of a file is dropped, and the line ends of plain text files become ``\\n`` (Python's universal newlines).
"""

from __future__ import annotations

import functools
import glob
import gzip
import json
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from data_pipeline.errors import UserError
from data_pipeline.sources.inputs import expand_inputs, kind_of, unsupported

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Counts", "Document", "expand_inputs", "iter_documents"]

_TEXT_GROUP = 256  # text files opened by one load_dataset call, which costs 3 ms
_RECORDS = 1000  # records handed over at a time


class Document(NamedTuple):
    """A document and where it came from."""

    text: str
    path: Path
    record: int  # line of a JSONL file or row of a Parquet file, from 1; 1 for a text file
    size: int  # UTF-8 bytes of the text


@dataclass
class Counts:
    """What a pass over documents has seen so far."""

    documents: int = 0
    empty: int = 0  # null or nothing but white space: skipped
    text_bytes: int = 0


def iter_documents(
    paths: Path | str | Sequence[Path], text_field: str = "text", counts: Counts | None = None
) -> Iterator[Document]:
    """Stream the documents of one file or several, in order; documents without text are counted and left out.

    ``text_field`` names the field of JSONL records or the column of Parquet files; null counts as empty. ``counts`` is
    added to while the stream is consumed. Raises :class:`UserError` naming the file, and the line or row where it is
    known, for a missing or unreadable file, a record that is broken or lacks the field, a field that is not text, and
    damaged compression or encoding.
    """
    counts = Counts() if counts is None else counts
    files = [Path(paths)] if isinstance(paths, (str, Path)) else list(paths)
    for kind, group in _runs(files):
        if kind == "jsonl":
            texts = _jsonl(group[0], text_field)
        elif kind == "parquet":
            texts = _parquet(group[0], text_field)
        else:
            texts = _text(group)
        for text, path, record in texts:
            if not text or text.isspace():
                counts.empty += 1
                continue
            try:
                size = len(text.encode())
            except UnicodeEncodeError:
                raise UserError(
                    f"{path}, record {record}: the text has half a surrogate pair, which is not Unicode text"
                ) from None
            counts.documents += 1
            counts.text_bytes += size
            yield Document(text, path, record, size)


def _runs(files: Sequence[Path]) -> Iterator[tuple[str, list[Path]]]:
    """Files one by one, but neighbouring text files together."""
    texts: list[Path] = []
    for file in files:
        kind = kind_of(file)
        if kind is None:
            raise unsupported(file)
        if not file.is_file():
            raise UserError(f"{file} does not exist")
        if "::" in str(file.resolve()):
            raise UserError(f"{file}: a path with '::' means something else to the datasets library; rename it")
        if texts and (kind != "text" or len(texts) == _TEXT_GROUP):
            yield "text", texts
            texts = []
        if kind == "text":
            texts.append(file)
        else:
            yield kind, [file]
    if texts:
        yield "text", texts


_Text = tuple[str | None, Path, int]


def _jsonl(path: Path, text_field: str) -> Iterator[_Text]:
    # Read as lines and parsed here rather than by the JSON loader of `datasets` (5.2): that one turns texts that look
    # like dates into dates, and cannot say in which line it stumbled.
    number = 0
    try:
        for table in _stream("text", [path], _RECORDS, sample_by="line"):
            for line in table.column(0).to_pylist():
                number += 1
                if number == 1:
                    line = line.removeprefix("\ufeff")
                if line and not line.isspace():
                    yield _field_of(line, path, number, text_field), path, number
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except _READ_ERRORS as error:
        raise _unreadable(path, error, number) from None


def _field_of(line: str, path: Path, number: int, text_field: str) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = f"{error.msg} (character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else str(error)
        hint = " (one JSON object on each line is expected)" if number == 1 else ""
        raise UserError(f"{path}, line {number}: not a JSON record: {what}{hint}") from None
    if not isinstance(record, dict):
        raise UserError(
            f"{path}, line {number}: a record must be a JSON object with fields, not {type(record).__name__}"
        )
    if text_field not in record:
        fields = ", ".join(map(str, record)) or "none"
        raise UserError(
            f"{path}, line {number}: no field '{text_field}'; its fields are: {fields} (choose with --text-field)"
        )
    value = record[text_field]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{path}, line {number}: field '{text_field}' is not text but {type(value).__name__}")
    return value


def _parquet(path: Path, text_field: str) -> Iterator[_Text]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        schema = pq.read_schema(path)
        if text_field not in schema.names:
            columns = ", ".join(schema.names) or "none"
            raise UserError(f"{path}: no column '{text_field}'; its columns are: {columns} (choose with --text-field)")
        kind = schema.field(text_field).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_null(plain)):
            raise UserError(f"{path}: column '{text_field}' is not text but {kind}")
        # Without batch_size a row group, which may be the whole file, is read at once.
        for table in _stream("parquet", [path], _RECORDS, columns=[text_field], batch_size=_RECORDS):
            for text in table.column(text_field).to_pylist():
                number += 1
                yield text, path, number
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, row {number + 1} or soon after: column '{text_field}' is not UTF-8: {error}"
        ) from None
    except (*_READ_ERRORS, pa.ArrowException) as error:
        raise _unreadable(path, error, number) from None


def _text(paths: Sequence[Path]) -> Iterator[_Text]:
    import pyarrow as pa

    done = 0  # one row for each file, in order
    try:
        for table in _stream("text", paths, 1, sample_by="document"):
            text = table.column(0)[0].as_py()
            yield text.removeprefix("\ufeff"), paths[done], 1
            done += 1
    except UnicodeDecodeError as error:
        raise _not_utf8(paths[done], error) from None
    except (*_READ_ERRORS, pa.ArrowException) as error:
        raise _unreadable(paths[done], error, 0) from None


_READ_ERRORS = (OSError, EOFError, zlib.error)


def _unreadable(path: Path, error: Exception, records: int) -> UserError:
    after = f" after record {records}" if records else ""
    if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)):
        return UserError(f"{path}: the gzip compression is damaged or cut short{after}: {error}")
    return UserError(f"{path} cannot be read{after}: {error}")


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    """Find the line, which the streaming reader does not know: it decodes a block at a time."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with cast(BinaryIO, opener(path, "rb")) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as found:
                return UserError(
                    f"{path}, line {number}: not UTF-8 ({found.reason}, byte {found.start + 1} of the line)"
                )
    return UserError(f"{path}: not UTF-8: {error}")


def _stream(loader: str, paths: Sequence[Path], records: int, **options: Any) -> Iterator[pa.Table]:
    datasets = _datasets()
    dataset = datasets.load_dataset(
        loader,
        data_files=[glob.escape(str(path.resolve())) for path in paths],  # otherwise "a[1].txt" is a pattern
        split="train",
        streaming=True,
        cache_dir=_scratch().name,
        **options,
    )
    yield from dataset.with_format("arrow").iter(batch_size=records)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Streaming leaves lock files behind in its cache folder; this one goes when the process does."""
    return tempfile.TemporaryDirectory(prefix="nystrom-data-")


@functools.cache
def _datasets() -> Any:
    import datasets

    # Every load_dataset otherwise asks the hub to count a download: 5 s without a network, and nobody's business.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said by our own exceptions
    return datasets
