"""Shards of a dataset that a Python program holds: ``Dataset``, ``IterableDataset`` or ``DatasetDict`` of `datasets`.

The rows go through preparation as JSONL on standard input does, so the shards are the same, byte for byte, as those of
``nystrom data prepare --input - --stdin-format jsonl`` from the lines ``{"text": ...}``, and their input is called
``<stdin>`` too. Memory is bounded: a unit of 16 MiB is spooled at a time.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.prepare.plan import Settings, plan_stdin
from data_pipeline.prepare.run import PrepareOptions, PrepareResult, prepare
from data_pipeline.sources.formats.parquet import columns_of
from data_pipeline.sources.reading import MISSING, Wanted, find_field
from data_pipeline.tokenization.roundtrip import Loss
from data_pipeline.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    import datasets

_ROWS = 1000  # handed over at a time


def prepare_dataset(
    dataset: datasets.Dataset | datasets.IterableDataset,
    tokenizer: Tokenizer | str | Path,
    out: str | Path,
    *,
    text_field: str | None = None,
    settings: Settings | None = None,
    how: PrepareOptions | None = None,
    on_text: Callable[[int], None] = lambda size: None,
    on_loss: Callable[[Loss], None] = lambda found: None,
) -> PrepareResult:
    """Tokenize a column of a dataset into the shard folder ``out``.

    ``tokenizer`` may be a path. ``text_field`` is the column (``text`` unless ``settings.reading`` says otherwise), or
    a dotted path into a column of structs. All else of ``settings``, ``how`` and the callbacks is as in
    :func:`~data_pipeline.prepare.run.prepare`: templates, normalisation, filters, processes.

    Called again after an interruption it reads the dataset from its first row, and tokenizes what is missing; for that
    the dataset must give the same rows again. On a complete folder it compares and does nothing.

    Raises :class:`UserError` for a column that is missing or not text, for a dataset with a transform (``map`` it
    first), for what the dataset itself raises, and for ``dedup``, parts of an array and Ray, which need files.
    """
    settings, how = settings or Settings(), how or PrepareOptions()
    if text_field is not None:
        settings = replace(settings, reading=replace(settings.reading, text_field=text_field))
    if settings.dedup or how.part or how.ray:
        raise UserError(
            "duplicates, the parts of an array and Ray need files: write the dataset to some "
            "(dataset.to_json('texts.jsonl'), dataset.to_parquet('texts.parquet')) and prepare those"
        )
    _check(dataset)
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    lines = _lines(dataset, settings)
    first = list(itertools.islice(lines, 1))  # a wrong column is found before the folder is touched
    stream = stream_of(itertools.chain(first, lines))
    plan = plan_stdin("jsonl", tokenizer, settings)
    return prepare(plan, out, how, stream=stream, on_text=on_text, on_loss=on_loss)


def prepare_splits(
    splits: datasets.DatasetDict | datasets.IterableDatasetDict,
    tokenizer: Tokenizer | str | Path,
    out: str | Path,
    *,
    names: Collection[str] | None = None,
    **options: Any,
) -> dict[str, PrepareResult]:
    """:func:`prepare_dataset` for each split of a ``DatasetDict``, into the folder ``out/SPLIT``.

    ``names``: the splits that are taken, left out: all. Raises :class:`UserError` for one that there is not.
    """
    if not isinstance(splits, dict):
        raise UserError(
            f"a DatasetDict is expected, not {type(splits).__name__}: prepare_dataset takes a single dataset"
        )
    missing = sorted(set(names or ()) - set(splits))
    if missing or not splits:
        raise UserError(f"the dataset has no split {missing[0] if missing else ''!r}; its splits: {', '.join(splits)}")
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    chosen = [name for name in splits if names is None or name in names]
    for name in chosen:  # before the first is tokenized
        _check(splits[name])
    return {name: prepare_dataset(splits[name], tokenizer, Path(out) / name, **options) for name in chosen}


def _check(dataset: Any) -> None:
    import datasets

    if isinstance(dataset, dict):
        raise UserError(
            f"a DatasetDict holds several datasets ({', '.join(dataset)}): take one of them, or prepare_splits"
        )
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise UserError(
            f"{type(dataset).__name__} is no dataset of the datasets library: datasets.Dataset.from_dict, from_list, "
            "from_pandas and from_generator make one"
        )
    form = dataset.format if isinstance(dataset, datasets.Dataset) else {}
    if form.get("type") == "custom":
        raise UserError("the dataset has a transform, which is not applied here: apply it with dataset.map first")


def _lines(dataset: Any, settings: Settings) -> Iterator[bytes]:
    """The fields that are asked for as lines of JSON."""
    wanted = replace(settings.reading.wanted, options=())
    try:
        for record in _records(dataset, wanted) if dataset.features is None else _typed(dataset, wanted):
            yield json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UserError:
        raise
    except Exception as error:  # of the library, and of what its rows are made by
        what = str(error).strip() or type(error).__name__
        raise UserError(f"the dataset cannot be read: {what}") from error


def _typed(dataset: Any, wanted: Wanted) -> Iterator[Mapping[str, Any]]:
    """Of a dataset that knows the types of its columns: Arrow tables, since examples would have their images and audio
    decoded."""
    for table in dataset.with_format("arrow").iter(batch_size=_ROWS):
        columns_of(table.schema, wanted, "the dataset")
        yield from table.select([name for name in table.column_names if _asked(name, wanted)]).to_pylist()


def _records(dataset: Any, wanted: Wanted) -> Iterator[Mapping[str, Any]]:
    """Of a stream without types. Its first row must have the columns; later rows without are broken records."""
    for number, row in enumerate(dataset):
        for field in wanted.fields if number == 0 else ():
            value = find_field(row, field)
            if value is MISSING:
                raise UserError(f"the dataset: no column '{field}'; its columns are: {', '.join(map(str, row))}")
            if wanted.types == "text" and not isinstance(value, str | None):
                raise UserError(f"the dataset: column '{field}' is not text but {type(value).__name__}")
        yield {name: value for name, value in row.items() if _asked(name, wanted)}


def _asked(column: str, wanted: Wanted) -> bool:
    return any(f"{field}.".startswith(f"{column}.") for field in wanted.fields)


def stream_of(lines: Iterator[bytes]) -> io.BufferedReader:
    """Lines of JSON as the stream that a preparation of standard input reads."""
    return io.BufferedReader(_Lines(lines), 1 << 20)


class _Lines(io.RawIOBase):
    """Lines as a stream of bytes."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        super().__init__()
        self._lines, self._left = lines, memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the next line goes; 0 at the end."""
        while not len(self._left):
            line = next(self._lines, None)
            if line is None:
                return 0
            self._left = memoryview(line)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
