"""What a format of files consists of, and the register in which the formats of the package ``formats`` are found."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, NamedTuple, TypeVar, get_args

from data_pipeline.errors import UserError
from data_pipeline.registry import RegistrationError, Registry
from data_pipeline.sources import streams
from data_pipeline.sources.pieces import CODECS, TEXT_PER_COMPRESSED_BYTE, Piece, cuts
from data_pipeline.sources.reading import Bad, TextUnit, Wanted

if TYPE_CHECKING:
    from data_pipeline.sources.inputs import CorpusFile

Cut = Literal["whole", "lines", "own"]
Opens = Literal["stream", "path"]
Unit = Literal["line", "row"]


class Chunk(NamedTuple):
    """Whole records of a piece, copied out of it.

    ``data``: bytes that the format reads in place of the file, decompressed. ``before``: lines or rows of the file
    before its own. ``header``: lines at the beginning of ``data`` that repeat those of the file's beginning.
    """

    data: bytes
    before: int
    header: int = 0


class Found(NamedTuple):
    """What a reader found in a record, and where.

    ``value``: the record's fields; or its text, where the format has no fields or the text is all that was asked for;
    or null; or a fault. ``line``: the record as it stands in the file, for the excerpt of a broken one.
    """

    value: Mapping[str, Any] | str | Bad | None
    record: int | None  # line or row from 1; None in a piece that begins in the middle of a file
    offset: int | None = None  # byte at which its line begins, where that is a place on disk
    line: bytes | None = None


@dataclass(frozen=True)
class Source:
    """A piece of a file, for its format to read. Compression is undone here, and bytes are hashed as they pass."""

    piece: Piece
    stream: BinaryIO | None = None
    hasher: streams.Hasher | None = None

    @property
    def location(self) -> str:
        """The path of the file, for messages and for formats that open it themselves."""
        return self.piece.location

    @property
    def entered(self) -> bool:
        """Whether offsets in the stream are places in the file on disk."""
        return not self.piece.codec and self.piece.excerpt is None

    def line_number(self, number: int) -> int:
        """The number in the file of the piece's line ``number``, both from 1."""
        excerpt = self.piece.excerpt
        if excerpt is None or number <= excerpt.header:
            return number
        return number + excerpt.before - excerpt.header

    def blocks(self) -> Iterator[bytes]:
        """The decompressed bytes of a file that is read as a whole, a mebibyte at a time."""
        assert self.stream is not None
        assert self.hasher is not None
        return streams.plain_blocks(self.stream, self.piece, self.hasher)

    def raw_lines(self) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of each line as :meth:`lines` gives them, but with the byte order mark."""
        assert self.stream is not None
        assert self.hasher is not None
        return streams.piece_lines(self.stream, self.piece, self.hasher)

    def lines(self) -> Iterator[tuple[int | None, int, bytes]]:
        """Number (from 1; None in the middle of a file), offset and bytes of each line that begins in the piece.

        A line is without its ``\\n``, the first of a file without a byte order mark. The offset is that in the
        decompressed file. Raises :class:`UserError` for a line above 1 GiB and for damaged compression.
        """
        middle = self.piece.begin > 0
        excerpt = self.piece.excerpt
        headless = excerpt is not None and excerpt.before > 0 and not excerpt.header
        for number, (offset, line) in enumerate(self.raw_lines(), 1):
            yield (
                None if middle else self.line_number(number),
                offset,
                line.removeprefix(streams.BOM) if offset == 0 and not headless else line,
            )


class Format:
    """A format of files. A subclass says the parts below and is registered with ``@register``."""

    name: ClassVar[str]
    """Small letters and digits; a piece's kind begins with it, so it is part of what a preparation is known by."""
    suffixes: ClassVar[tuple[str, ...]]
    """Of the files that are read so, such as ``.jsonl``."""
    unit: ClassVar[Unit]
    """What records are counted in, for messages."""
    cut: ClassVar[Cut]
    """Where a file may be entered in the middle, for several processes to share it. ``whole``: nowhere. ``lines``: at
    the ends of lines, each of which is a record. ``own``: at places of the format's own (see :meth:`pieces`)."""
    opens: ClassVar[Opens] = "stream"
    """``stream``: it reads bytes in order (``source.blocks()`` or ``source.lines()``), to their end, and so may be
    compressed. ``path``: it opens ``source.location`` itself and may not."""
    text_unit: ClassVar[TextUnit | None] = None
    """For plain text, of which two formats share their suffixes: the unit this one is for."""
    has_fields: ClassVar[bool] = True
    """Whether records are made of fields with names."""
    version: ClassVar[int] = 1
    """Raised when the same file gives other records than before: shards of the earlier reading are then not reused."""
    division: ClassVar[int] = 1
    """Raised when :meth:`chunks` has other edges than before: an unfinished preparation then makes its parts anew."""

    def read(self, source: Source, wanted: Wanted) -> Iterator[Found]:
        """The records of a piece in order; broken ones as :class:`Bad`, so that reading continues after them.

        Raises :class:`UserError` naming the file for what is more than a broken record, as a missing column.
        """
        raise NotImplementedError

    def chunks(self, source: Source, wanted: Wanted, target_bytes: int) -> Iterator[Chunk]:
        """A piece that cannot be entered in the middle, as runs of whole records with about ``target_bytes`` of text.

        One process reads the piece and several tokenize the chunks. Their edges depend on the piece and
        ``target_bytes`` alone. :meth:`read` gives the records of the whole piece from all chunks in order. For formats
        that are cut at lines this is done; another one overrides it, see :attr:`divides`.
        """
        assert self.divides
        before = 0
        for data in streams.line_chunks(source.blocks(), target_bytes, source.location):
            yield Chunk(data, before)
            before += data.count(b"\n")

    @property
    def divides(self) -> bool:
        """Whether the format has :meth:`chunks`."""
        return self.cut == "lines" or type(self).chunks is not Format.chunks

    def pieces(self, file: CorpusFile, codec: str, target_bytes: int, wanted: Wanted) -> list[Piece]:
        """The file cut into pieces of about ``target_bytes`` of text, which tile its bytes.

        Depends on sizes and metadata only, never on records.
        """
        kind = self.name + (f".{codec}" if codec else "")
        whole = bool(codec) or self.cut == "whole"
        sized = TEXT_PER_COMPRESSED_BYTE if codec else 1
        return [
            Piece(file.name, str(file.path), kind, begin, end, None, (end - begin) * sized, file.bytes)
            for begin, end in cuts(file.bytes, max(file.bytes, 1) if whole else target_bytes)
        ]


