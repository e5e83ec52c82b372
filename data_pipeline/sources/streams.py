"""Bytes of a piece, hashed as they pass, decompressed, and cut into lines: all in bounded memory."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol

import xxhash

from data_pipeline.errors import UserError
from data_pipeline.sources.pieces import Piece, require_zstandard

BOM = b"\xef\xbb\xbf"  # UTF-8's byte order mark, which some programs put in front of a file
MAX_LINE = 1 << 30  # bytes; a longer line, or a longer file that is one document, is surely not meant
_BLOCK = 1 << 20
# A compressed block may unpack to thousands of times its size. zstd cannot be told to stop; 16 KiB of it are at most
# 512 MiB, and on text some 60 KiB.
_ZSTD_BLOCK = 1 << 14


class Hasher(Protocol):
    """What hashes bytes as they pass."""

    def update(self, data: bytes, /) -> None:
        """Take in bytes."""
        ...


@contextmanager
def opened(piece: Piece) -> Iterator[BinaryIO]:
    """The file of a piece, open for reading and of the size it had when the piece was planned.

    Errors of the operating system inside the ``with`` become :class:`UserError` naming the file.
    """
    try:
        with open(piece.path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < piece.end or piece.total not in (size, -1):
                planned = piece.end if piece.total == -1 else piece.total
                raise UserError(
                    f"{piece.location} has changed since it was planned: it has {size:,} bytes, not {planned:,}"
                )
            yield stream
    except OSError as error:
        raise UserError(f"{piece.location} cannot be read: {error.strerror or error}") from None


def blocks(stream: BinaryIO, piece: Piece, hasher: Hasher) -> Iterator[bytes]:
    """The bytes ``[begin, end)`` of a piece, a mebibyte at a time."""
    stream.seek(piece.begin)
    left = piece.end - piece.begin
    while left:
        data = stream.read(min(_BLOCK, left))
        if not data:
            raise UserError(f"{piece.location} became shorter while it was read")
        hasher.update(data)
        left -= len(data)
        yield data


def piece_digest(piece: Piece) -> str | None:
    """XXH3-128 (hex) of a piece's bytes on disk, compressed if they are; None for hub datasets.

    The same as :func:`read_piece` leaves in ``tally.digest``, without parsing.
    """
    if piece.kind == "hub":
        return None
    digest = xxhash.xxh3_128()
    with opened(piece) as stream:
        for _ in blocks(stream, piece, digest):
            pass
    return digest.hexdigest()


def plain_blocks(stream: BinaryIO, piece: Piece, hasher: Hasher) -> Iterator[bytes]:
    """The decompressed bytes of a piece that is a whole file. Raises :class:`UserError` for damaged compression."""
    raw = blocks(stream, piece, hasher)
    if piece.codec == "gz":
        return _gunzip(raw, piece.location)
    if piece.codec == "zst":
        return _unzstd(raw, piece.location)
    return raw


def piece_lines(stream: BinaryIO, piece: Piece, hasher: Hasher) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes, without ``\\n``, of each line whose first byte lies in the piece.

    The offset is that in the decompressed file. Raises :class:`UserError` for a line above 1 GiB.
    """
    if piece.codec:
        return _lines(plain_blocks(stream, piece, hasher), 0, piece.location)
    cut_off = piece.begin > 0 and _byte(stream, piece.begin - 1) != b"\n"
    data = itertools.chain(blocks(stream, piece, hasher), _rest_of_line(stream, piece))
    lines = _lines(data, piece.begin, piece.location)
    if cut_off and piece.begin < piece.end:
        next(lines)  # begins in an earlier piece
    return lines


def line_chunks(data: Iterator[bytes], target_bytes: int, location: str) -> Iterator[bytes]:
    """Blocks of bytes as runs of whole lines: ``target_bytes`` and the rest of the line, the last may have fewer.

    Raises :class:`UserError` for a line above 1 GiB.
    """
    parts: list[bytes] = []
    size = 0
    for block in data:
        begin = 0
        while begin < len(block):
            end = min(len(block), begin + max(0, target_bytes - size))
            if size + end - begin >= target_bytes and (end == 0 or block[end - 1 : end] != b"\n"):
                # Full, but in the middle of a line.
                end = block.find(b"\n", end) + 1 or len(block)
            parts.append(block[begin:end])
            size += end - begin
            begin = end
            if size >= target_bytes and parts[-1].endswith(b"\n"):
                yield b"".join(parts)
                parts, size = [], 0
            elif size > target_bytes + MAX_LINE:
                raise _too_long(location)
    if parts:
        yield b"".join(parts)


