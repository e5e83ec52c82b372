"""The order of training as pure functions of one integer, the number of tokens consumed so far.

Nothing here is stored and nothing is drawn. The permutation of an epoch is a keyed bijection that is computed where it
is needed. Which tokens make up a batch follows by arithmetic from the position. Resuming at any position costs the
same, on any number of processes.

Terms. The unit that is shuffled is a *block* of ``block_length`` tokens, the longest sequence length of the run. A
*draw* is a running number of blocks taken since the start of training; ``draw // num_blocks`` is the epoch. A shorter
row of ``seq_len`` tokens is one of the ``k = block_length / seq_len`` *slices* of a block.

The window deal: with rows of a k-th of a block, ``k`` batches form a *window*; batch ``j`` of a window is slice
``j`` of every block of the window. So a batch of R rows holds text from R blocks, and not R neighbouring slices of R/k
blocks. Every token of the window's blocks comes exactly once. Stages end where windows end, so a change of length loses
and repeats nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.batches.counter_rng import mix64
from data_pipeline.batches.lru_cache import LRUCache
from data_pipeline.errors import UserError

_ROUNDS = 8  # Luby & Rackoff (1988) need 4 for a strong permutation; 8 because halves are a few bits wide at small n
_CHUNK = 1 << 15  # draws permuted at a time: walks take a dozen calls of NumPy for the last few; 30 to 60 ns a draw


class Permutation:
    """A keyed bijection on ``[0, n)``: a Feistel network with cycle walking (Black & Rogaway 2002, section 4).

    ``key`` is any tuple of non-negative integers below 2^64. Memory is O(1); a stored permutation
    of 1e8 takes 800 MB and 7 s.
    """

    def __init__(self, n: int, key: Sequence[int]) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs n >= 1, got {n}")
        self.n = n
        bits = (n - 1).bit_length()
        # The domain 2^bits is below 2n, so that a walk takes less than two steps on average.
        self._right_bits = np.uint64(bits // 2)
        self._left_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._right_mask = np.uint64((1 << (bits // 2)) - 1)
        words = np.array([len(key), *key], dtype=np.uint64)
        self._round_keys = _key_schedule(words)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Images of ``indices`` (int64, any shape, each in ``[0, n)``), int64, same shape."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= self.n):
            raise ValueError(f"indices must lie in [0, {self.n})")
        flat = self._network(indices.reshape(-1).astype(np.uint64))
        n = np.uint64(self.n)
        outside = np.flatnonzero(flat >= n)
        while outside.size:  # walk the cycle until it comes back into [0, n)
            walked = self._network(flat[outside])
            flat[outside] = walked
            outside = outside[walked >= n]
        return flat.astype(np.int64).reshape(indices.shape)

    def _network(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._right_bits, x & self._right_mask
        mixed, scratch = np.empty_like(x), np.empty_like(x)
        for i in range(0, _ROUNDS, 2):
            np.add(right, self._round_keys[i], out=mixed)
            left ^= mix64(mixed, scratch) & self._left_mask
            np.add(left, self._round_keys[i + 1], out=mixed)
            right ^= mix64(mixed, scratch) & self._right_mask
        return (left << self._right_bits) | right


def _key_schedule(words: np.ndarray) -> np.ndarray:
    """Round keys (``_ROUNDS``,) uint64 that depend on every word of the key."""
    state = np.full(1, 0x9E3779B97F4A7C15, dtype=np.uint64)
    for word in words:
        state = mix64((state ^ word) + np.uint64(0x9E3779B97F4A7C15))
    steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mix64(state + steps)


def order_key(seed: int, epoch: int, source: int) -> tuple[int, ...]:
    """The key of a source's permutation in an epoch. The first source has the same order in a mixture and alone."""
    return (seed, epoch, source) if source else (seed, epoch)


class BlockOrder:
    """Which block each draw takes: a new permutation of all blocks in each epoch, without end.

    The sources of a mixture, numbered from 0, get orders that have nothing to do with each other.
    """

    def __init__(self, num_blocks: int, seed: int, source: int = 0) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self.seed = seed
        self.source = source
        self._chunk_size = min(_CHUNK, max(64, num_blocks))  # few epochs in a chunk: each costs a permutation
        # A few chunks of consecutive draws: the k batches of a window ask for the same draws k times.
        self._chunk = LRUCache(self._make_chunk, keep=4)

    def blocks(self, draws: np.ndarray) -> np.ndarray:
        """Block numbers in ``[0, num_blocks)`` of ``draws`` (int64, any shape, >= 0), same dtype and shape."""
        draws = np.asarray(draws, dtype=np.int64)
        if not draws.size:
            return draws
        first = int(draws.min()) // self._chunk_size
        if first == int(draws.max()) // self._chunk_size:
            return self._chunk(first)[draws - first * self._chunk_size]
        chunk_of = draws // self._chunk_size
        out = np.empty_like(draws)
        for chunk in np.unique(chunk_of):
            here = chunk_of == chunk
            out[here] = self._chunk(int(chunk))[draws[here] - chunk * self._chunk_size]
        return out

    def _make_chunk(self, chunk: int) -> np.ndarray:
        draws = np.arange(chunk * self._chunk_size, (chunk + 1) * self._chunk_size, dtype=np.int64)
        epochs, within = np.divmod(draws, self.num_blocks)
        out = np.empty_like(draws)
        edges = np.flatnonzero(np.diff(epochs)) + 1
        for part in np.split(np.arange(len(draws)), edges):
            permutation = Permutation(self.num_blocks, order_key(self.seed, int(epochs[part[0]]), self.source))
            out[part] = permutation(within[part])
        return out


