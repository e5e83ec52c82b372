"""Labelled text, single or in pairs, from a file or from a dataset of the hub."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.sources.hub import HubDataset, read_rows, resolve_dataset
from data_pipeline.sources.reading import Quotes
from data_pipeline.sources.records import read_records

HUB = "hub:"
UNLABELLED = "unsup"
_ID = re.compile(r"(?P<name>[^/@:]+(/[^/@:]+)?)(@(?P<revision>[^/@:]+))?(/(?P<config>[^/@:]+))?")


@dataclass(frozen=True)
class Labelled:
    """Texts and their labels as strings, in the order of the source; ``hash`` is of what was read, not of the file.

    ``seconds``: the second text of each record, where the task is about pairs.
    """

    texts: list[str]
    labels: list[str]
    path: str
    hash: str
    seconds: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def scores(self) -> np.ndarray:
        """(n,) float64: the labels as numbers, which they are where they were read as scores."""
        return np.array([float(label) for label in self.labels])

    def take(self, indices: np.ndarray) -> Labelled:
        """Some of the records; the hash tells which."""
        seconds = None if self.seconds is None else [self.seconds[i] for i in indices]
        digest = hashlib.sha256(f"{self.hash} {indices.tolist()}".encode()).hexdigest()
        return Labelled([self.texts[i] for i in indices], [self.labels[i] for i in indices], self.path, digest, seconds)

    def item_ids(self) -> list[str]:
        """SHA-256 (the first 32 hex digits) of each record's content: copies have one, and are one item."""
        ids = []
        for number, (text, label) in enumerate(zip(self.texts, self.labels, strict=True)):
            second = None if self.seconds is None else self.seconds[number]
            content = json.dumps([text, second, label])
            ids.append(hashlib.sha256(f"{content}#0".encode()).hexdigest()[:32])  # the #0 of earlier versions
        return ids


def read_labelled(
    source: str | Path,
    text_field: str = "text",
    label_field: str = "label",
    text_b_field: str | None = None,
    quotes: Quotes = "auto",
    *,
    scores: bool = False,
) -> Labelled:
    """Read every record of a file whose records have fields, of any kind that ``nystrom data prepare`` reads, of a
    folder with a folder of text files for each label (see :func:`read_folders`), or of
    ``hub:OWNER/NAME[@REVISION][/CONFIG]:SPLIT`` (see :func:`hub_dataset`).

    Labels may be text, integers or booleans, class labels of a dataset give their names. With ``scores`` they are
    finite numbers (:attr:`Labelled.scores`), and no text may be blank. Raises :class:`UserError` naming source and
    place for what is missing or broken: the file, its format, a record, a field, a label.
    """
    fields = tuple(name for name in (text_field, text_b_field, label_field) if name)
    if str(source).startswith(HUB):
        return _hub_split(hub_dataset(str(source)), fields, scores)
    option = "--score-field" if scores else "--label-field"
    options = ("--text-field", *(["--text-b-field"] if text_b_field else []), option)
    if Path(source).is_dir() and not scores and text_b_field is None:
        rows = (({text_field: text, label_field: label}, where) for text, label, where in read_folders(Path(source)))
        return _collect(str(source), rows, fields, scores)
    return _collect(str(source), read_records(source, fields, options, quotes=quotes), fields, scores)


