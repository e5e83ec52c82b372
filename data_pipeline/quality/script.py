"""Character tables of Unicode: which code points are white space, letters, letters of a script.

The tables come from Python's own Unicode database, so a script is what the names of its letters say: ``latin`` are the
letters whose name begins with LATIN, fullwidth ones included. Combining vowel signs (Devanagari, Thai) are marks and
not letters, and count for nothing here. A newer Python with a newer Unicode knows more letters.
"""

from __future__ import annotations

import sys
import unicodedata
from functools import lru_cache

import numpy as np

SPACE, LETTER = 1, 2  # bits of `classes`

# The first words of the letters' names, by script. Names of the form "FULLWIDTH LATIN ..." and "HALFWIDTH KATAKANA ..."
# are read without their first word.
_PREFIXES: dict[str, tuple[str, ...]] = {
    "han": ("CJK UNIFIED", "CJK COMPATIBILITY", "IDEOGRAPHIC ITERATION"),
    "hangul": ("HANGUL",),
    "hiragana": ("HIRAGANA", "HENTAIGANA"),
    "katakana": ("KATAKANA",),
}
_SINGLE_WORD = (
    "arabic armenian bengali cyrillic devanagari ethiopic georgian greek gujarati gurmukhi hebrew kannada khmer lao "
    "latin malayalam mongolian myanmar oriya sinhala tamil telugu thai tibetan"
)
_PREFIXES.update({name: (name.upper(),) for name in _SINGLE_WORD.split()})
_PREFIXES["latin"] += ("FEMININE ORDINAL", "MASCULINE ORDINAL")

SCRIPTS: tuple[str, ...] = tuple(sorted(_PREFIXES))


def code_points(text: str) -> np.ndarray:
    """The code points of ``text``, uint32, one for each character."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def classes(text: str) -> np.ndarray:
    """For each character of ``text`` the bits SPACE (``str.isspace``) and LETTER (``str.isalpha``), uint8."""
    table = _class_table()
    if text.isascii():  # bytes.translate runs at memory speed, a gather does not
        return np.frombuffer(text.encode("ascii").translate(table[:256].tobytes()), dtype=np.uint8)
    return table[code_points(text)]


def script_table(scripts: tuple[str, ...]) -> np.ndarray:
    """Of each code point, whether it is a letter of one of ``scripts`` (names in :data:`SCRIPTS`), bool."""
    prefixes = tuple(prefix for script in scripts for prefix in _PREFIXES[script])
    return _prefix_table(prefixes)


@lru_cache(maxsize=1)
def _class_table() -> np.ndarray:
    characters = np.arange(sys.maxunicode + 1, dtype=np.uint32).view("U1")
    space = np.strings.isspace(characters).astype(np.uint8) * SPACE
    letter = np.strings.isalpha(characters).astype(np.uint8) * LETTER
    return np.asarray(space + letter, dtype=np.uint8)


@lru_cache(maxsize=16)
def _prefix_table(prefixes: tuple[str, ...]) -> np.ndarray:
    # 137,000 names are looked up once for a set of scripts, 0.05 s
    table = np.zeros(sys.maxunicode + 1, dtype=bool)
    for code in np.flatnonzero(_class_table() & LETTER).tolist():
        name = unicodedata.name(chr(code), "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
        table[code] = name.startswith(prefixes)
    return table
