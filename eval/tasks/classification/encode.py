"""Labelled text as tokens, cut to a length; pairs with the end token between, the longer text cut first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.shared.labelled import Labelled
from eval.tasks.classification.finetune import Examples

# Texts tokenized at a time: as Python integers a token takes 40 bytes, 20 times as much as here.
_TOGETHER = 256


@dataclass(frozen=True)
class Encoded:
    """What the network reads. ``lengths``: (n,) tokens of each record before cutting, the token between included.

    ``pieces``: for each record the tokens of its text, or of both, as far as they are read.
    """

    examples: Examples
    lengths: np.ndarray
    pieces: list[list[np.ndarray]]

    @property
    def cut(self) -> np.ndarray:
        """(n,) bool: whether something of the record is not read."""
        return self.lengths > self.examples.lengths

    def texts(self, tokenizer: Tokenizer) -> list[list[str]]:
        """What is read as text again, one list for each text of a record."""
        return [[tokenizer.decode(ids) for ids in column] for column in zip(*self.pieces, strict=True)]

    def take(self, indices: np.ndarray) -> Encoded:
        """Some of the records."""
        return Encoded(self.examples.take(indices), self.lengths[indices], [self.pieces[i] for i in indices])


def encode(tokenizer: Tokenizer, part: Labelled, numbers: np.ndarray, max_length: int) -> Encoded:
    """Tokens of every record, at most ``max_length``. A record without any token becomes one end token.

    They are kept as uint16 or uint32: 25,000 film reviews of 376 tokens took 1,240 MB as lists of integers.
    """
    columns = [texts for texts in (part.texts, part.seconds) if texts is not None]
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    end = np.array([tokenizer.eos_id], dtype=dtype)
    joined: list[np.ndarray] = []
    pieces: list[list[np.ndarray]] = []
    lengths: list[int] = []
    for start in range(0, len(part), _TOGETHER):
        batches = [tokenizer.encode_batch(column[start : start + _TOGETHER]) for column in columns]
        for record in zip(*batches, strict=True):
            sizes = tuple(map(len, record))
            kept = (min(sizes[0], max_length),) if len(sizes) == 1 else cut_pair(sizes[0], sizes[1], max_length - 1)
            read = [np.array(ids[:size], dtype=dtype) for ids, size in zip(record, kept, strict=True)]
            whole = read[0] if len(read) == 1 else np.concatenate([read[0], end, read[1]])
            joined.append(whole if len(whole) else end)
            pieces.append(read)
            lengths.append(max(1, sum(sizes) + len(sizes) - 1))
    return Encoded(Examples(joined, numbers, tokenizer.pad_id), np.array(lengths), pieces)


def cut_pair(first: int, second: int, budget: int) -> tuple[int, int]:
    """Lengths left of two texts so that they fit ``budget`` tokens together, the longer one cut first.

    The same as taking the last token of the longer one (of the second where they are equal) until they fit.
    """
    if first + second <= budget:
        return first, second
    half = budget // 2
    if second <= half:
        return budget - second, second
    if first <= budget - half:
        return first, budget - first
    return budget - half, half
