"""SentencePiece's replacement of characters, where that of the `tokenizers` library differs.

SentencePiece replaces the longest match at each place of the text, such as a fullwidth letter and the accent behind it.
``Precompiled`` of `tokenizers` takes a grapheme as a whole and the shortest match at its beginning, and an accent may
get lost. They differ only where a character is joined to the one before it, so such texts alone are looked at here: a
text is handed on as it is where both agree, else with the replacements made, and refused where that does not help.
"""

from __future__ import annotations

import base64
import functools
import json
import struct
import sys
import unicodedata
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    import tokenizers

# A step of the normalizer that never matches: by it a tokenizer is recognised whose ids shall be SentencePiece's.
MARK = "(?!)sentencepiece"
KNOWN_RULES = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf")
"""Those whose matches of several characters all go on with characters of :func:`joined`."""
_JOINING = {"Mn", "Me", "Mc", "Cf", "Cn"}  # and what later versions of Unicode may make so
_ALSO = (  # jamo of several kinds, marks of halfwidth kana, regional indicators, skin tones, vowels of Thai and Lao
    *(
        (0x1100, 0x11FF),
        (0xA960, 0xA97F),
        (0xD7B0, 0xD7FF),
        (0x3131, 0x318E),
        (0xFF9E, 0xFFDC),
        (0x1F1E6, 0x1F1FF),
        (0x1F3FB, 0x1F3FF),
    ),
    *((0x0E33, 0x0E33), (0x0EB3, 0x0EB3)),
)


@functools.cache
def joined() -> np.ndarray:
    """Whether a character may be part of a grapheme and not begin it (code points,) bool."""
    points = np.array([unicodedata.category(chr(point)) in _JOINING for point in range(sys.maxunicode + 1)])
    for first, last in _ALSO:
        points[first : last + 1] = True
    return points


def _joined_in(text: str) -> np.ndarray:
    """For each character of a text, whether it is one of :func:`joined`."""
    return joined()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")]


class Charsmap:
    """The replacements of a precompiled map: a double-array trie (darts-clone), then the replacements, each closed by
    a zero byte."""

    def __init__(self, blob: bytes) -> None:
        [size] = struct.unpack_from("<I", blob)
        self._trie = struct.unpack_from(f"<{size // 4}I", blob, 4)
        self._values = blob[4 + size :]
        self._single = _Single(self)

    def longest(self, key: bytes) -> tuple[int, str]:
        """Bytes of the longest match at the beginning of ``key``, 0 for none, and what replaces them."""
        trie, found, value = self._trie, 0, 0
        place = _offset(trie[0])
        for length, byte in enumerate(key, 1):
            place ^= byte
            unit = trie[place] if place < len(trie) else 0
            if unit & 0x800000FF != byte:
                break
            place ^= _offset(unit)
            if unit >> 8 & 1:
                found, value = length, trie[place] & 0x7FFFFFFF
        if not found:
            return 0, ""
        return found, self._values[value : self._values.index(b"\0", value)].decode()

    def replace(self, text: str) -> str:
        """All replacements made, as SentencePiece makes them."""
        parts, end = [], 0
        edges = np.flatnonzero(np.diff(_joined_in(text), prepend=False, append=False)).reshape(-1, 2)
        for first, stop in edges.tolist():
            begin = max(end, first - 1)  # with the character that it is joined to
            parts += [text[end:begin].translate(self._single), self._replace_run(text[begin:stop])]
            end = stop
        return "".join([*parts, text[end:].translate(self._single)])

    def _replace_run(self, run: str) -> str:
        parts, at = [], 0
        while at < len(run):
            size, value = self.longest(run[at:].encode("utf-8", "replace"))
            count = len(run[at:].encode("utf-8", "replace")[:size].decode()) if size else 1
            parts.append(value if size else run[at])
            at += count
        return "".join(parts)


class _Single(dict[int, str]):
    """Code point -> what replaces the character alone, looked up when first asked for."""

    def __init__(self, charsmap: Charsmap) -> None:
        super().__init__()
        self._charsmap = charsmap

    def __missing__(self, point: int) -> str:
        size, value = self._charsmap.longest(chr(point).encode("utf-8", "replace"))
        self[point] = value if size else chr(point)
        return self[point]


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 1 << 9) >> 6)


class Settled:
    """Texts made such that ``normalizer``, which begins with ``Precompiled``, gives what SentencePiece would."""

    def __init__(self, data: dict[str, object], blob: bytes, backend: tokenizers.Tokenizer) -> None:
        from tokenizers import Tokenizer, models

        self._charsmap, self._whole = Charsmap(blob), backend.normalizer
        bare = Tokenizer(models.BPE())
        facts = json.loads(bare.to_str())
        steps = data["normalizers"]
        assert isinstance(steps, list)
        self._rest = Tokenizer.from_str(
            json.dumps(facts | {"normalizer": {**data, "normalizers": steps[1:]}})
        ).normalizer

    def settle(self, text: str) -> str:
        """The text, or one that is normalized to what SentencePiece makes of this one.

        Raises :class:`UserError` where there is none.
        """
        if "\r\n" not in text and (text.isascii() or not _joined_in(text).any()):
            return text
        replaced = self._charsmap.replace(text)
        wanted = self._rest.normalize_str(replaced)
        if self._whole.normalize_str(text) == wanted:
            return text
        if self._whole.normalize_str(replaced) == wanted and self._charsmap.replace(replaced) == replaced:
            return replaced
        raise UserError(
            "a text has marks that SentencePiece and the tokenizers library compose differently, so that its ids "
            f"cannot be SentencePiece's: bring texts into a normal form (--normalize nfkc). It begins {text[:50]!r}"
        )


def settled(backend: tokenizers.Tokenizer, tokenizer_json: str) -> Settled | None:
    """How texts are made ready for a tokenizer that was read from SentencePiece's own file; None for others."""
    if MARK not in tokenizer_json:  # a file of megabytes is not parsed for nothing
        return None
    data = json.loads(tokenizer_json)["normalizer"]
    steps = data.get("normalizers", []) if data else []
    if not steps or steps[0]["type"] != "Precompiled" or not any(MARK in str(step) for step in steps):
        return None
    return Settled(data, base64.b64decode(steps[0]["precompiled_charsmap"]), backend)
