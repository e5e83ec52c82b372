"""CSV (RFC 4180) and TSV (IANA's text/tab-separated-values): a header, and a record for each row."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from data_pipeline.errors import UserError
from data_pipeline.sources import streams
from data_pipeline.sources.format import Chunk, Format, Found, Source, register
from data_pipeline.sources.reading import Bad, Wanted, printable

_MAX_FIELD = 1 << 28  # characters; a quote that is never closed would otherwise take in the rest of the file


class _Row(NamedTuple):
    fields: list[str]
    fault: str | None  # why it is no CSV
    first: int  # lines, from 1
    last: int


class _Delimited(Format):
    """``record`` is the line where a record begins; lines without anything are none.

    With quotes, a field in double quotes may hold delimiters, line ends and doubled quotes. Without, each line is a
    row and a quote is text.
    """

    unit = "line"
    cut = "whole"
    delimiter: ClassVar[str]
    quoted: ClassVar[bool]

    def read(self, source: Source, wanted: Wanted) -> Iterator[Found]:
        """See :class:`Format`. Raises :class:`UserError` for a header without a column that is wanted or with two of
        them, and for a quote that is open at the end of the file."""
        quoted = self._quoted(wanted)
        rows = _quoted_rows(source, self.delimiter) if quoted else _plain_rows(source, self.delimiter)
        header = next(rows, None)
        if header is None:
            return
        if header.fault is not None:
            raise UserError(f"{source.location}, line {header.first}: the header is not CSV: {header.fault}")
        places = _places(header.fields, wanted, source.location, quoted)
        for row in rows:
            if row.fault is not None:
                detail = f"not a CSV record: {row.fault}{_advice(row, len(header.fields), quoted)}"
                yield from _broken(row, Bad("not CSV", detail, ""))
            elif len(row.fields) != len(header.fields):
                detail = f"{len(row.fields)} fields where the header has {len(header.fields)}"
                detail += _advice(row, len(header.fields), quoted)
                yield from _broken(row, Bad("wrong width", detail, printable(self.delimiter.join(row.fields))))
            else:
                yield Found(_record(row.fields, places), row.first)

    def chunks(self, source: Source, wanted: Wanted, target_bytes: int) -> Iterator[Chunk]:
        """See :class:`Format`. Each chunk begins with the header. Raises :class:`UserError` for a quote that is open
        at the end of the file."""
        quoted = self._quoted(wanted)
        header: list[bytes] | None = None
        lines: list[bytes] = []
        size = taken = before = 0
        for record in _raw_records(source, self.delimiter) if quoted else ([raw] for _, raw in source.raw_lines()):
            lines += record
            taken += len(record)
            if header is None:
                if len(record) > 1 or not _is_empty(record[0].removeprefix(streams.BOM), quoted):
                    header, lines, before = lines, [], taken
                continue
            size += sum(map(len, record)) + len(record)
            if size >= target_bytes:
                yield Chunk(_joined(header + lines), before, len(header))
                lines, size, before = [], 0, taken
        if lines or header is None or before == len(header):
            yield Chunk(_joined((header or []) + lines), before, len(header or []))

    def _quoted(self, wanted: Wanted) -> bool:
        return self.quoted if wanted.quotes == "auto" else wanted.quotes == "csv"


@register
class Csv(_Delimited):
    """Quoted unless asked otherwise."""

    name = "csv"
    suffixes = (".csv",)
    delimiter = ","
    quoted = True


@register
class Tsv(_Delimited):
    """Not quoted unless asked otherwise: in most TSV, as in GLUE's, a quote is a character of the text."""

    name = "tsv"
    suffixes = (".tsv",)
    delimiter = "\t"
    quoted = False
    version = 2  # the first read it with the quotes of CSV


def _quoted_rows(source: Source, delimiter: str) -> Iterator[_Row]:
    csv.field_size_limit(_MAX_FIELD)  # of the whole process, 131,072 otherwise
    ended = False

    def lines() -> Iterator[str]:
        nonlocal ended
        for line in _lines(source):
            yield line + "\n"
        ended = True

    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        first = source.line_number(rows.line_num + 1)
        try:
            row = next(rows, None)
        except csv.Error as error:
            last = source.line_number(rows.line_num)
            if ended:
                raise _unclosed(source, first, last) from None
            yield _Row([], str(error), first, last)
            continue
        if row is None:
            return
        if row:
            yield _Row(row, None, first, source.line_number(rows.line_num))


