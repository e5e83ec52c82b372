"""The one reader of records in files: all that is prepared, trained on, labelled, searched for or used as a prompt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from data_pipeline.errors import UserError
from data_pipeline.sources.format import Chunk, Found, Source, by_name, of_path, supported
from data_pipeline.sources.inputs import UNSEEKABLE, find_files
from data_pipeline.sources.pieces import Piece, require_zstandard
from data_pipeline.sources.reading import MISSING, Bad, Quotes, TextUnit, Wanted, find_field
from data_pipeline.sources.streams import opened, piece_digest


class Record(NamedTuple):
    """The fields that were asked for, and the place for messages, such as "line 3"."""

    fields: Mapping[str, Any]
    place: str


def read_found(piece: Piece, wanted: Wanted, on_digest: Callable[[str | None], None]) -> Iterator[Found]:
    """What stands in a piece of a file, broken records among it, in bounded memory.

    At the end ``on_digest`` is given the XXH3-128 (hex) of the piece's bytes on disk. Raises :class:`UserError` naming
    the file for what is more than a broken record: a file that cannot be read, that is gone or has changed since it
    was planned, damaged compression, a missing column.
    """
    form = by_name(piece.format, piece.location)
    if form.opens == "path":
        # First, and not when the records are done: the format then finds the piece in the page cache.
        digest = piece_digest(piece)
        yield from form.read(Source(piece), wanted)
        on_digest(digest)
        return
    hasher = xxhash.xxh3_128()
    with opened(piece) as stream:
        yield from form.read(Source(piece, stream, hasher), wanted)
    on_digest(hasher.hexdigest())


def read_chunks(
    piece: Piece, wanted: Wanted, target_bytes: int, on_digest: Callable[[str | None], None]
) -> Iterator[Chunk]:
    """A piece as runs of whole records of about ``target_bytes``; see :meth:`Format.chunks`.

    ``on_digest`` and errors as in :func:`read_found`, but for what is wrong with single records.
    """
    form = by_name(piece.format, piece.location)
    if form.opens == "path":
        digest = piece_digest(piece)
        yield from form.chunks(Source(piece), wanted, target_bytes)
        on_digest(digest)
        return
    hasher = xxhash.xxh3_128()
    with opened(piece) as stream:
        yield from form.chunks(Source(piece, stream, hasher), wanted, target_bytes)
    on_digest(hasher.hexdigest())


def read_records(
    path: str | Path,
    fields: tuple[str, ...],
    options: tuple[str, ...] = (),
    *,
    quotes: Quotes = "auto",
    text_unit: TextUnit = "file",
) -> Iterator[Record]:
    """Every record of one file, in order, with the named fields, whose values may be of any type.

    A dotted name is a field inside fields, where there is none of the literal name. Plain text gives records of one
    field, the first that is named. ``options`` names for each field the option that chooses it, for messages.

    Raises :class:`UserError` naming file and place at the first record that is broken or lacks a field, and for a file
    that does not exist, cannot be read or is of an unknown kind.
    """
    chosen = dict(zip(fields, options or ("",) * len(fields), strict=True))  # a field may be asked for twice
    wanted = Wanted(tuple(chosen), tuple(chosen.values()), "any", quotes)
    for piece in _whole(Path(path), wanted, text_unit):
        unit = by_name(piece.format, piece.location).unit
        for number, found in enumerate(read_found(piece, wanted, lambda digest: None), 1):
            place = f"{unit} {number if found.record is None else found.record}"
            if isinstance(found.value, Bad):
                raise UserError(f"{path}, {place}: {found.value.detail}; mend the record or leave it out")
            record = found.value if isinstance(found.value, Mapping) else {fields[0]: found.value}
            yield Record(_chosen(record, wanted, f"{path}, {place}"), place)


def _chosen(record: Mapping[str, Any], wanted: Wanted, where: str) -> dict[str, Any]:
    chosen = {field: find_field(record, field) for field in wanted.fields}
    for field, value in chosen.items():
        if value is MISSING:
            have = ", ".join(map(str, record)) or "none"
            raise UserError(f"{where}: no field '{field}'; its fields are: {have}{wanted.choose(field)}")
    return chosen


def _whole(path: Path, wanted: Wanted, text_unit: TextUnit) -> list[Piece]:
    """The pieces of one file, as large as its format lets them be."""
    if not path.is_file():
        if path.is_dir():
            raise UserError(f"{path} is a folder, a file is expected")
        raise UserError(f"{path} is {UNSEEKABLE}" if path.exists() else f"{path} does not exist")
    known = of_path(path, text_unit)
    if known is None:
        raise UserError(f"{path}: files of this kind are not read; supported are {supported()}")
    form, codec = known
    if codec == "zst":
        require_zstandard()
    [file] = find_files([path])
    return form.pieces(file, codec, sys.maxsize, wanted)
