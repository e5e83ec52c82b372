"""Text to arrays of token ids, as fast as the tokenizer allows.

Two backends give the same ids. "tokenizers" is the library itself and takes any tokenizer. "tiktoken" (the extra
``fast``) takes byte-level BPE with a regular expression before it, the kind that ``nystrom data tokenizer`` trains and
GPT-2 and Llama 3 use. Measured on 8.9 MB of Python sources with a byte-level BPE of 32k, one thread, text to uint16
arrays, in MB per second of CPU time: tokenizers 3.3 (its bare ``encode_batch_fast`` 3.4), tiktoken 16.

That the ids are the same is checked: on all code points of Unicode by a test, and on a sample of the user's text by
:func:`choose_encoder`. :class:`CheckedEncoder` checks every 512th text of the work.
"""

from __future__ import annotations

import array
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike

from data_pipeline.errors import UserError
from data_pipeline.tokenization.bytepairs import NotExpressible, byte_pairs
from data_pipeline.tokenization.long_texts import is_long
from data_pipeline.tokenization.tokenizer import Tokenizer

BACKENDS = ("auto", "tokenizers", "tiktoken")
CHECK_EVERY = 512
CHECK_CHARACTERS = 1 << 13
_TOGETHER = 4  # pieces of a long text that are encoded at once, on as many cores
# tiktoken's regular expressions give up, with a panic, at a run of 999,690 white space characters (version 0.14).
_LONGEST_RUN = 250_000
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{_LONGEST_RUN}}}")


class Encoder(Protocol):
    """Encodes texts; ``name`` is the backend's."""

    name: str

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, 1-D, of the encoder's dtype; no special token is added."""
        ...


class StockEncoder:
    """The `tokenizers` library; on all cores unless ``TOKENIZERS_PARALLELISM`` is false."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer, dtype: DTypeLike) -> None:
        self._tokenizer = tokenizer
        self._dtype = np.dtype(dtype)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text."""
        if any(map(is_long, texts)):
            return [self._in_pieces(text) for text in texts]
        return [_to_array(ids, self._dtype) for ids in self._tokenizer.encode_batch(texts)]

    def _in_pieces(self, text: str) -> np.ndarray:
        pieces = self._tokenizer.pieces(text)
        parts: list[np.ndarray] = []
        for start in range(0, len(pieces), _TOGETHER):
            ids = self._tokenizer.encode_batch(pieces[start : start + _TOGETHER])
            parts += [_to_array(part, self._dtype) for part in ids]
        return np.concatenate(parts)


class TiktokenEncoder:
    """tiktoken with the tokenizer's own vocabulary; one thread.

    Raises :class:`~data_pipeline.tokenization.bytepairs.NotExpressible` for a tokenizer that tiktoken cannot be, and
    where tiktoken is not installed.
    """

    name = "tiktoken"

    def __init__(self, tokenizer: Tokenizer, dtype: DTypeLike) -> None:
        try:
            import tiktoken
        except ImportError:
            raise NotExpressible("tiktoken is not installed (pip install 'nystrom-pretrain[fast]')") from None
        pairs = byte_pairs(tokenizer)
        try:
            self._encoding = tiktoken.Encoding(
                tokenizer.hash, pat_str=pairs.pattern, mergeable_ranks=pairs.ranks, special_tokens={}
            )
        except Exception as error:  # a pattern that its engine does not know
            raise NotExpressible(f"tiktoken refuses the vocabulary: {error}") from None
        self._ids = pairs.ids.astype(dtype)
        self._tokenizer = tokenizer
        self._stock = StockEncoder(tokenizer, dtype)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        if is_long(text):
            pieces = self._tokenizer.pieces(text)
            if len(pieces) > 1:
                return np.concatenate([self._encode(piece) for piece in pieces])
        if len(text) > _LONGEST_RUN and _LONG_RUN.search(text):
            return self._stock.encode_batch([text])[0]
        try:
            # The list is quicker than encode_to_numpy, which goes through the code for special tokens: 19 against 15
            # MB/s in all.
            return self._ids[_to_array(self._encoding.encode_ordinary(text), np.dtype(np.uint32))]
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust, not an Exception
                raise
            return self._stock.encode_batch([text])[0]


