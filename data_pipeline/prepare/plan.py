"""What decides the bytes of a shard folder: the settings, the tokenizer, and the inputs cut into units of work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from data_pipeline.quality.duplicates import Dedup
from data_pipeline.quality.filters import Filters
from data_pipeline.shards.manifest import FORMAT_VERSION
from data_pipeline.sources.corpus import Corpus, open_corpus
from data_pipeline.sources.format import by_name, can_divide, stream_formats, text_is_hidden
from data_pipeline.sources.inputs import CorpusFile
from data_pipeline.sources.pieces import Piece
from data_pipeline.sources.reading import Reading
from data_pipeline.sources.streams import stdin_chunks
from data_pipeline.tokenization.tokenizer import Tokenizer

DEFAULT_SHARD_TOKENS = 1 << 27  # 256 MB as uint16
MIB = 1 << 20
STDIN = "<stdin>"
STDIN_UNIT_BYTES = 16 * MIB
"""Text of a unit of standard input, whose length is not known beforehand."""


@dataclass(frozen=True)
class Settings:
    """How text becomes shards. Every field decides bytes; what does not (processes, backends) is not here."""

    reading: Reading = field(default_factory=Reading)
    filters: Filters = field(default_factory=lambda: Filters.parse([]))
    dedup: Dedup | None = None
    shard_tokens: int = DEFAULT_SHARD_TOKENS

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise UserError(f"shard_tokens must be positive, got {self.shard_tokens}")

    def facts(self) -> dict[str, Any]:
        """The settings as JSON values, as the manifest keeps them."""
        return {
            "reading": self.reading.facts(),
            "filters": list(self.filters.specs),
            "dedup": self.dedup.spec if self.dedup else None,
            "shard_tokens": self.shard_tokens,
        }


@dataclass(frozen=True)
class Unit:
    """Pieces of the inputs that are tokenized together, by one process, into shards of their own."""

    number: int
    pieces: tuple[Piece, ...]
    identity: str
    """SHA-256 (hex) of what tells this unit's text from another's without reading it: names, places, sizes and times
    of its files; for standard input its contents."""
    lines_before: int = 0
    """Lines of standard input before this unit's."""
    divide: int = 0
    """Bytes of text in a part, of a unit that is divided while it is read (:mod:`data_pipeline.prepare.divide`)."""
    part: int | None = None
    """Number of this part of a divided unit."""

    @property
    def label(self) -> str:
        """Unit and part as the names of files have them."""
        return f"{self.number:05d}" if self.part is None else f"{self.number:05d}-{self.part:05d}"

    @property
    def place(self) -> tuple[int, int]:
        """By which units and parts are in the order of the inputs."""
        return self.number, self.part or 0

    @property
    def about_parts(self) -> int:
        """How many parts there will be, as far as sizes tell."""
        return max(1, -(-self.pieces[0].size // self.divide)) if self.divide else 1


@dataclass(frozen=True)
class Preparation:
    """A folder of shards to be made. Without units the text is standard input, in the form ``stdin``."""

    units: tuple[Unit, ...]
    files: tuple[CorpusFile, ...]
    description: str
    tokenizer: Tokenizer
    settings: Settings
    stdin: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs in order."""
        return tuple(dict.fromkeys(piece.name for unit in self.units for piece in unit.pieces)) or (STDIN,)

    @property
    def purpose(self) -> str:
        """SHA-256 (hex) of settings, tokenizer and the inputs' names: an unfinished run may be continued by its equals,
        also after a broken input was mended."""
        return json_sha256(self.decisions(), self.names)

    @property
    def text_bytes(self) -> int | None:
        """About how much text there is; None if compression or a hub hides it."""
        if self.stdin or any(text_is_hidden(piece) for unit in self.units for piece in unit.pieces):
            return None
        return sum(piece.size for unit in self.units for piece in unit.pieces)

    def decisions(self) -> dict[str, Any]:
        """All that decides bytes besides the inputs."""
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer": self.tokenizer.hash,
            "stdin": self.stdin,
            **self.facts(),
        }

    def facts(self) -> dict[str, Any]:
        """The settings as JSON values, and the versions of the inputs' formats that read their files otherwise than
        the first: shards of such files are never taken for those of an earlier reading."""
        names = {piece.format for unit in self.units for piece in unit.pieces} - {"hub"}
        names |= {self.stdin} if self.stdin else set()
        later = {name: version for name in sorted(names) if (version := by_name(name, name).version) > 1}
        return {**self.settings.facts(), **({"format_versions": later} if later else {})}


def plan_preparation(
    corpus: Corpus | Sequence[str | Path], tokenizer: Tokenizer, settings: Settings | None = None
) -> Preparation:
    """Cut the inputs into units, by sizes alone: nothing is read but the footers of Parquet files.

    ``corpus`` may also be a list of files, folders and globs.
    """
    settings = settings or Settings()
    if isinstance(corpus, Sequence):
        corpus = open_corpus(corpus)
    units = plan_units(corpus, settings.reading)
    return Preparation(units, corpus.files, corpus.describe(), tokenizer, settings)


def plan_units(corpus: Corpus, reading: Reading) -> tuple[Unit, ...]:
    """The units of :func:`plan_preparation`, for which no tokenizer is needed."""
    target = unit_bytes(sum(file.bytes for file in corpus.files))
    times = {file.name: file.mtime_ns for file in corpus.files}
    return tuple(group_pieces(corpus.pieces(target, reading), target, times))


def plan_stdin(form: str, tokenizer: Tokenizer, settings: Settings | None = None) -> Preparation:
    """The text is standard input in a format that is cut at lines: ``lines`` (each a document), ``jsonl``.

    Raises :class:`UserError` for another.
    """
    if form not in stream_formats():
        raise UserError(f"standard input cannot come as '{form}': choose one of {', '.join(stream_formats())}")
    return Preparation((), (), "standard input", tokenizer, settings or Settings(), form)


def stdin_units(stream: BinaryIO, kind: str, work: Path) -> Iterator[Unit]:
    """Standard input as units of about :data:`STDIN_UNIT_BYTES`, their text in files in ``work``. ``kind``: the format.

    A restarted run must be given the same stream from its beginning; units that are finished are then recognised by a
    hash of their text.
    """
    lines = 0
    for number, chunk in enumerate(stdin_chunks(stream, STDIN_UNIT_BYTES)):
        path = work / f"stdin-{number:05d}"
        write_atomic(path, chunk)
        piece = Piece(STDIN, str(path), kind, 0, len(chunk), None, len(chunk))
        identity = json_sha256(STDIN, kind, number, xxhash.xxh3_128_hexdigest(chunk))
        yield Unit(number, (piece,), identity, lines_before=lines)
        lines += chunk.count(b"\n")


def unit_bytes(size: int) -> int:
    """Text in a unit of work for inputs of ``size`` bytes: what a crash costs each process at most.

    Small corpora are cut finely so that all processes have something to do, huge ones so that there are not many more
    than 4,096 shards.
    """
    return max(4 * MIB, min(64 * MIB, size // 64), size // 4096)


def part_bytes(target: int) -> int:
    """Text in a part of a divided unit, where units hold ``target`` bytes.

    A crash costs each process its part. Parts of 16 MiB keep that at 64 MiB for four processes. Only inputs above 256
    GiB have larger ones, so that there are not many more than 16,384 shards.
    """
    return min(target, max(16 * MIB, target // 4))


def group_pieces(pieces: Iterable[Piece], target: int, times: dict[str, int]) -> Iterator[Unit]:
    """Neighbouring pieces, together at most ``target`` bytes unless a single one is larger, which is then divided
    while it is read if its format can do that."""
    held: list[Piece] = []
    number = size = 0
    for piece in pieces:
        if held and size + piece.size > target:
            yield _unit(number, held, target, times)
            number, held, size = number + 1, [], 0
        held.append(piece)
        size += piece.size
    if held:
        yield _unit(number, held, target, times)


def _unit(number: int, pieces: Sequence[Piece], target: int, times: dict[str, int]) -> Unit:
    places = [[p.name, p.kind, p.begin, p.end, p.rows, times.get(p.name)] for p in pieces]
    divide = part_bytes(target) if len(pieces) == 1 and pieces[0].size > target and can_divide(pieces[0]) else 0
    return Unit(number, tuple(pieces), json_sha256(number, places), divide=divide)


def json_sha256(*facts: object) -> str:
    """SHA-256 (hex) of JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
