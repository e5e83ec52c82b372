"""Records of JSONL (also .gz), CSV, TSV and Parquet files, with the place of each for messages."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet")
FORMATS = ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"


def file_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, fields) of every record; raises :class:`UserError` for a file that cannot be read."""
    name = path.name.lower()
    try:
        if name.endswith((".jsonl", ".jsonl.gz", ".json", ".ndjson")):
            yield from _jsonl(path, gzip.open if name.endswith(".gz") else open)
        elif name.endswith((".csv", ".tsv")):
            yield from _csv(path, "\t" if name.endswith(".tsv") else ",")
        elif name.endswith(".parquet"):
            yield from _parquet(path)
        else:
            raise UserError(f"labelled data {path}: format not known by its name, must be {FORMATS}")
    except UnicodeDecodeError as error:
        raise UserError(f"labelled data {path} is not UTF-8 text: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"labelled data {path} cannot be read: {error}") from None


def _jsonl(path: Path, opener: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}); one object a line is expected") from None
            if not isinstance(record, dict):
                raise UserError(
                    f"{path}, line {number}: {type(record).__name__} where an object with fields is expected"
                )
            yield f"line {number}", record


def _csv(path: Path, delimiter: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(2**30)  # the default of 128 KiB is shorter than a chapter
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for number, record in enumerate(reader, 1):
                yield f"record {number}", {str(k): v for k, v in record.items()}
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not readable as CSV ({error})") from None


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(1024):
            for record in batch.to_pylist():
                number += 1
                yield f"row {number}", record
    except pa.ArrowInvalid as error:
        raise UserError(f"labelled data {path} is not a Parquet file: {error}") from None
