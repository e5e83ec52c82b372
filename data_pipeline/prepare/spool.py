"""Standard input as units of work: cut at line ends, put on disk a few units at a time, recognised by contents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash

from data_pipeline.files import write_atomic
from data_pipeline.prepare.plan import MIB, STDIN, Unit, digest
from data_pipeline.sources.pieces import Piece
from data_pipeline.sources.streams import stdin_chunks

UNIT_BYTES = 16 * MIB  # its length is not known beforehand


def spooled(stream: BinaryIO, kind: str, work: Path) -> Iterator[Unit]:
    """Units of about :data:`UNIT_BYTES`, their text in ``work``. ``kind``: the format.

    A restarted run must be given the same stream from its beginning; units that are finished are then recognised by a
    hash of their text.
    """
    lines = 0
    for number, chunk in enumerate(stdin_chunks(stream, UNIT_BYTES)):
        path = work / f"stdin-{number:05d}"
        write_atomic(path, chunk)
        piece = Piece(STDIN, str(path), kind, 0, len(chunk), None, len(chunk))
        identity = digest(STDIN, kind, number, xxhash.xxh3_128_hexdigest(chunk))
        yield Unit(number, (piece,), identity, lines_before=lines)
        lines += chunk.count(b"\n")
