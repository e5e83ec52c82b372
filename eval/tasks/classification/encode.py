"""Labelled text as tokens, cut to a length; pairs with the end token between, the longer text cut first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.shared.labelled import Labelled
from eval.tasks.classification.finetune import Examples


@dataclass(frozen=True)
class Encoded:
    """What the network reads. ``lengths``: (n,) tokens of each record before cutting, the token between included.

    ``pieces``: for each record the tokens of its text, or of both, as far as they are read.
    """

    examples: Examples
    lengths: np.ndarray
    pieces: list[list[list[int]]]

    @property
    def cut(self) -> np.ndarray:
        """(n,) bool: whether something of the record is not read."""
        return self.lengths > self.examples.lengths

    def texts(self, tokenizer: Tokenizer) -> list[list[str]]:
        """What is read as text again, one list for each text of a record."""
        return [[tokenizer.decode(ids) for ids in column] for column in zip(*self.pieces, strict=True)]


def encode(tokenizer: Tokenizer, part: Labelled, numbers: np.ndarray, max_length: int) -> Encoded:
    """Tokens of every record, at most ``max_length``. A record without any token becomes one end token."""
    columns = [tokenizer.encode_batch(texts) for texts in (part.texts, part.seconds) if texts is not None]
    pieces: list[list[list[int]]] = []
    for record in zip(*columns, strict=True):
        if len(record) == 1:
            pieces.append([list(record[0][:max_length])])
        else:
            first, second = cut_pair(len(record[0]), len(record[1]), max_length - 1)
            pieces.append([list(record[0][:first]), list(record[1][:second])])
    joined: list[Any] = [p[0] if len(p) == 1 else [*p[0], tokenizer.eos_id, *p[1]] for p in pieces]
    lengths = np.array([max(1, sum(map(len, record)) + len(record) - 1) for record in zip(*columns, strict=True)])
    return Encoded(Examples([ids or [tokenizer.eos_id] for ids in joined], numbers, tokenizer.pad_id), lengths, pieces)


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
