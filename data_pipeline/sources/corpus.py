"""The corpus: input files or a dataset of the hub, and its cut into pieces."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import UserError
from data_pipeline.sources.format import Format, of_path
from data_pipeline.sources.hub import HubDataset, resolve_dataset
from data_pipeline.sources.inputs import CorpusFile, find_files
from data_pipeline.sources.pieces import Piece, require_zstandard
from data_pipeline.sources.reading import Reading

_READING = Reading()
_AT_ONCE = 16  # files whose metadata is read at a time: on a network file system it is all waiting


class Corpus(Protocol):
    """Where text comes from."""

    @property
    def files(self) -> tuple[CorpusFile, ...]:
        """The input files in order; none for a hub dataset."""
        ...

    @property
    def passed_over(self) -> tuple[Path, ...]:
        """Files in the folders and patterns of the inputs whose kind is not read."""
        ...

    def pieces(self, target_bytes: int, reading: Reading = _READING) -> list[Piece]:
        """The corpus cut into pieces of about ``target_bytes`` of text, in order.

        Depends on sizes and metadata (Parquet footers, a dataset's number of shards) only, never on contents, and
        not on where the corpus lies. Only files that can be entered in the middle are cut, as their format says.
        Raises :class:`UserError` for what cannot be read.
        """
        ...

    def describe(self) -> str:
        """A few words for messages."""
        ...


@dataclass(frozen=True)
class FileCorpus:
    """Files on disk; ``passed_over`` are those in the folders and patterns whose kind is not read."""

    files: tuple[CorpusFile, ...]
    passed_over: tuple[Path, ...] = ()

    def pieces(self, target_bytes: int, reading: Reading = _READING) -> list[Piece]:
        """See :class:`Corpus`."""
        _check_target(target_bytes)
        known = [_format(file, reading) for file in self.files]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            plans = [
                # A cut of the format's own reads the file's metadata; what goes by size alone is not worth a thread.
                pool.submit(form.pieces, file, codec, target_bytes, reading.wanted).result
                if form.cut == "own"
                else functools.partial(form.pieces, file, codec, target_bytes, reading.wanted)
                for file, (form, codec) in zip(self.files, known, strict=True)
            ]
            return [piece for plan in plans for piece in plan()]

    def describe(self) -> str:
        """See :class:`Corpus`."""
        first, more = self.files[0].path, len(self.files) - 1
        return f"{first}" + (f" and {more:,} more file(s)" if more else "")


@dataclass(frozen=True)
class HubCorpus:
    """A dataset of the hub, or a folder laid out like one; ``also``: further splits of it, which follow."""

    dataset: HubDataset
    also: tuple[HubDataset, ...] = ()

    @property
    def files(self) -> tuple[CorpusFile, ...]:
        """None: the dataset knows its own."""
        return ()

    @property
    def passed_over(self) -> tuple[Path, ...]:
        """None: the dataset knows its own."""
        return ()

    def pieces(self, target_bytes: int, reading: Reading = _READING) -> list[Piece]:
        """See :class:`Corpus`."""
        _check_target(target_bytes)
        return [piece for dataset in (self.dataset, *self.also) for piece in dataset.pieces(target_bytes)]

    def describe(self) -> str:
        """See :class:`Corpus`."""
        return f"dataset {' and '.join(dataset.name for dataset in (self.dataset, *self.also))}"


def open_corpus(inputs: Sequence[str | Path], without: Path | None = None) -> FileCorpus:
    """The corpus of files, folders and globs, which leave out what lies in the folder ``without``.

    Raises :class:`UserError` as :func:`expand_inputs` does, and for .zst files where the zstandard package is missing.
    """
    others: set[Path] = set()
    files = find_files(inputs, without, others.add)
    if any(file.kind.endswith(".zst") for file in files):
        require_zstandard()
    return FileCorpus(files, tuple(sorted(others)))


def open_dataset(
    dataset: str, config: str | None = None, split: str = "train", revision: str | None = None
) -> HubCorpus:
    """A dataset by its hub id, or by the path of a folder laid out like one, streamed; ``split`` may be several with
    plus signs between, as ``train+unsupervised``.

    The revision is resolved to a commit at once, so that pieces read days later are of the same dataset. Raises
    :class:`UserError` if the dataset cannot be reached or has no such config, split or revision.
    """
    names = split.split("+")
    if len(set(names)) < len(names):
        raise UserError(f"--split {split} names a split twice")
    first = resolve_dataset(dataset, config, names[0], revision)
    return HubCorpus(first, tuple(replace(first, split=name) for name in names[1:]))  # all of one commit


def _format(file: CorpusFile, reading: Reading) -> tuple[Format, str]:
    known = of_path(file.path, reading.text_unit)
    assert known is not None  # it was when the file was found
    return known


def _check_target(target_bytes: int) -> None:
    if target_bytes < 1:
        raise UserError(f"pieces must have at least one byte, got {target_bytes}")
