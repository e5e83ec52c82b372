"""What the bytes of a token say about words: how it begins and what may follow it in the same word.

Written for tokens that hold any bytes of UTF-8, cut characters included. A class is a bit, so that ``begins & accepts``
says whether a token continues the one before it.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import cache

SPACE = 0  # white space: continues nothing
LETTER = 1  # a letter, digit or connector (the underscore) of a script that puts spaces between words
OTHER = 2  # punctuation, a symbol, or a letter of a script without spaces
INSIDE = 4  # the rest of a character, a combining mark, a joiner, a marked piece of a word: continues anything

# How Unicode's names of their characters begin.
_UNSPACED = (
    *("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO "),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN "),
)
_JOINERS = "\u200c\u200d"  # parts of words in Unicode's definition of \w (UTS 18, annex C)


def begins(token: bytes) -> int:
    """The class of the token's first character."""
    if _is_tail(token[0]):
        return INSIDE
    character = token[: _length(token[0])]
    return _character(_decoded(character)) if _is_whole(character) else _cut(character)


def accepts(token: bytes) -> int:
    """The classes that continue a word after this token, as bits."""
    if token == b" ":
        return LETTER | OTHER | INSIDE  # a lone space belongs to what it precedes, as in " the"
    end = len(token)
    while True:
        start = end - 1
        while start > 0 and _is_tail(token[start]):
            start -= 1
        character = token[start:end]
        if _is_tail(character[0]):
            return LETTER | INSIDE  # the end of a character that began in another token: most are letters
        if not _is_whole(character):
            return INSIDE
        kind = _last(_decoded(character))
        if kind != INSIDE or start == 0:
            return LETTER | INSIDE if kind & (LETTER | INSIDE) else INSIDE
        end = start  # a mark or joiner: what it sits on decides


@cache
def _character(character: str) -> int:
    category = unicodedata.category(character)
    if character.isspace():
        return SPACE
    if category.startswith("M") or character in _JOINERS:
        return INSIDE
    return _base(character, category)


@cache
def _last(character: str) -> int:
    """As :func:`_character`, but a mark that only scripts without spaces have shows its script."""
    category = unicodedata.category(character)
    if category.startswith("M") and unicodedata.name(character, "").startswith(_UNSPACED):
        return OTHER
    return _character(character)


def _base(character: str, category: str) -> int:
    if category[0] not in "LN" and category != "Pc":
        return OTHER
    return OTHER if unicodedata.name(character, "").startswith(_UNSPACED) else LETTER


@cache
def _cut(beginning: bytes) -> int:
    """The class of most characters that begin with these bytes, LETTER if there are none."""
    length = _length(beginning[0])
    missing = length - len(beginning)
    value = beginning[0] & (0x7F >> length)
    for byte in beginning[1:]:
        value = value << 6 | byte & 0x3F
    first, count = value << 6 * missing, 1 << 6 * missing
    least = (0, 0, 0x80, 0x800, 0x10000)[length]  # smaller ones are written in fewer bytes
    # At most some 4096 of them: 0xF0 alone begins 196,608, nearly all of them ideographs.
    points = range(max(first, least), min(first + count, 0x110000), max(1, count >> 12))
    classes = Counter(_character(chr(p)) for p in points if unicodedata.category(chr(p)) not in ("Cn", "Co", "Cs"))
    return classes.most_common(1)[0][0] if classes else LETTER


def _is_tail(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _length(lead: int) -> int:
    """Bytes of the character that a lead byte begins."""
    return 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def _is_whole(character: bytes) -> bool:
    return len(character) == _length(character[0]) and len(_decoded(character)) == 1


def _decoded(character: bytes) -> str:
    """The character, or nothing if these bytes are none."""
    try:
        return character.decode()
    except UnicodeDecodeError:
        return ""