def stdin_chunks(stream: BinaryIO, target_bytes: int) -> Iterator[bytes]:
    """Cut a byte stream at ends of lines into chunks of ``target_bytes`` and the rest of the line.

    Raises :class:`UserError` for a line above 1 GiB.
    """
    if target_bytes < 1:
        raise UserError(f"chunks must have at least one byte, got {target_bytes}")
    while True:
        parts: list[bytes] = []
        left = target_bytes
        while left and (data := stream.read(left)):  # a pipe gives what it has
            parts.append(data)
            left -= len(data)
        if parts and not parts[-1].endswith(b"\n"):
            parts.append(stream.readline(MAX_LINE))
            if len(parts[-1]) == MAX_LINE and not parts[-1].endswith(b"\n"):
                raise _too_long("standard input")
        if not parts:
            return
        yield b"".join(parts)


def _byte(stream: BinaryIO, position: int) -> bytes:
    stream.seek(position)
    return stream.read(1)


def _rest_of_line(stream: BinaryIO, piece: Piece) -> Iterator[bytes]:
    """What follows a piece until the line is complete in which it ends."""
    if piece.begin == piece.end or _byte(stream, piece.end - 1) == b"\n":
        return
    while data := stream.read(_BLOCK):
        end = data.find(b"\n")
        if end >= 0:
            yield data[: end + 1]
            return
        yield data


def _lines(data: Iterator[bytes], offset: int, location: str) -> Iterator[tuple[int, bytes]]:
    begun: list[bytes] = []  # a line of which only the beginning was read
    length = 0
    for block in data:
        first, *more = block.split(b"\n")
        begun.append(first)
        length += len(first)
        if length > MAX_LINE:
            raise _too_long(f"{location}, byte {offset}")
        if more:
            line = b"".join(begun)
            yield offset, line
            offset += len(line) + 1
            *lines, last = more
            for line in lines:
                yield offset, line
                offset += len(line) + 1
            begun, length = [last], len(last)
    if length:
        yield offset, b"".join(begun)


def _too_long(where: str) -> UserError:
    return UserError(f"{where}: a line of more than {MAX_LINE:,} bytes; is this a text file with lines?")


def _gunzip(raw: Iterator[bytes], location: str) -> Iterator[bytes]:
    member: Any = None  # a file may be several members one after the other
    members = 0
    try:
        for block in raw:
            data = block
            while data:
                if member is None:
                    data = data.lstrip(b"\0") if members else data  # padding after a member is allowed
                    if not data:
                        break
                    member, members = zlib.decompressobj(wbits=31), members + 1
                if plain := member.decompress(data, _BLOCK):
                    yield plain
                if member.eof:
                    data, member = member.unused_data, None
                else:
                    data = member.unconsumed_tail
    except zlib.error as error:
        raise _damaged(location, "gzip", str(error)) from None
    if member is not None or not members:
        raise _damaged(location, "gzip", "the end is missing" if members else "the file is empty")


def _unzstd(raw: Iterator[bytes], location: str) -> Iterator[bytes]:
    require_zstandard()
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as `zstd --long=31` needs
    # Frames are followed one by one: the reader that zstandard has for files takes a file cut short for a whole one.
    frame: Any = None
    frames = 0
    try:
        for block in raw:
            for start in range(0, len(block), _ZSTD_BLOCK):
                data = block[start : start + _ZSTD_BLOCK]
                while data:
                    if frame is None:
                        frame, frames = unpacker.decompressobj(), frames + 1
                    if plain := frame.decompress(data):
                        yield plain
                    if not frame.eof:
                        break
                    data, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        raise _damaged(location, "zstd", str(error)) from None
    if frame is not None or not frames:
        raise _damaged(location, "zstd", "the end is missing" if frames else "the file is empty")


def _damaged(location: str, what: str, why: str) -> UserError:
    remedy = "fetch or write the file again, or leave it out"
    return UserError(f"{location}: the {what} compression is damaged or cut short: {why}; {remedy}")