_Kind = TypeVar("_Kind", bound=type[Format])
FORMATS: Registry[Format] = Registry(
    "format",
    "data_pipeline.sources.formats",
    Format,
    {
        "suffixes": "a tuple with those of its files, such as ('.jsonl',)",
        "unit": "what records are counted in: line or row",
        "cut": "where a file may be entered: whole, lines or own",
        "read": "the reader of records",
    },
)


def register(kind: _Kind) -> _Kind:
    """Class decorator: add a format. Raises :class:`RegistrationError`, naming it, for one that lacks a part, has a
    part that does not fit, or claims the name or a suffix of another."""
    if fault := _fault(kind):
        raise RegistrationError(f"format {getattr(kind, 'name', None) or kind.__name__} ({kind.__module__}): {fault}")
    return FORMATS.register(kind)


def _fault(kind: type[Format]) -> str:
    """What is wrong with the parts that a class has; "" for a sound one. Parts that it lacks are the registry's."""
    given = {part: getattr(kind, part, None) for part in ("name", "unit", "cut", "opens")}
    name, suffixes = given["name"], getattr(kind, "suffixes", None)
    if name is not None and not re.fullmatch("[a-z0-9]+", str(name)):
        return f"its name must be small letters and digits, not {name!r}"
    for part, choices in (("unit", get_args(Unit)), ("cut", get_args(Cut)), ("opens", get_args(Opens))):
        if given[part] is not None and given[part] not in choices:
            return f"its {part} must be one of {', '.join(choices)}, not {given[part]!r}"
    if suffixes is not None and (not suffixes or not isinstance(suffixes, tuple)):
        return f"its suffixes must be a tuple of some, such as ('.{name}',), not {suffixes!r}"
    for suffix in suffixes or ():
        if not re.fullmatch(r"\.[a-z0-9_-]+", suffix) or suffix[1:] in CODECS:
            return f"a suffix is a dot and small letters, such as '.{name}', not {suffix!r}"
    if (kind.pieces is not Format.pieces) != (given["cut"] == "own"):
        return "cut = 'own' and a method 'pieces' belong together"
    if (given["cut"], given["opens"]) == ("lines", "path"):
        return "what is cut at lines is read as a stream: opens must be 'stream'"
    for other in FORMATS.known.values():
        shared = set(suffixes or ()) & set(other.suffixes)
        if shared and other.name != name and (kind.text_unit is None or kind.text_unit == other.text_unit):
            return f"files {', '.join(sorted(shared))} are read by format {other.name}"
    return ""


