"""Labelled text from JSONL (also .gz), CSV, TSV or Parquet."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError

FORMATS = ".jsonl, .jsonl.gz, .csv, .tsv or .parquet"


@dataclass(frozen=True)
class Labelled:
    """Texts and their labels as strings, in the order of the file; ``hash`` is of what was read, not of the file."""

    texts: list[str]
    labels: list[str]
    path: str
    hash: str

    def __len__(self) -> int:
        return len(self.texts)


def read_labelled(path: str | Path, text_field: str = "text", label_field: str = "label") -> Labelled:
    """Read every record; labels may be text, integers or booleans.

    Raises :class:`UserError` naming file and record for a missing file, unknown format, missing field or empty label.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"labelled data {path} does not exist")
    texts: list[str] = []
    labels: list[str] = []
    digest = hashlib.sha256()
    for where, record in _records(path):
        for name in (text_field, label_field):
            if record.get(name) is None:
                option = "--text-field" if name == text_field else "--label-field"
                have = ", ".join(map(str, record)) or "none"
                raise UserError(f"{path}, {where}: no field '{name}'; fields there: {have}. Choose with {option}")
        text, label = record[text_field], record[label_field]
        if not isinstance(text, str):
            raise UserError(f"{path}, {where}: field '{text_field}' is {type(text).__name__}, not text")
        if not isinstance(label, str | int | np.generic) or label == "":
            raise UserError(f"{path}, {where}: field '{label_field}' holds {label!r}, not a label (text or integer)")
        texts.append(text)
        labels.append(str(label))
        digest.update(json.dumps([text, str(label)]).encode())
    if not texts:
        raise UserError(f"labelled data {path} holds no record")
    return Labelled(texts, labels, str(path), digest.hexdigest())


def class_names(train: Labelled, test: Labelled) -> list[str]:
    """The labels of ``train``, sorted; raises :class:`UserError` for fewer than two or a test label unseen there."""
    names = sorted(set(train.labels), key=lambda name: (len(name), name) if name.isdigit() else (0, name))
    if len(names) < 2:
        raise UserError(f"{train.path} has one label only, '{names[0]}': nothing to classify")
    if len(names) > max(1000, len(train) // 2):
        raise UserError(
            f"{train.path} has {len(names)} labels on {len(train)} records: is --label-field the right one?"
        )
    unseen = Counter(label for label in test.labels if label not in set(names))
    if unseen:
        shown = ", ".join(f"'{label}' ({n}x)" for label, n in unseen.most_common(5))
        raise UserError(f"{test.path} has labels that {train.path} lacks: {shown}; train has {', '.join(names[:10])}")
    return names


def carve(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into (rest, held out) by class, ``share`` of each held out but never a class's last example.

    Raises :class:`UserError` where nothing can be held out.
    """
    rng = np.random.default_rng(seed)
    held: list[np.ndarray] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held.append(members[: min(max(round(share * len(members)), 1), len(members) - 1)])
    out = np.sort(np.concatenate(held))
    if not len(out):
        raise UserError("every label has a single training record: none can be held out to choose the epoch on")
    return np.setdiff1d(np.arange(len(labels)), out), out


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
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
    except (OSError, EOFError) as error:
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
