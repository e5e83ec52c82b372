"""A unit that is one file, too large and not to be entered in the middle: one process reads, all tokenize.

The reader copies runs of whole records into files of the work folder and hands them out as *parts* of the unit, each
with shards and a record of its own. The edges depend on the input and the plan alone, so the bytes do not depend on
processes or restarts. A part is copied only if it is not finished, and its copy goes when it is.

Why copies and not places to enter: reading costs little beside tokenizing. Of 120 MB of Python source the reader took
317 MB from .jsonl.gz in a second of processor time, 231 from Parquet and 55 from CSV, all of whose records have quotes.
An encoder takes 2 to 15. Letting each process decompress up to its own part would be quadratic in the size of the file.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.files import TMP_SUFFIX, write_atomic
from data_pipeline.prepare.plan import Unit, json_sha256
from data_pipeline.sources.format import by_name
from data_pipeline.sources.pieces import Excerpt
from data_pipeline.sources.reading import Wanted
from data_pipeline.sources.records import read_chunks


@dataclass(frozen=True)
class Division:
    """What is known of a divided unit once it was read to its end."""

    parts: int
    digest: str  # XXH3-128 (hex) of the piece's bytes on disk


@dataclass(frozen=True)
class Divider:
    """Divides units. ``name`` begins the names of copies: no other process that runs at the same time has it."""

    work: Path
    wanted: Wanted
    name: str

    def known(self, unit: Unit) -> Division | None:
        """The division of a unit, if some process has read it to its end."""
        try:
            data = json.loads(self._file(unit).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return Division(data["parts"], data["digest"]) if data["key"] == _key(unit) else None

    def all_parts(self, unit: Unit) -> list[Unit] | None:
        """The parts of a unit, without copies; the unit itself where it is not divided; None if it was not read."""
        if not unit.divide:
            return [unit]
        known = self.known(unit)
        return None if known is None else [_part(unit, number) for number in range(known.parts)]

    def parts(self, unit: Unit, mine: Callable[[Unit], bool], finished: Callable[[Unit], bool]) -> Iterator[Unit]:
        """The parts of a unit that are ``mine``, in order, those that are not ``finished`` with their copies."""
        parts = self.all_parts(unit)
        if parts is not None and all(map(finished, filter(mine, parts))):
            yield from filter(mine, parts)
            return
        [piece] = unit.pieces
        digests: list[str | None] = []
        number = -1
        for number, chunk in enumerate(read_chunks(piece, self.wanted, unit.divide, digests.append)):
            part = _part(unit, number)
            if not mine(part):
                continue
            if not finished(part):
                path = self.work / f"{self.name}-{part.label}.{secrets.token_hex(4)}{TMP_SUFFIX}"
                _write(path, chunk.data)
                size = len(chunk.data)
                copy = replace(
                    part.pieces[0],
                    begin=0,
                    end=size,
                    size=size,
                    total=size,
                    excerpt=Excerpt(str(path), chunk.before, chunk.header),
                )
                part = replace(part, pieces=(copy,))
            yield part
        data = {"key": _key(unit), "parts": number + 1, "digest": digests[0]}
        write_atomic(self._file(unit), json.dumps(data).encode(), shared=True)

    def _file(self, unit: Unit) -> Path:
        return self.work / f"division-{unit.label}.json"


def _write(path: Path, data: bytes) -> None:
    """Without fsync: the next start makes its own copies."""
    try:
        path.write_bytes(data)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def remove_copy(unit: Unit) -> None:
    """The copy of a finished part goes, if there is one."""
    for piece in unit.pieces:
        if piece.excerpt and piece.excerpt.path:
            Path(piece.excerpt.path).unlink(missing_ok=True)


def _part(unit: Unit, number: int) -> Unit:
    [piece] = unit.pieces
    piece = replace(piece, kind=piece.format, rows=None, excerpt=Excerpt("", 0))
    return replace(unit, pieces=(piece,), identity=json_sha256(_key(unit), number), part=number, divide=0)


def _key(unit: Unit) -> str:
    [piece] = unit.pieces
    division = by_name(piece.format, piece.location).division
    return json_sha256(unit.identity, unit.divide, *([division] if division > 1 else []))