class ParityError(Exception):
    """The fast backend and the `tokenizers` library gave different ids for a text; the message shows it."""


class CheckedEncoder:
    """An encoder that encodes every ``every``-th text, the first included, by the `tokenizers` library too (of long
    texts the first :data:`CHECK_CHARACTERS` characters: where a document is a book, all would be checked otherwise).

    Raises :class:`ParityError` at the first difference; the caller then redoes its unit of work with
    :class:`StockEncoder`. Call :meth:`reset` at the beginning of a unit, so that the same texts of it are checked
    whatever was done before.
    """

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, dtype: DTypeLike, every: int = CHECK_EVERY) -> None:
        self.name = encoder.name
        self._encoder = encoder
        self._stock = StockEncoder(tokenizer, dtype)
        self._every = every
        self._seen = 0

    def reset(self) -> None:
        """Begin to count anew."""
        self._seen = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text."""
        chosen = range(-self._seen % self._every, len(texts), self._every)
        self._seen += len(texts)
        _compare(self._encoder, self._stock, [texts[i][:CHECK_CHARACTERS] for i in chosen])
        return self._encoder.encode_batch(texts)


class EncoderChoice(NamedTuple):
    """An encoder, and in words why it is this one."""

    encoder: Encoder
    reason: str


def choose_encoder(tokenizer: Tokenizer, requested: str, sample: Sequence[str], dtype: DTypeLike) -> EncoderChoice:
    """The encoder to work with; ``requested`` is "auto", "tokenizers" or "tiktoken".

    "auto" takes tiktoken if it is installed, can express the vocabulary, and gives the ids of the `tokenizers` library
    for every text of ``sample``; it then comes as a :class:`CheckedEncoder`. Raises :class:`UserError` with the reason
    if "tiktoken" is demanded and cannot be had.
    """
    if requested not in BACKENDS:
        raise UserError(f"unknown encoder {requested!r}: choose one of {', '.join(BACKENDS)}")
    stock = StockEncoder(tokenizer, dtype)
    if requested == "tokenizers":
        return EncoderChoice(stock, "asked for")
    try:
        fast = TiktokenEncoder(tokenizer, dtype)
        _compare(fast, stock, sample)
    except (NotExpressible, ParityError) as error:
        if requested == "tiktoken":
            raise UserError(f"tiktoken cannot be used: {error}; leave the choice to auto") from None
        return EncoderChoice(stock, f"tiktoken cannot be used: {error}")
    checked = CheckedEncoder(fast, tokenizer, dtype)
    return EncoderChoice(checked, f"same ids as the tokenizers library on {len(sample):,} texts of the sample")


def make_encoder(tokenizer: Tokenizer, name: str, dtype: DTypeLike) -> StockEncoder | CheckedEncoder:
    """The encoder with the ``name`` that :func:`choose_encoder` decided on, for another process."""
    if name == "tokenizers":
        return StockEncoder(tokenizer, dtype)
    return CheckedEncoder(TiktokenEncoder(tokenizer, dtype), tokenizer, dtype)


def _compare(fast: Encoder, stock: Encoder, sample: Sequence[str]) -> None:
    for text, ours, theirs in zip(sample, fast.encode_batch(sample), stock.encode_batch(sample), strict=True):
        if not np.array_equal(ours, theirs):
            raise ParityError(_difference(fast.name, text, ours, theirs))


def _difference(name: str, text: str, ours: np.ndarray, theirs: np.ndarray) -> str:
    shared = min(len(ours), len(theirs))
    place = int(np.append(np.flatnonzero(ours[:shared] != theirs[:shared]), shared)[0])
    return (
        f"{name} and tokenizers differ from token {place} on ({ours[place : place + 5].tolist()} and "
        f"{theirs[place : place + 5].tolist()}) in the text that begins {text[:60]!r}"
    )


def _to_array(ids: list[int], dtype: np.dtype[Any]) -> np.ndarray:
    # Quicker than np.array(ids, dtype) or np.fromiter: 206 MB of text a second against 148 and 160.
    return np.frombuffer(array.array("I", ids), dtype=np.uint32).astype(dtype, copy=False)
