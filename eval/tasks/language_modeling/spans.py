"""Where the tokens of a document begin in its text: bytes and words of any run of them, and its passages.

A token is charged with the bytes that begin with it: from its first character to that of the next token. So counts are
additive, whatever windows and parts a text is cut into; a character of several bytes that was cut in two counts with
its first token. A word (a run without white space) counts with the token in which it begins.

A *passage* is a stretch of a document's text that does not depend on any tokenizer: models of different tokenizers are
compared on the same ones.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenization.tokenizer import Tokenizer

Ints = NDArray[np.int64]
_LAST_SPACE = 0x3000  # the last white space of Unicode


@dataclass(frozen=True)
class Spans:
    """A document of n tokens, its end included, and P passages.

    ``bytes`` and ``words`` (n + 1,): those of the tokens before. ``passages`` (P + 1,): the token with which each
    begins, and n. ``texts``: of each passage. ``exact``: whether the text gives these tokens again; else where a token
    begins is estimated.
    """

    bytes: Ints
    words: Ints
    passages: Ints
    texts: tuple[str, ...]
    exact: bool

    def passage_id(self, number: int) -> str:
        """A hash of the passage's text."""
        return hashlib.sha256(self.texts[number].encode()).hexdigest()[:32]


class Aligner:
    """Finds the spans of documents for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, record_chars: int) -> None:
        import tokenizers

        self._tokenizer = tokenizer
        self._record_chars = record_chars
        # Straight from the library, for the places of the tokens. Not stored in its JSON: raw text stays text.
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        self._backend.encode_special_tokens = True

    def spans(self, ids: Ints, text: str) -> Spans:
        """``ids`` (n - 1,) of a document without its end, and its text."""
        starts, exact = self._starts(ids, text)
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        size = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
        space = _white()[np.minimum(codes, _LAST_SPACE + 1)]
        begins = ~space & np.concatenate([[True], space[:-1]])
        cuts = np.array(cut_passages(text, self._record_chars), dtype=np.int64)
        edges = np.concatenate([starts, [len(text), len(text)]])  # the document's end is neither byte nor word
        return Spans(
            bytes=np.concatenate([[0], np.cumsum(size)])[edges],
            words=np.concatenate([[0], np.cumsum(begins)])[edges],
            passages=np.concatenate([np.searchsorted(starts, cuts[:-1]), [len(ids) + 1]]).astype(np.int64),
            texts=tuple(text[a:b] for a, b in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)),
            exact=exact,
        )

    def _starts(self, ids: Ints, text: str) -> tuple[Ints, bool]:
        """The character with which each token begins, (n - 1,), rising; the first begins with the text."""
        encoding: Any = self._backend.encode(text, add_special_tokens=False)
        if np.array_equal(np.array(encoding.ids, dtype=np.int64), ids):
            starts, exact = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0], True
        else:
            # What a token adds to the one before it: exact where decoding is local, and then scaled to the text.
            decode = self._backend.decode_batch
            alone = decode([[i] for i in ids.tolist()])
            pairs = decode(np.stack([ids[:-1], ids[1:]], 1).tolist())
            added = [len(pair) - len(left) for pair, left in zip(pairs, alone, strict=False)]
            reached = np.cumsum([0, *map(len, alone[:1]), *added])
            starts = reached[:-1] * len(text) // max(int(reached[-1]), 1)
            exact = False
        starts = np.clip(np.maximum.accumulate(starts), 0, len(text)) if len(starts) else starts.astype(np.int64)
        starts[:1] = 0
        return starts, exact


def cut_passages(text: str, limit: int) -> list[int]:
    """Characters at which passages of at most ``limit`` begin, and the text's length; 0: no cut.

    Cut where a word ends, so that no tokenizer that parts words at white space has a token on both sides; in a text
    without white space (for half the limit) at the limit.
    """
    edges = [0]
    while limit and len(text) - edges[-1] > limit:
        hard = edges[-1] + limit
        soft = hard
        while soft > hard - limit // 2 and (not text[soft].isspace() or text[soft - 1].isspace()):
            soft -= 1
        edges.append(soft if text[soft].isspace() and not text[soft - 1].isspace() else hard)
    return [*edges, len(text)]


@cache
def _white() -> NDArray[np.bool_]:
    """Which characters are white space to ``str.split``, up to the last one."""
    return np.array([chr(code).isspace() for code in range(_LAST_SPACE + 2)])
