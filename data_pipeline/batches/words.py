"""Where words begin, from token ids alone.

Two bits of knowledge a token are enough, how it begins and what may follow it in the same word, so boundaries come
from a table of one byte for each id of the vocabulary. They need nothing on disk and hold for shards that are already
written; a bitmap of word starts would add 6% to uint16 shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.batches.characters import INSIDE, LETTER, SPACE, accepts, begins
from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.tokenization.tokenizer import Tokenizer

_METASPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

Classes = tuple[int, int]  # how a token begins, what it accepts after it
_ALONE: Classes = (SPACE, 0)


class WordBoundaries:
    """Says of each token whether it begins a word.

    Where tokens are pieces of running text (byte-level BPE, Unigram and BPE with ``▁`` for spaces), a word is a run of
    letters, digits, combining marks and connectors (``_``), Unicode's ``\\w+``, with the one space before it, so an
    identifier is one word. A punctuation token is a word, and so is one of white space; a lone space belongs to what
    follows it. Scripts written without spaces have no runs to go by: each token that begins with a Han, Kana, Thai,
    Lao, Khmer, Myanmar or Tibetan letter begins a word, as BERT has it for Han. The later bytes of a character that
    is cut among tokens continue it; such a character counts as what most of those with its first bytes are, and as a
    letter for what follows it.

    Where the vocabulary marks the pieces of words (``##`` of WordPiece, ``</w>`` of the first BPE models), its marks
    decide, and in a WordLevel vocabulary each token is a word. Special tokens are words of their own and belong to
    nothing. A row's first token begins a word.

    The classes of characters are those of Python's ``unicodedata``.
    """

    def __init__(self, classes: list[Classes]) -> None:
        """``classes``: for each id how it begins and what it accepts (see :mod:`.characters`)."""
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
