"""The corpus: input files or a dataset of the hub, and its cut into pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import UserError
from data_pipeline.sources.hub import HubDataset, resolve_dataset
from data_pipeline.sources.inputs import CorpusFile, find_files
from data_pipeline.sources.parquet import parquet_pieces
from data_pipeline.sources.pieces import TEXT_PER_COMPRESSED_BYTE, Piece, cuts, require_zstandard
from data_pipeline.sources.reading import Reading

_READING = Reading()
_FOOTERS = 16  # Parquet footers read at a time: on a network file system it is all waiting


class Corpus(Protocol):
    """Where text comes from."""

    @property
    def files(self) -> tuple[CorpusFile, ...]:
        """The input files in order; none for a hub dataset."""
        ...

    def pieces(self, target_bytes: int, reading: Reading = _READING) -> list[Piece]:
        """The corpus cut into pieces of about ``target_bytes`` of text, in order.

        Depends on sizes and metadata (Parquet footers, a dataset's number of shards) only, never on contents, and
        not on where the corpus lies. Only files that can be entered in the middle are cut: JSONL and text by lines,
        not compressed, and Parquet at its row groups. Raises :class:`UserError` for what cannot be read.
        """
        ...

    def describe(self) -> str:
        """A few words for messages."""
        ...


@dataclass(frozen=True)
class FileCorpus:
    """Files on disk."""

    files: tuple[CorpusFile, ...]

    def pieces(self, target_bytes: int, reading: Reading = _READING) -> list[Piece]:
        """See :class:`Corpus`."""
        _check_target(target_bytes)
        # The executor's map keeps the order of the files.
        with ThreadPoolExecutor(_FOOTERS) as pool:
            parquet = [file for file in self.files if file.kind == "parquet"]
            footers = pool.map(lambda file: parquet_pieces(file, target_bytes, reading), parquet)
            return [
                piece
                for file in self.files
                for piece in (next(footers) if file.kind == "parquet" else _file_pieces(file, target_bytes, reading))
            ]

    def describe(self) -> str:
        """See :class:`Corpus`."""
        first, more = self.files[0].path, len(self.files) - 1
        return f"{first}" + (f" and {more:,} more file(s)" if more else "")


@dataclass(frozen=True)
class HubCorpus:
    """A dataset of the hub, or a folder laid out like one."""

    dataset: HubDataset

    @property
    def files(self) -> tuple[CorpusFile, ...]:
        """None: the dataset knows its own."""
        return ()

    def pieces(self, target_bytes: int, reading: Reading = _READING) -> list[Piece]:
        """See :class:`Corpus`."""
        _check_target(target_bytes)
        return self.dataset.pieces(target_bytes)

    def describe(self) -> str:
        """See :class:`Corpus`."""
        return f"dataset {self.dataset.name}"


def open_corpus(inputs: Sequence[str | Path]) -> FileCorpus:
    """The corpus of files, folders and globs. Raises :class:`UserError` as :func:`expand_inputs` does, and for .zst
    files where the zstandard package is missing."""
    files = find_files(inputs)
    if any(file.kind.endswith(".zst") for file in files):
        require_zstandard()
    return FileCorpus(files)


def open_dataset(
    dataset: str, config: str | None = None, split: str = "train", revision: str | None = None
) -> HubCorpus:
    """A dataset by its hub id, or by the path of a folder laid out like one, streamed.

    The revision is resolved to a commit at once, so that pieces read days later are of the same dataset. Raises
    :class:`UserError` if the dataset cannot be reached or has no such config, split or revision.
    """
    return HubCorpus(resolve_dataset(dataset, config, split, revision))


def _file_pieces(file: CorpusFile, target_bytes: int, reading: Reading) -> Iterator[Piece]:
    kind, dot, codec = file.kind.partition(".")
    if kind == "text" and reading.text_unit == "line":
        kind = "lines"
    whole = bool(codec) or kind not in ("jsonl", "lines")
    for begin, end in cuts(file.bytes, max(file.bytes, 1) if whole else target_bytes):
        size = (end - begin) * (TEXT_PER_COMPRESSED_BYTE if codec else 1)
        yield Piece(file.name, str(file.path), kind + dot + codec, begin, end, None, size, file.bytes)


def _check_target(target_bytes: int) -> None:
    if target_bytes < 1:
        raise UserError(f"pieces must have at least one byte, got {target_bytes}")