def formats() -> dict[str, Format]:
    """All formats by name."""
    return {name: kind() for name, kind in FORMATS.all().items()}


def by_name(name: str, location: str) -> Format:
    """The format of a piece; raises :class:`UserError` naming ``location`` for an unknown one."""
    try:
        return FORMATS.get(name)()
    except ValueError as error:
        raise UserError(f"{location}: {error}") from None


def of_path(path: Path, text_unit: TextUnit = "file") -> tuple[Format, str] | None:
    """Format and compression (gz, zst or nothing) by a file's name; None for a kind of file that is not read."""
    *before, last = "", *(suffix.lower() for suffix in path.suffixes)
    codec = last[1:] if last[1:] in CODECS and before[-1] else ""
    for found in formats().values():
        if (before[-1] if codec else last) in found.suffixes and found.text_unit in (None, text_unit):
            return (found, codec) if found.opens == "stream" or not codec else None
    return None


def stream_formats() -> list[str]:
    """Names of the formats in which standard input may come: it is cut at lines."""
    return sorted(found.name for found in formats().values() if found.cut == "lines")


def can_divide(piece: Piece) -> bool:
    """Whether a piece that cannot be entered in the middle can be divided into runs of records while it is read."""
    if piece.format == "hub":
        return False
    form = by_name(piece.format, piece.location)
    return form.divides and (bool(piece.codec) or form.cut != "lines")


def text_is_hidden(piece: Piece) -> bool:
    """Whether the size of a piece says little about its text: it is compressed, a hub's, or its format's own affair."""
    return bool(piece.codec) or piece.format == "hub" or by_name(piece.format, piece.location).opens == "path"


def suffixes(with_fields: bool = False) -> list[str]:
    """Of all files that are read, or of those with fields, compression included, sorted."""
    packed, plain = _by_access(with_fields)
    return sorted([*packed, *(suffix + f".{codec}" for suffix in packed for codec in CODECS), *plain])


def supported(with_fields: bool = False) -> str:
    """The suffixes in words, for messages."""
    packed, plain = _by_access(with_fields)
    more = " or ".join(f".{codec}" for codec in CODECS)
    return ", ".join([*packed[:-1], f"{packed[-1]} (each also with {more})", *plain])


def _by_access(with_fields: bool) -> tuple[list[str], list[str]]:
    """Suffixes of the formats that may be compressed, and of the others."""
    found: dict[Opens, set[str]] = {"stream": set(), "path": set()}
    for each in formats().values():
        if each.has_fields or not with_fields:
            found[each.opens].update(each.suffixes)
    return sorted(found["stream"]), sorted(found["path"])