class StageSpec(NamedTuple):
    """A stage as asked for: rows of ``seq_len`` tokens until ``until_tokens`` tokens of the run.

    ``batch_tokens`` are those of a global batch; None: as many as the plan says.
    """

    seq_len: int
    until_tokens: int
    batch_tokens: int | None = None


class Stage(NamedTuple):
    """A stage as it will run; it covers the positions ``[start_tokens, end_tokens)``."""

    seq_len: int
    start_tokens: int
    end_tokens: int
    batch_tokens: int
    rows: int  # of a global batch
    slices: int  # k: rows in a block, batches in a window

    @property
    def num_batches(self) -> int:
        """Optimizer steps of the stage."""
        return (self.end_tokens - self.start_tokens) // self.batch_tokens


class BatchSpan(NamedTuple):
    """Consecutive batches that fill a rectangle: ``slices`` slices of each block of ``windows`` windows.

    Window w takes the draws ``first_draw + w * rows`` to ``first_draw + (w + 1) * rows``; batch ``w * slices + j``
    is slice ``first_slice + j`` of them.
    """

    stage: int
    first_draw: int
    windows: int
    first_slice: int
    slices: int


class Plan:
    """What each global batch of a run consists of, as a function of the tokens consumed before it.

    A batch has ``batch_tokens`` tokens, whatever its length, unless its stage has a number of its own. Each stage's end
    is rounded up to the end of a window (a multiple of ``batch_tokens * block_length / seq_len`` from its start), so
    that the next stage begins at a whole draw whatever the sizes of its batches. Raises :class:`UserError` for lengths
    that do not divide the block, a batch that is not whole blocks, or a stage left empty by the rounding.
    """

    def __init__(self, stages: Sequence[StageSpec], *, block_length: int, batch_tokens: int) -> None:
        if not stages:
            raise UserError("the plan needs at least one stage")
        if block_length < 1:
            raise UserError(f"a block must have at least one token, got block_length {block_length}")
        self.block_length = block_length
        resolved: list[Stage] = []
        start = 0
        for i, (seq_len, until, own) in enumerate(stages):
            if seq_len < 1 or block_length % seq_len:
                raise UserError(f"stage {i}: seq_len {seq_len} must divide the block of {block_length} tokens")
            batch = batch_tokens if own is None else own
            if batch < 1 or batch % block_length:
                raise UserError(
                    f"stage {i}: batch_tokens {batch} must be a positive multiple of the block of {block_length} tokens"
                )
            k = block_length // seq_len
            window = k * batch
            if until <= start:
                before = f"; the stage before it ends at {start}, a multiple of whole windows" if resolved else ""
                raise UserError(f"stage {i} would be empty: until_tokens {until}{before}")
            end = start + -(-(until - start) // window) * window
            resolved.append(Stage(seq_len, start, end, batch, batch // seq_len, k))
            start = end
        self.stages = tuple(resolved)
        self.total_tokens = start
        self._starts = [stage.start_tokens for stage in self.stages]

    @property
    def num_batches(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(stage.num_batches for stage in self.stages)

    def stage_index(self, tokens_consumed: int) -> int:
        """The stage of the batch that begins at this position (the last one at the very end)."""
        if not 0 <= tokens_consumed <= self.total_tokens:
            raise ValueError(f"position {tokens_consumed} lies outside the run of {self.total_tokens} tokens")
        return bisect_right(self._starts, tokens_consumed) - 1

    def check_position(self, tokens_consumed: int) -> None:
        """Raise :class:`UserError` unless a batch begins (or the run ends) at this position."""
        if not 0 <= tokens_consumed <= self.total_tokens:
            raise UserError(f"position {tokens_consumed} lies outside the run of {self.total_tokens} tokens")
        stage = self.stages[self.stage_index(tokens_consumed)]
        if (tokens_consumed - stage.start_tokens) % stage.batch_tokens:
            raise UserError(
                f"position {tokens_consumed} is not the edge of a batch of {stage.batch_tokens} tokens: it belongs to "
                "a run with another batch_tokens or curriculum"
            )

    def part(self, tokens_consumed: int, limit: int = 1) -> BatchSpan:
        """The batches from this position on that can be read in one go, at least one and at most ``limit``."""
        index = self.stage_index(tokens_consumed)
        stage = self.stages[index]
        batch, rest = divmod(tokens_consumed - stage.start_tokens, stage.batch_tokens)
        if rest or tokens_consumed >= self.total_tokens:
            raise ValueError(f"no batch begins at position {tokens_consumed}")
        window, j = divmod(batch, stage.slices)
        # A window of k batches is `rows` blocks: k * batch_tokens / block_length = batch_tokens / seq_len.
        first = stage.start_tokens // self.block_length + window * stage.rows
        if j or limit < stage.slices:
            return BatchSpan(index, first, 1, j, min(limit, stage.slices - j))
        return BatchSpan(
            index, first, min(limit // stage.slices, stage.num_batches // stage.slices - window), 0, stage.slices
        )

    def rows(self, tokens_consumed: int) -> tuple[np.ndarray, np.ndarray]:
        """(draws, slices), each (rows,) int64: each row of the global batch is a slice of the block of a draw."""
        part = self.part(tokens_consumed)
        rows = self.stages[part.stage].rows
        return part.first_draw + np.arange(rows, dtype=np.int64), np.full(rows, part.first_slice, dtype=np.int64)
