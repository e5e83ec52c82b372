"""What the order of training shuffles: one source of training text as numbered blocks of equally many tokens."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from data_pipeline.batches.order import BlockOrder
from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet


class Rows(NamedTuple):
    """B rows of L tokens. The arrays may be views of one another's memory and must not be written to.

    ``tokens`` (B, L) int64. ``next_tokens`` (B, L) int64: for each token the one that follows it, -100 where there is
    no target; None unless asked for. ``documents`` (B, L) int32: a number for each document of a row, -1 at padding;
    None where every row is one sequence without padding.
    """

    tokens: np.ndarray
    next_tokens: np.ndarray | None
    documents: np.ndarray | None


class Order(Protocol):
    """Which block each draw takes, epoch after epoch without end."""

    def blocks(self, draws: np.ndarray) -> np.ndarray:
        """Block numbers of ``draws`` (int64, any shape, >= 0), same dtype and shape.

        ``draw // num_blocks`` is the epoch; an epoch holds every block once. A pure function of the draw, whatever was
        asked before.
        """
        ...


class Blocks(Protocol):
    """A source: ``num_blocks`` blocks of ``block_length`` tokens, and the order in which training takes them."""

    @property
    def block_length(self) -> int:
        """Tokens of a block, padding included."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks of an epoch."""
        ...

    @property
    def shards(self) -> ShardSet:
        """Where the tokens come from."""
        ...

    def order(self, seed: int, source: int) -> Order:
        """The order of the blocks for source number ``source`` of a run with this seed."""
        ...

    def read(self, blocks: np.ndarray, offset: int, length: int, *, causal: bool) -> Rows:
        """Tokens ``[offset, offset + length)`` of each of ``blocks`` (B,) int64; next tokens if ``causal``.

        A part of a read equals the read of that part, but for the numbers that documents are given: the loader reads
        several rows of a block at once and cuts them.
        """
        ...


class StreamBlocks:
    """Documents laid end to end: block b is the tokens ``[b * L, (b + 1) * L)`` of the stream.

    Rows begin and end anywhere in a document and hold parts of several, as one sequence without padding. What is left
    after the last whole block is not used, for the last causal target of a block is the first token behind it.

    Raises :class:`UserError` for shards shorter than one block and a token.
    """

    def __init__(self, shards: ShardSet, block_length: int) -> None:
        num_blocks = (shards.num_tokens - 1) // block_length
        if num_blocks < 1:
            raise UserError(
                f"shards in {shards.path} hold {shards.num_tokens} tokens, less than one block of {block_length} "
                "(and a token): prepare more text or shorten the longest seq_len (or block_length)"
            )
        self.shards = shards
        self.block_length = block_length
        self.num_blocks = num_blocks

    def order(self, seed: int, source: int) -> BlockOrder:
        """Blocks shuffled over the whole source, anew in each epoch."""
        return BlockOrder(self.num_blocks, seed, source)

    def read(self, blocks: np.ndarray, offset: int, length: int, *, causal: bool) -> Rows:
        """See :meth:`Blocks.read`."""
        starts = blocks * self.block_length + offset
        if not causal:
            return Rows(self.shards.read(starts, length), None, None)
        tokens = self.shards.read(starts, length + 1)
        # Two views of one array: a copy of each costs as much as the gather itself.
        return Rows(tokens[:, :-1], tokens[:, 1:], None)