def _unclosed(source: Source, first: int, last: int) -> UserError:
    return UserError(
        f"{source.location}, line {first}: a quote opens in this record and never closes, so the rest of the file "
        f"({last - first + 1:,} lines) would be one field; close it, or say --quotes none if quotes are text in this "
        "file"
    )


def _plain_rows(source: Source, delimiter: str) -> Iterator[_Row]:
    for count, line in enumerate(_lines(source), 1):
        if row := line.removesuffix("\r"):
            number = source.line_number(count)
            yield _Row(row.split(delimiter), None, number, number)


def _lines(source: Source) -> Iterator[str]:
    # Bytes that are not UTF-8 become surrogates, which UTF-8 itself never gives, and are looked for in the fields that
    # are read.
    return (line.decode(errors="surrogateescape") for _, _, line in source.lines())


def _raw_records(source: Source, delimiter: str) -> Iterator[list[bytes]]:
    """The lines, without ``\\n``, of each record with quotes, and each line without anything on its own.

    A line without a quote that begins no quoted field is a record as it stands. The others go through the parser that
    reads the rows, so that both agree also about what is broken.
    """
    csv.field_size_limit(_MAX_FIELD)
    lines = source.raw_lines()
    done = 0
    for offset, raw in lines:
        record = [raw]
        if b'"' in raw:
            ended: list[bool] = []
            text = raw.removeprefix(streams.BOM) if offset == 0 else raw
            try:
                next(csv.reader(_continued(text, lines, record, ended), delimiter=delimiter, strict=True))
            except csv.Error:
                if ended:
                    raise _unclosed(source, done + 1, done + len(record)) from None
        done += len(record)
        yield record


def _continued(
    text: bytes, lines: Iterator[tuple[int, bytes]], record: list[bytes], ended: list[bool]
) -> Iterator[str]:
    """A line for the parser, and those after it as far as it wants them, which are added to ``record``."""
    yield text.decode(errors="surrogateescape") + "\n"
    for _, raw in lines:
        record.append(raw)
        yield raw.decode(errors="surrogateescape") + "\n"
    ended.append(True)


def _is_empty(line: bytes, quoted: bool) -> bool:
    return not (line.strip(b"\r") if quoted else line.removesuffix(b"\r"))


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _places(header: list[str], wanted: Wanted, location: str, quoted: bool) -> dict[str, int]:
    fields = wanted.fields or tuple(header)
    for field in fields:
        if header.count(field) != 1:
            columns = ", ".join(map(printable, header))
            what = "no column" if field not in header else "more than one column"
            more = "; --quotes csv takes the quotes off names and fields" if _quotes(header, quoted) else ""
            raise UserError(f"{location}: {what} '{field}'; its columns are: {columns}{wanted.choose(field)}{more}")
    return {field: header.index(field) for field in fields}


def _broken(row: _Row, bad: Bad) -> Iterator[Found]:
    """A fault for each line of the row: those that a stray quote swallowed were most likely records of their own."""
    yield Found(bad, row.first)
    inside = Bad(bad.reason, f"part of the broken record that begins on line {row.first}", "")
    for line in range(row.first + 1, row.last + 1):
        yield Found(inside, line)


def _advice(row: _Row, width: int, quoted: bool) -> str:
    if quoted and row.last > row.first:
        return f"; its quotes enclose lines {row.first} to {row.last}: is one missing, or text (then --quotes none)?"
    if _quotes(row.fields, quoted):
        return "; quotes are text here, --quotes csv reads them as those of CSV"
    return "; a field that holds a delimiter must be in double quotes" if quoted and len(row.fields) > width else ""


def _quotes(fields: list[str], quoted: bool) -> bool:
    return not quoted and any(field.startswith('"') for field in fields)


def _record(row: list[str], places: dict[str, int]) -> dict[str, str] | Bad:
    record = {field: row[place] for field, place in places.items()}
    for field, value in record.items():
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                return Bad("not UTF-8", f"column '{field}' is not UTF-8", printable(value))
    return record
