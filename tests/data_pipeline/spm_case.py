"""SentencePiece's ``.model`` files, written field by field from ``sentencepiece_model.proto``."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | bytes | float) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model_bytes(
    pieces: Iterable[tuple[str, float, int]],
    *,
    model_type: int = 2,
    trainer: dict[int, int | bytes] | None = None,
    normalizer: dict[int, int | bytes] | None = None,
) -> bytes:
    """``trainer`` and ``normalizer``: fields by number, such as 35 for byte_fallback."""
    out = b""
    for text, score, kind in pieces:
        out += field(1, field(1, text.encode()) + field(2, float(score)) + (field(3, kind) if kind != NORMAL else b""))
    about = {3: model_type, 40: 0, 41: 1, 42: 2, **(trainer or {})}
    out += field(2, b"".join(field(number, value) for number, value in about.items()))
    rules = {1: b"identity", **(normalizer or {})}
    return out + field(3, b"".join(field(number, value) for number, value in rules.items()))


CONTROLS = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
MERGED = ["▁a", "▁b", "ab", "▁ab", "ba", "aa", "abc", "▁abc"]
LETTERS = ["a", "b", "c", "▁", "d", "s", "<", ">"]


def small_bpe(**fields: dict[int, int | bytes]) -> bytes:
    """A vocabulary of 19: three controls, eight merged pieces, eight letters. ``fields`` as of :func:`model_bytes`."""
    ordinary = [(text, -float(rank), NORMAL) for rank, text in enumerate([*MERGED, *LETTERS])]
    return model_bytes([*CONTROLS, *ordinary], **fields)  # type: ignore[arg-type]


def small_unigram(letters: Iterable[str] = LETTERS, **fields: dict[int, int | bytes]) -> bytes:
    """The same pieces with scores of a unigram model."""
    ordinary = [(text, -2.0 - 0.25 * rank, NORMAL) for rank, text in enumerate([*MERGED, *letters])]
    return model_bytes([*CONTROLS, *ordinary], model_type=1, **fields)  # type: ignore[arg-type]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
