"""A piece of an input: what one process reads on its own."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass

from data_pipeline.errors import UserError

CODECS = ("gz", "zst")  # compressions, by the suffix of their files without its dot

# gzip -6 and zstd -3 alike make English books 2.7 times smaller and Python source 4.1 times.
TEXT_PER_COMPRESSED_BYTE = 3


@dataclass(frozen=True)
class Excerpt:
    """A run of whole records, copied out of a piece that cannot be entered in the middle while that was read.

    ``path``: the copy, decompressed; "" where nobody will read it. ``before``: lines or rows of the file before its
    own. ``header``: lines at the beginning of the copy that are those of the file's beginning.
    """

    path: str
    before: int
    header: int = 0


@dataclass(frozen=True)
class Piece:
    """A part of an input that is read independently of the others; the pieces of a file tile it.

    ``kind`` is the name of a format (see :mod:`data_pipeline.sources.format`), perhaps with .gz or .zst at the end, or
    hub. ``begin`` and ``end`` are bytes of the file on disk, for hub datasets shards. A line belongs to the piece that
    holds its first byte.
    """

    name: str  # of the input, relative to the corpus: the same wherever it lies
    location: str  # path; for hub datasets their specification as JSON
    kind: str
    begin: int
    end: int
    rows: tuple[int, int] | None  # row groups [a, b) of a Parquet file
    size: int  # about how many bytes of text, for grouping pieces into units of work
    total: int = -1  # bytes (hub: shards) of the whole input when it was planned; -1: not known, nothing to check
    excerpt: Excerpt | None = None  # what is read in place of the file; ``begin`` and ``end`` are then bytes of it

    @property
    def path(self) -> str:
        """The file that is opened; ``location`` is the one that messages name."""
        return self.excerpt.path if self.excerpt else self.location

    @property
    def format(self) -> str:
        """The kind without compression."""
        return self.kind.partition(".")[0]

    @property
    def codec(self) -> str:
        """gz, zst, or nothing."""
        return self.kind.partition(".")[2]


def cuts(total: int, target_bytes: int) -> list[tuple[int, int]]:
    """Ranges of about ``target_bytes`` that tile ``[0, total)``; one empty range if ``total`` is 0."""
    count = max(1, -(-total // target_bytes))
    edges = [total * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def require_zstandard() -> None:
    """Raise :class:`UserError` if .zst files cannot be read here."""
    if importlib.util.find_spec("zstandard") is None:
        raise UserError("reading .zst needs the zstandard package: pip install 'nystrom-pretrain[zstd]'")
