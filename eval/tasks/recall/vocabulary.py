"""Material for rows in a model's own vocabulary: ordinary tokens, words, digits, held-out text."""

from __future__ import annotations

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.tasks.recall.questions import Ints, generator

_SYMBOLS = 2
"""First word of the seed of the choice of symbols."""


def ordinary(tokenizer: Tokenizer) -> Ints:
    """Ids of all tokens that are not special, ascending."""
    return np.setdiff1d(np.arange(tokenizer.vocab_size), np.array(tokenizer.special_ids, dtype=np.int64))


def symbols(tokenizer: Tokenizer, count: int, seed: int) -> Ints:
    """``count`` different ordinary tokens, a random choice that is a function of the seed."""
    ids = ordinary(tokenizer)
    if count > len(ids):
        raise UserError(f"--symbols {count}: the tokenizer has {len(ids)} ordinary tokens")
    return generator(_SYMBOLS, seed).permutation(ids)[:count]


def words(tokenizer: Tokenizer) -> Ints:
    """Ids of tokens that are a word of at least three letters: those that begin with a space, where there are any."""
    texts = {int(token): tokenizer.decode([int(token)]) for token in ordinary(tokenizer)}
    found = [token for token, text in texts.items() if text.strip().isalpha() and len(text.strip()) >= 3]
    spaced = [token for token in found if texts[token].startswith(" ")]
    return np.array(spaced or found, dtype=np.int64)


def digit_tokens(tokenizer: Tokenizer) -> Ints:
    """Ids of the ten digits as tokens of their own (10,); raises :class:`UserError` where they are not."""
    found = []
    for digit in range(10):
        ids = tokenizer.encode(str(digit))
        if not ids or tokenizer.decode(ids[-1:]).strip() != str(digit):
            raise UserError(f"the tokenizer has no token for the digit {digit} alone: use --key word")
        found.append(ids[-1])
    return np.array(found, dtype=np.int64)


class Text:
    """Windows of held-out shards: for training from the first half of the stream, to be scored from the second."""

    def __init__(self, shards: ShardSet, longest: int) -> None:
        self.shards = shards
        self.middle = shards.num_tokens // 2
        if self.middle < longest:
            raise UserError(
                f"{shards.path} holds {shards.num_tokens} tokens, half of them for training: too few for rows of "
                f"{longest} tokens; choose shorter ones or say with --data where more text is"
            )

    def windows(self, rng: np.random.Generator, count: int, length: int, *, training: bool) -> Ints:
        """(count, length) consecutive tokens from random places."""
        low, high = (0, self.middle) if training else (self.middle, self.shards.num_tokens)
        return self.shards.read(rng.integers(low, high - length + 1, count), length)
