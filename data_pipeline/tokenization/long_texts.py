"""Cuts a long text into pieces that give, encoded one by one, the token ids of the whole.

The `tokenizers` library takes 116 to 135 bytes of memory for each character of a text that it encodes at once; in
pieces it is 5 to 6 (a text of 30 million characters, BPE, WordPiece and Unigram; tiktoken 9, in pieces 2).

A text can be cut where the pre-tokenizer splits it on both sides alike, since the model never looks beyond what lies
between two splits. Such places are looked for between words, and each is tried on the text around it before it is used.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    import tokenizers

PIECE = 1 << 18  # characters, about; texts of up to twice as many stay whole
LONGEST = 1 << 26  # characters that are encoded in one piece where there is no place to cut, 9 GB of memory
_WINDOW = 512  # characters on each side of a cut on which it is tried
_SEARCH = 1 << 14  # characters before the end of a piece in which a cut is looked for
_TRIES = 4  # places of each kind that are tried
_LETTER = r"[^\W\d_]"
# The first is a split of every pre-tokenizer in use; scripts without spaces have the others.
_PLACES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?<={_LETTER})(?= {_LETTER})",
        rf"(?<=\n)(?={_LETTER})",
        rf"(?<={_LETTER})(?=\n)",
        rf"(?<=[.!?。！？])(?={_LETTER})",
    )
)


def is_long(text: str) -> bool:
    """Whether a text is encoded in pieces, if it can be cut."""
    return len(text) > 2 * PIECE


def cut(backend: tokenizers.Tokenizer, text: str) -> list[str]:
    """Pieces of ``text``, in order and without gaps, of about :data:`PIECE` characters where there is a place to cut.

    Raises :class:`UserError` for a piece of more than :data:`LONGEST` characters.
    """
    pieces: list[str] = []
    start, end = 0, PIECE
    while len(text) - end > PIECE:
        place = _place(backend, text, start, end)
        if place is not None:
            pieces.append(text[start:place])
            start = place
            end = start + PIECE
        else:
            end += PIECE
    pieces.append(text[start:])
    longest = max(pieces, key=len)
    if len(longest) > LONGEST:
        raise UserError(
            f"a document has {len(longest):,} characters in which this tokenizer leaves no place to cut, more than the "
            f"{LONGEST:,} that are encoded at once (130 bytes of memory each): make each line of plain text a document "
            f"(--text-unit line), or cut the document that begins {text[:60]!r}"
        )
    return pieces


def _place(backend: tokenizers.Tokenizer, text: str, start: int, end: int) -> int | None:
    """The last place behind ``start`` and before ``end`` where the text may be cut."""
    if backend.pre_tokenizer is None:  # the model sees the text whole
        return None
    begin = max(start + 1, end - _SEARCH)
    part = text[begin - 1 : end + 2]
    for kind in _PLACES:
        found = [match.start() for match in kind.finditer(part, 1)]
        for place in found[-_TRIES:][::-1]:
            if _splits(backend, text, begin - 1 + place):
                return begin - 1 + place
    return None


def _splits(backend: tokenizers.Tokenizer, text: str, place: int) -> bool:
    """Whether both sides of ``place`` are encoded as the whole is.

    Tried with the left side from two neighbouring characters on: splits that are counted from the beginning of the
    text, such as every 4 characters, lie differently then.
    """
    right = text[place : place + _WINDOW]
    for size in (_WINDOW, _WINDOW - 1):
        left = text[max(0, place - size) : place]
        if _parts(backend, left + right) != _parts(backend, left) + _parts(backend, right):
            return False
        if _ids(backend, left + right) != _ids(backend, left) + _ids(backend, right):
            return False
    return True


def _parts(backend: tokenizers.Tokenizer, text: str) -> list[str]:
    pre: Any = backend.pre_tokenizer
    normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    return [part for part, _ in pre.pre_tokenize_str(normal)]


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)
