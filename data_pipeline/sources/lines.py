"""Texts out of JSONL and plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from data_pipeline.errors import UserError
from data_pipeline.sources import streams
from data_pipeline.sources.pieces import Piece
from data_pipeline.sources.reading import EXCERPT, Bad, Reading

_BOM = b"\xef\xbb\xbf"


class Found(NamedTuple):
    """What a reader found in a record: text, null or a fault; and where."""

    text: str | Bad | None
    record: int | None  # line or row from 1; None in a piece that begins in the middle of a file
    offset: int | None = None  # byte at which its line begins, where that is a place on disk


def read_jsonl(stream: BinaryIO, piece: Piece, reading: Reading, hasher: streams.Hasher) -> Iterator[Found]:
    """The records of a JSONL piece; lines without anything are none."""
    return _read_lines(stream, piece, hasher, lambda line: _json_text(line, reading), skip_blank=True)


def read_text_lines(stream: BinaryIO, piece: Piece, hasher: streams.Hasher) -> Iterator[Found]:
    """The lines of a text piece, without line ends."""
    return _read_lines(stream, piece, hasher, _line_text, skip_blank=False)


def read_text(stream: BinaryIO, piece: Piece, hasher: streams.Hasher) -> Iterator[Found]:
    """The one document of a text file, line ends made ``\\n``. Raises :class:`UserError` above 1 GiB."""
    parts: list[bytes] = []
    size = 0
    for block in streams.plain_blocks(stream, piece, hasher):
        parts.append(block)
        size += len(block)
        if size > streams.MAX_LINE:
            raise UserError(
                f"{piece.location}: more than {streams.MAX_LINE:,} bytes in one document; choose lines as the unit of "
                "plain text, or cut the file"
            )
    data = b"".join(parts).removeprefix(_BOM)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        line = data[start : start + 4 * EXCERPT].partition(b"\n")[0]
        yield Found(_not_utf8(line, error.reason, error.start - start), data.count(b"\n", 0, error.start) + 1)
        return
    yield Found(text.replace("\r\n", "\n").replace("\r", "\n"), 1)


def _read_lines(
    stream: BinaryIO, piece: Piece, hasher: streams.Hasher, parse: Callable[[bytes], str | Bad | None], skip_blank: bool
) -> Iterator[Found]:
    number = 0
    for offset, line in streams.piece_lines(stream, piece, hasher):
        number += 1
        if offset == 0:
            line = line.removeprefix(_BOM)
        if skip_blank and (not line or line.isspace()):
            continue
        yield Found(parse(line), None if piece.begin else number, None if piece.codec else offset)


def _line_text(line: bytes) -> str | Bad:
    try:
        return line.removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        return _not_utf8(line, error.reason, error.start)


def _json_text(line: bytes, reading: Reading) -> str | Bad | None:
    try:
        # Decoded here because json.loads guesses the encoding of bytes and lets broken UTF-8 through.
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _not_utf8(line, error.reason, error.start)
    except (ValueError, RecursionError) as error:
        what = f"{error.msg} (character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else str(error)
        return Bad("not JSON", f"not a JSON record: {what}; one JSON object on each line is expected", _excerpt(line))
    if not isinstance(record, dict):
        detail = f"a record must be a JSON object with fields, one on each line, not {type(record).__name__}"
        return Bad("not an object", detail, _excerpt(line))
    text = reading.text_of(record)
    return text._replace(excerpt=_excerpt(line)) if isinstance(text, Bad) else text


def _not_utf8(line: bytes, reason: str, start: int) -> Bad:
    return Bad("not UTF-8", f"not UTF-8 ({reason}, byte {start + 1} of the line)", _excerpt(line))


def _excerpt(line: bytes) -> str:
    return line[: 4 * EXCERPT].decode(errors="replace")[:EXCERPT]
