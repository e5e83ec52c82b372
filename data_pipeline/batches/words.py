"""Where words begin, from token ids alone.

Two bits of knowledge a token are enough, how it begins and what may follow it in the same word, so boundaries come
from a table of one byte for each id of the vocabulary. They need nothing on disk and hold for shards that are already
written; a bitmap of word starts would add 6% to uint16 shards.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.tokenization.tokenizer import Tokenizer

# The class of a token's first character. A class is a bit, so that ``begins & accepts`` says whether a token continues
# the one before it.
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

_METASPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

Classes = tuple[int, int]  # how a token begins, what it accepts after it
_ALONE: Classes = (SPACE, 0)


class WordBoundaries:
    """Says of each token whether it begins a word.

    Byte-level BPE, and Unigram and BPE with ``▁`` for spaces, have tokens that are pieces of running text. There a word
    is a run of letters, digits, combining marks and connectors (``_``), Unicode's ``\\w+``, with the one space before
    it. So an identifier is one word. A punctuation token is a word, and so is one of white space; a lone space belongs
    to what follows it. Scripts written without spaces have no runs to go by: each token that begins with a Han, Kana,
    Thai, Lao, Khmer, Myanmar or Tibetan letter begins a word, as BERT has it for Han. The later bytes of a character
    that is cut among tokens continue it; such a character counts as what most of those with its first bytes are, and as
    a letter for what follows it.

    Where the vocabulary marks the pieces of words (``##`` of WordPiece, ``</w>`` of the first BPE models), its marks
    decide, and in a WordLevel vocabulary each token is a word. Special tokens are words of their own and belong to
    nothing. A row's first token begins a word.

    The classes of characters are those of Python's ``unicodedata``.
    """

    def __init__(self, classes: list[Classes]) -> None:
        """``classes``: for each id how it begins and what it accepts, as :func:`begins` and :func:`accepts` say."""
        self._table = np.array([begin | accept << 4 for begin, accept in classes], dtype=np.uint8)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> WordBoundaries:
        """Read the boundaries off the tokenizer's vocabulary.

        Raises :class:`UserError` for a tokenizer whose tokens do not show where words begin.
        """
        definition: dict[str, Any] = json.loads(tokenizer.to_json())
        classify = _classifier(definition)
        classes: list[Classes] = [_ALONE] * tokenizer.vocab_size
        for token, index in _model_tokens(definition["model"]):
            if index < len(classes):
                classes[index] = classify(token)
        for added in definition["added_tokens"]:  # spelled as they are, whatever the model's spelling
            text = added["content"].encode()
            classes[added["id"]] = (begins(text), accepts(text))
        for index in tokenizer.special_ids:
            classes[index] = _ALONE
        return cls(classes)

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """Whether each of ``tokens`` (B, L) int begins a word, (B, L) bool."""
        classes = self._table[tokens]
        starts = np.ones(tokens.shape, dtype=bool)
        np.equal(classes[:, 1:] & (classes[:, :-1] >> 4), 0, out=starts[:, 1:])
        return starts


def _model_tokens(model: dict[str, Any]) -> list[tuple[str, int]]:
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return list(vocab.items())
    return [(piece, index) for index, (piece, _) in enumerate(vocab)]  # Unigram: pieces with their scores


def _classifier(definition: dict[str, Any]) -> Callable[[str], Classes]:
    """How this kind of tokenizer spells: from a token of its vocabulary to its classes."""
    model = definition["model"]
    if model["type"] == "WordLevel":
        return lambda token: _ALONE
    if prefix := model.get("continuing_subword_prefix"):
        return lambda token: (INSIDE if token.startswith(prefix) else SPACE, INSIDE)
    if suffix := model.get("end_of_word_suffix"):
        return lambda token: (INSIDE, 0 if token.endswith(suffix) else INSIDE)

    kinds = _types(definition["pre_tokenizer"]) | _types(definition["decoder"])
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()
        # A character outside the alphabet cannot come from text; it stands for itself.
        return _of_bytes(lambda token: b"".join(alphabet.get(c) or c.encode() for c in token))
    if any(token.startswith(_METASPACE) for token, _ in _model_tokens(model)):
        return _of_bytes(_metaspace_bytes)
    raise UserError(
        f"the vocabulary of this {model['type']} tokenizer does not show where words begin (no byte-level alphabet, no "
        f"{_METASPACE} for spaces, no prefix or suffix of pieces): use masking unit 'token' or another tokenizer"
    )


def _of_bytes(spelling: Callable[[str], bytes]) -> Callable[[str], Classes]:
    def classify(token: str) -> Classes:
        text = spelling(token)
        return (begins(text), accepts(text)) if text else (LETTER, LETTER | INSIDE)

    return classify


def _metaspace_bytes(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)  # byte fallback: a character outside the vocabulary, byte by byte
    return bytes.fromhex(byte[1]) if byte else token.replace(_METASPACE, " ").encode()


def _byte_alphabet() -> dict[str, bytes]:
    """The printable character that stands for each byte in byte-level BPE (Radford et al. 2019)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): bytes([byte]) for byte in shown} | {chr(256 + i): bytes([byte]) for i, byte in enumerate(hidden)}


def _types(node: Any) -> set[str]:
    """All ``type`` names in a part of tokenizer.json."""
    if isinstance(node, list):
        return set().union(*map(_types, node))
    if isinstance(node, dict):
        own = {node["type"]} if isinstance(node.get("type"), str) else set()
        return own.union(*map(_types, node.values()))
    return set()


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
