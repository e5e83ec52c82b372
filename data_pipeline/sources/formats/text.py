"""Plain text: a file is one document, or each of its lines is."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.errors import UserError
from data_pipeline.sources import streams
from data_pipeline.sources.format import Format, Found, Source, register
from data_pipeline.sources.reading import EXCERPT, Bad, Wanted, not_utf8


@register
class Text(Format):
    """A file is one document, line ends made ``\\n``."""

    name = "text"
    suffixes = (".txt",)
    unit = "line"
    cut = "whole"
    text_unit = "file"
    has_fields = False

    def read(self, source: Source, wanted: Wanted) -> Iterator[Found]:
        """See :class:`Format`. Raises :class:`UserError` above 1 GiB."""
        parts: list[bytes] = []
        size = 0
        for block in source.blocks():
            parts.append(block)
            size += len(block)
            if size > streams.MAX_LINE:
                raise UserError(
                    f"{source.location}: more than {streams.MAX_LINE:,} bytes in one document; choose lines as the "
                    "unit of plain text, or cut the file"
                )
        data = b"".join(parts).removeprefix(streams.BOM)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            start = data.rfind(b"\n", 0, error.start) + 1
            line = data[start : start + 4 * EXCERPT].partition(b"\n")[0]
            broken = not_utf8(line, error.reason, error.start - start)
            yield Found(broken, data.count(b"\n", 0, error.start) + 1)
            return
        yield Found(text.replace("\r\n", "\n").replace("\r", "\n"), 1)


@register
class Lines(Format):
    """Each line is a document, without its line end; those without anything are empty documents."""

    name = "lines"
    suffixes = (".txt",)
    unit = "line"
    cut = "lines"
    text_unit = "line"
    has_fields = False

    def read(self, source: Source, wanted: Wanted) -> Iterator[Found]:
        """See :class:`Format`."""
        for number, offset, line in source.lines():
            yield Found(_decoded(line), number, offset if source.entered else None)


def _decoded(line: bytes) -> str | Bad:
    try:
        return line.removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        return not_utf8(line, error.reason, error.start)
