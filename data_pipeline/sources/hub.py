"""Texts out of datasets of the Hugging Face hub, streamed by the dataset's own shards."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.errors import UserError
from data_pipeline.sources.format import Found
from data_pipeline.sources.formats.parquet import columns_of
from data_pipeline.sources.pieces import Piece
from data_pipeline.sources.reading import Reading

_ROWS = 100  # handed over at a time


@dataclass(frozen=True)
class HubDataset:
    """A dataset, pinned: ``dataset`` is an id, or a folder laid out like a dataset."""

    dataset: str
    config: str | None
    split: str
    revision: str | None  # the commit; None for a folder
    contents: str | None = None  # of a folder: XXH3-128 (hex) of its files

    @property
    def name(self) -> str:
        """The same wherever a folder lies; another for another commit, or other files in the folder."""
        base = Path(self.dataset).name if Path(self.dataset).is_absolute() else self.dataset
        version = self.revision or self.contents
        if version:
            base += f"@{version[:12]}"
        return "/".join(part for part in (base, self.config, self.split) if part)

    def pieces(self, target_bytes: int) -> list[Piece]:
        """Runs of the dataset's shards, by the size of the split where the dataset's card gives it, else one by one."""
        with _named(self):
            stream = _load(self)
            shards = stream.num_shards
            splits = stream.info.splits or {}
            size = splits[self.split].num_bytes if self.split in splits else None
        each = max(1, size // shards) if size else target_bytes
        step = max(1, target_bytes // each)
        digits = len(str(shards))
        location = json.dumps(asdict(self), sort_keys=True)
        return [
            Piece(
                name=f"{self.name}/{begin:0{digits}d}-of-{shards}",
                location=location,
                kind="hub",
                begin=begin,
                end=min(begin + step, shards),
                rows=None,
                size=each * (min(begin + step, shards) - begin),
                total=shards,
            )
            for begin in range(0, shards, step)
        ]


def resolve_dataset(dataset: str, config: str | None, split: str, revision: str | None) -> HubDataset:
    """Make a folder's path absolute and hash its files, or pin an id to the commit that ``revision`` (the main branch)
    stands for now."""
    if os.path.isdir(dataset):
        if revision is not None:
            raise UserError(f"{dataset} is a folder, which has no revision '{revision}'")
        if "::" in dataset:
            raise UserError(f"{dataset}: a path with '::' means something else to the datasets library; rename it")
        return HubDataset(os.path.abspath(dataset), config, split, None, _contents(Path(dataset)))
    asked = HubDataset(dataset, config, split, revision)
    with _named(asked):
        import huggingface_hub

        commit = huggingface_hub.HfApi().dataset_info(dataset, revision=revision).sha
    return HubDataset(dataset, config, split, commit)


def _contents(folder: Path) -> str:
    """XXH3-128 (hex) of names and contents: the library keeps no list of the files it will read."""
    whole = xxhash.xxh3_128()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest = xxhash.xxh3_128()
        try:
            with open(path, "rb") as f:
                while data := f.read(1 << 20):
                    digest.update(data)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        whole.update(json.dumps([path.relative_to(folder).as_posix(), digest.hexdigest()]).encode())
    return whole.hexdigest()


def read_hub(piece: Piece, reading: Reading) -> Iterator[Found]:
    """The records of a run of shards; ``record`` is the row in the run.

    Raises :class:`UserError` if the dataset lacks a column, if a column is not text, and for whatever the datasets
    library stumbles over.
    """
    dataset = HubDataset(**json.loads(piece.location))
    row = 0
    with _named(dataset):
        stream = _load(dataset)
        if piece.total not in (-1, stream.num_shards):
            raise UserError(
                f"dataset {dataset.name} has changed since it was planned: it has {stream.num_shards} shards, not "
                f"{piece.total}"
            )
        for index in range(piece.begin, piece.end):
            # Arrow batches, not examples: those would have their images and audio decoded.
            for table in stream.shard(stream.num_shards, index).with_format("arrow").iter(batch_size=_ROWS):
                columns_of(table.schema, reading.wanted, f"dataset {dataset.name}")
                tops = [name for name in table.column_names if _needed(name, reading)]
                for record in table.select(tops).to_pylist():
                    row += 1
                    yield Found(record, row)


def read_rows(dataset: HubDataset, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The named columns of every row, in order: values as they are stored, numbers of a class label as its names and
    -1, which stands for a label that is kept secret, as None.

    Raises :class:`UserError` for a missing column and for whatever the datasets library stumbles over.
    """
    with _named(dataset):
        stream = _load(dataset)
        features = stream.features or stream.info.features or {}
        for table in stream.with_format("arrow").iter(batch_size=_ROWS):
            for column in columns:
                if column not in table.column_names:
                    have = ", ".join(table.column_names)
                    raise UserError(f"dataset {dataset.name}: no column '{column}'; its columns are: {have}")
            names = {c: features[c].names for c in columns if hasattr(features.get(c), "names")}
            for row in table.select(list(dict.fromkeys(columns))).to_pylist():
                for column, words in names.items():
                    number = row[column]
                    row[column] = None if number is None or number < 0 else words[number]
                yield row


def _needed(column: str, reading: Reading) -> bool:
    return any(field == column or field.startswith(column + ".") for field in reading.fields)


@contextmanager
def _named(dataset: HubDataset) -> Iterator[None]:
    """Whatever the datasets library raises, which has no base class, as :class:`UserError` naming the dataset."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        at = f" at revision {dataset.revision}" if dataset.revision else ""
        what = str(error).strip() or type(error).__name__
        raise UserError(f"dataset {dataset.name}{at} cannot be read: {what}") from error


def _load(dataset: HubDataset) -> Any:
    return _datasets().load_dataset(
        dataset.dataset,
        name=dataset.config,
        split=dataset.split,
        revision=dataset.revision,
        streaming=True,
        cache_dir=_scratch().name,
    )


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