def read_folders(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(text, label, place) of each ``folder/LABEL/*.txt``, by label and by name, as the IMDb release lays them out.

    Its folder ``unsup`` has no labels and is passed over. Raises :class:`UserError` where there are no such files, and
    for one that is not UTF-8.
    """
    found = False
    for label in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != UNLABELLED):
        for path in sorted(label.glob("*.txt")):
            found = True
            try:
                yield path.read_text(encoding="utf-8"), label.name, f"{label.name}/{path.name}"
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read: {error}") from None
    if not found:
        raise UserError(f"{folder} is a folder without LABEL/*.txt, such as pos/1.txt and neg/1.txt: name a file")


def read_texts(
    source: str, fields: tuple[str, ...], options: tuple[str, ...], quotes: Quotes = "auto"
) -> tuple[list[list[str]], str]:
    """The texts of every record, a list for each of the ``fields``, and a hash of them; sources and errors as in
    :func:`read_labelled`. No text may be blank.
    """
    rows: Iterable[tuple[Mapping[str, Any], str]]
    if source.startswith(HUB):
        rows = ((row, f"row {number}") for number, row in enumerate(read_rows(hub_dataset(source), fields), 1))
    else:
        rows = read_records(source, fields, options, quotes=quotes)
    columns: list[list[str]] = [[] for _ in fields]
    digest = hashlib.sha256()
    for record, where in rows:
        texts = [_text(record[name], f"{source}, {where}: field '{name}'", filled=True) for name in fields]
        for column, text in zip(columns, texts, strict=True):
            column.append(text)
        digest.update(json.dumps(texts).encode())
    if not columns[0]:
        raise UserError(f"{source} holds no record")
    return columns, digest.hexdigest()


def hub_dataset(source: str) -> HubDataset:
    """The dataset that ``hub:OWNER/NAME[@REVISION][/CONFIG]:SPLIT`` means, pinned to a commit.

    ``hub:FOLDER[/CONFIG]:SPLIT`` is a folder laid out like a dataset, its path with ``/``, ``./``, ``../`` or ``~/`` in
    front.
    Raises :class:`UserError` for another form, a folder that is not there, or a hub out of reach.
    """
    name, _, split = source.removeprefix(HUB).rpartition(":")
    if name.startswith(("/", "./", "../", "~/")):
        folder, config = os.path.expanduser(name), None
        if not os.path.isdir(folder):
            folder, config = os.path.split(folder)
        if not os.path.isdir(folder):
            raise UserError(f"{source}: there is no folder {name}")
        return resolve_dataset(folder, config, split, None)
    parts = _ID.fullmatch(name)
    if parts is None or not split:
        raise UserError(f"{source}: write it as hub:OWNER/NAME:SPLIT or hub:OWNER/NAME/CONFIG:SPLIT")
    if re.fullmatch(r"[0-9a-f]{40}", parts["revision"] or ""):  # pinned already, nothing to ask the hub
        return HubDataset(parts["name"], parts["config"], split, parts["revision"])
    try:
        return resolve_dataset(parts["name"], parts["config"], split, parts["revision"])
    except UserError as error:
        hint = "without the hub, name files: --local-dir DIR, or --train FILE --test FILE"
        raise UserError(f"{error}\n{hint}") from error


def pinned(source: str | None) -> str | None:
    """``source`` with the commit of a hub dataset in it, so that all who read it later read the same."""
    if source is None or not source.startswith(HUB):
        return source
    dataset = hub_dataset(source)
    if dataset.revision is None:
        return source
    config = f"/{dataset.config}" if dataset.config else ""
    return f"{HUB}{dataset.dataset}@{dataset.revision}{config}:{dataset.split}"


@functools.lru_cache(maxsize=4)  # read when the suite is keyed and when it is run; the dataset is pinned
def _hub_split(dataset: HubDataset, fields: tuple[str, ...], scores: bool) -> Labelled:
    rows = ((row, f"row {number}") for number, row in enumerate(read_rows(dataset, fields), 1))
    return _collect(f"dataset {dataset.name}", rows, fields, scores)


def _collect(
    source: str, records: Iterable[tuple[Mapping[str, Any], str]], fields: tuple[str, ...], scores: bool
) -> Labelled:
    *text_fields, label_field = fields
    columns: list[list[str]] = [[] for _ in text_fields]
    labels: list[str] = []
    digest = hashlib.sha256()
    for record, where in records:
        for column, name in zip(columns, text_fields, strict=True):
            column.append(_text(record[name], f"{source}, {where}: field '{name}'", filled=scores))
        label = _label(record[label_field], f"{source}, {where}: field '{label_field}'", scores)
        labels.append(label)
        digest.update(json.dumps([*(column[-1] for column in columns), label]).encode())
    if not labels:
        raise UserError(f"labelled data {source} holds no record")
    if set(labels) in ({"-1"}, {"-1.0"}):
        raise UserError(
            f"{source}: every label is -1, which stands for labels that are not public: test on the validation split"
        )
    return Labelled(columns[0], labels, source, digest.hexdigest(), columns[1] if len(columns) > 1 else None)


def _text(text: Any, where: str, *, filled: bool) -> str:
    """``filled``: whether a blank text is refused."""
    if not isinstance(text, str):
        raise UserError(f"{where} is {type(text).__name__}, not text")
    if filled and not text.strip():
        raise UserError(f"{where} is blank: there is nothing to compare; leave the record out")
    _check_unicode(text, where)
    return text


def _label(label: Any, where: str, score: bool) -> str:
    """A label as text; of a ``score`` the number, so that 1, 1.0 and "1" are one."""
    if label is None or label == "":
        raise UserError(
            f"{where} is empty, every record needs a label (the test labels of GLUE are not public: test on the "
            "validation split)"
        )
    if score:
        try:
            value = math.nan if isinstance(label, bool) else float(label)
        except (TypeError, ValueError):
            raise UserError(f"{where} holds {label!r}, not a number") from None
        if not math.isfinite(value):
            raise UserError(f"{where} holds {label!r}, not a finite number: mend the record or leave it out")
        return repr(value)
    if not isinstance(label, str | int | np.generic):
        hint = "; `nystrom eval regress` learns scores" if isinstance(label, float) else ""
        raise UserError(f"{where} holds {label!r}, not a label (text or integer{hint})")
    _check_unicode(str(label), where)
    return str(label)


def _check_unicode(text: str, where: str) -> None:
    """Raises :class:`UserError` for half a surrogate pair: JSON has it, but neither a tokenizer nor a file takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half a surrogate pair (character {error.start + 1}), which is not Unicode text: mend the "
            "record or leave it out"
        ) from None
