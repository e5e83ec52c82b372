"""Documents: what every reader gives, counted, hashed and free of broken records."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from data_pipeline.sources.corpus import Corpus, open_corpus
from data_pipeline.sources.format import Found, Unit, by_name
from data_pipeline.sources.hub import read_hub
from data_pipeline.sources.pieces import Piece
from data_pipeline.sources.reading import Bad, Reading, excerpt_of, printable
from data_pipeline.sources.records import read_found
from data_pipeline.sources.tally import BadRecord, Tally


class Document(NamedTuple):
    """A document and where it came from."""

    text: str
    source: str  # name of the input
    record: int | None  # line or row, from 1; None where only counting would tell
    size: int  # UTF-8 bytes of the text
    own_source: str = ""  # what the record itself says, where that is asked for

    @property
    def shown_source(self) -> str:
        """The source that shards keep."""
        return self.own_source or self.source


def iter_documents(
    corpus: Corpus | str | Path | Sequence[str | Path], reading: Reading | None = None, tally: Tally | None = None
) -> Iterator[Document]:
    """Stream the documents of a corpus, or of files, folders and globs, in order, as :func:`read_piece` does.

    Raises :class:`UserError` at the end if too many records were broken (:meth:`Tally.check`).
    """
    reading = Reading() if reading is None else reading
    tally = Tally() if tally is None else tally
    if isinstance(corpus, (str, Path)):
        corpus = [corpus]
    if isinstance(corpus, Sequence):
        corpus = open_corpus(corpus)
    for piece in corpus.pieces(sys.maxsize, reading):
        yield from read_piece(piece, reading, tally)
    tally.check()


def read_piece(piece: Piece, reading: Reading, tally: Tally) -> Iterator[Document]:
    """Stream the documents of a piece in bounded memory; ``tally`` is added to while the stream is consumed.

    Documents that are null, empty or nothing but white space are counted and left out. Records that give no text are
    counted and kept as samples, and the stream continues after them until they are too many (see :class:`Tally`).
    Text is passed on as it is but for a byte order mark at the start of a file, the line ends of whole-file text, and
    ``reading.normalize``. Once the stream is at its end ``tally.digest`` is the XXH3-128 of the piece's bytes on disk,
    for hub datasets that of the texts.

    Raises :class:`UserError` naming the file for what is more than a broken record: a file that cannot be read, that
    is gone or has changed since it was planned, damaged compression, a missing column.
    """
    tally.begin()
    if piece.format == "hub":
        digest = xxhash.xxh3_128()
        for document in _documents(read_hub(piece, reading), piece, reading, tally, "row"):
            text = document.text.encode()
            digest.update(len(text).to_bytes(8, "little") + text)
            yield document
        tally.digest = digest.hexdigest()
        return
    ends: list[str | None] = []
    found = read_found(piece, reading.wanted, ends.append)
    yield from _documents(found, piece, reading, tally, by_name(piece.format, piece.location).unit)
    tally.digest = ends[0]


def _documents(
    records: Iterator[Found], piece: Piece, reading: Reading, tally: Tally, unit: Unit
) -> Iterator[Document]:
    for found in records:
        tally.records += 1
        text = _text(found, reading)
        if text is None or (isinstance(text, str) and (not text or text.isspace())):
            tally.empty += 1
            continue
        if isinstance(text, str):
            text, source = reading.normalized(text), reading.source_of(found.value)
            try:
                size = len(text.encode())
            except UnicodeEncodeError as error:
                text = _surrogate(text, error.start)
            else:
                if isinstance(source, str):
                    tally.documents += 1
                    tally.text_bytes += size
                    yield Document(text, piece.name, found.record, size, source)
                    continue
                text = source
        where = piece.name if piece.format == "hub" else piece.location
        tally.add_bad(BadRecord(piece.name, found.record, unit, found.offset, *text), where)


def _text(found: Found, reading: Reading) -> str | Bad | None:
    value = found.value
    if not isinstance(value, Mapping):
        return value
    text = reading.text_of(value)
    return text._replace(excerpt=excerpt_of(found.line)) if isinstance(text, Bad) and found.line is not None else text


def _surrogate(text: str, at: int) -> Bad:
    detail = f"half a surrogate pair (character {at + 1} of the text), which is not Unicode text"
    return Bad("surrogate", detail, printable(text))
