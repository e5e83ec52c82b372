"""Texts out of CSV and TSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO

from data_pipeline.errors import UserError
from data_pipeline.sources import streams
from data_pipeline.sources.lines import Found
from data_pipeline.sources.pieces import Piece
from data_pipeline.sources.reading import Bad, Reading, printable

_MAX_FIELD = 1 << 28  # characters; a quote that is never closed would otherwise take in the rest of the file


def read_csv(stream: BinaryIO, piece: Piece, reading: Reading, hasher: streams.Hasher) -> Iterator[Found]:
    """The records of a CSV or TSV file with a header (RFC 4180: quoted fields may hold line ends and doubled quotes).

    Raises :class:`UserError` if the header lacks a column. ``record`` is the line where a record begins.
    """
    csv.field_size_limit(_MAX_FIELD)  # of the whole process, 131,072 otherwise
    # Bytes that are not UTF-8 become surrogates, which UTF-8 itself never gives, and are looked for in the fields
    # that are read.
    lines = (
        (line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line).decode(errors="surrogateescape") + "\n"
        for offset, line in streams.piece_lines(stream, piece, hasher)
    )
    rows = csv.reader(lines, delimiter="\t" if piece.format == "tsv" else ",", strict=True)
    header: list[str] | None = None
    places: dict[str, int] = {}
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            if header is None:
                raise UserError(f"{piece.location}, line {number}: the header is not CSV: {error}") from None
            yield Found(Bad("not CSV", f"not a CSV record: {error}", ""), number)
            continue
        if row is None:
            return
        if not row:  # a line without anything
            continue
        if header is None:
            header = row
            places = _places(header, reading, piece.location)
        elif len(row) != len(header):
            detail = f"{len(row)} fields where the header has {len(header)}"
            yield Found(Bad("wrong width", detail, printable(",".join(row))), number)
        else:
            yield Found(_text(row, places, reading), number)


def _places(header: list[str], reading: Reading, location: str) -> dict[str, int]:
    for field in reading.fields:
        if header.count(field) != 1:
            columns = ", ".join(map(printable, header))
            what = "no column" if field not in header else "more than one column"
            raise UserError(f"{location}: {what} '{field}'; its columns are: {columns} (choose with --text-field)")
    return {field: header.index(field) for field in reading.fields}


def _text(row: list[str], places: dict[str, int], reading: Reading) -> str | Bad | None:
    record = {field: row[place] for field, place in places.items()}
    for field, value in record.items():
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                return Bad("not UTF-8", f"column '{field}' is not UTF-8", printable(value))
    return reading.text_of(record)
