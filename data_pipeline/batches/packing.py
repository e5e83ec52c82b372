"""Blocks of whole documents: best fit inside fixed windows of the stream, padding bounded before anything is packed.

What a block holds is a pure function of the shards, ``block_length``, ``slice_length`` and ``max_padding``. The number
of blocks of each window follows from the ends of its documents by arithmetic. So any block is found at once, and only
the window it belongs to is packed (1 to 5 ms for 2^19 tokens).
"""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import numpy as np

from data_pipeline.batches import IGNORE
from data_pipeline.batches.bestfit import pack
from data_pipeline.batches.blocks import Rows
from data_pipeline.batches.lru_cache import LRUCache
from data_pipeline.batches.order import Permutation
from data_pipeline.errors import UserError
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.shards.shardset import ShardSet, concat_ranges

MIN_WINDOW_TOKENS = 1 << 19
MIN_WINDOW_BLOCKS = 128  # the last block of a window is half empty on average: 0.4% of the window at the most
POOL_WINDOWS = 64
_KEPT_SEGMENTS = 1 << 22  # 32 bytes each


class PackingSummary(NamedTuple):
    """What packing does to the documents of some windows."""

    tokens: int
    """Tokens of the documents."""
    slots: int
    """Tokens of the blocks, padding included."""
    documents: int
    fit_block: int
    """Documents of at most a block."""
    cut_in_block: int
    """Those of them that lie in more than one place."""
    fit_slice: int
    """Documents of at most a slice."""
    cut_in_slice: int
    """Those of them that do not lie in one slice."""

    @property
    def padding(self) -> float:
        """Share of the slots that hold padding."""
        return 1 - self.tokens / self.slots


class PackingWindows:
    """The token stream cut at document ends into parts of about equal size, each of which is packed by itself.

    Window w holds the documents whose last token lies in ``[w * window_tokens, (w + 1) * window_tokens)``.

    So which documents a window holds follows from the position alone. Documents are never divided; a window is empty
    where a document is longer than ``window_tokens``. Reads the ends of all documents once (1e7 documents: 80 MB).
    Raises :class:`UserError` that names the file for ends that do not fit the tokens.
    """

    def __init__(self, shards: ShardSet, window_tokens: int, block_length: int) -> None:
        if not shards.num_tokens:
            raise UserError(f"shards in {shards.path} hold no tokens: there is nothing to pack")
        self._shards = shards
        self._offsets = np.cumsum([0, *(shard.num_tokens for shard in shards.manifest.shards)], dtype=np.int64)
        count = -(-shards.num_tokens // window_tokens)
        self.tokens = np.zeros(count, dtype=np.int64)
        """(W,) tokens of each window."""
        self.whole_blocks = np.zeros(count, dtype=np.int64)
        """(W,) blocks of ``block_length`` tokens that its longer documents fill from edge to edge."""
        for number, shard in enumerate(shards.manifest.shards):
            ends = shards.document_ends(shard.index).astype(np.int64)
            sizes = np.diff(ends, prepend=0)
            if len(ends) != shard.num_documents or not len(ends) or ends[-1] != shard.num_tokens or sizes.min() < 1:
                self._raise_damaged(shard)
            window = (self._offsets[number] + ends - 1) // window_tokens
            first = np.flatnonzero(np.diff(window, prepend=-1))
            self.tokens[window[first]] += np.add.reduceat(sizes, first)
            self.whole_blocks[window[first]] += np.add.reduceat(sizes // block_length, first)
        self._begins = np.concatenate([[0], np.cumsum(self.tokens)])

    def __len__(self) -> int:
        return len(self.tokens)

    def bounds(self, window: int) -> np.ndarray:
        """(D + 1,) int64 stream positions: document i of the window is ``[bounds[i], bounds[i + 1])``."""
        begin, end = int(self._begins[window]), int(self._begins[window + 1])
        parts = [np.array([begin], dtype=np.int64)]
        first, last = np.searchsorted(self._offsets, (begin, end - 1), side="right") - 1
        for number in range(first, last + 1):
            offset = int(self._offsets[number])
            ends = self._shards.document_ends(self._shards.manifest.shards[number].index)
            span = np.searchsorted(
                ends, np.array([max(begin - offset, 0), end - offset], dtype=np.uint64), side="right"
            )
            parts.append(ends[span[0] : span[1]].astype(np.int64) + offset)
        return np.concatenate(parts)

    def _raise_damaged(self, shard: ShardEntry) -> NoReturn:
        path = self._shards.path
        raise UserError(
            f"{path / shard.index.name} is damaged: its document ends do not divide the {shard.num_tokens} tokens of "
            f"the shard into {shard.num_documents} documents; `nystrom data verify {path}` says where"
        )


class PoolOrder:
    """Which block each draw takes: a new permutation of all blocks in each epoch, without end.

    A window's blocks cost a packing of the window, so an epoch goes through the windows pool by pool. The windows are
    permuted. Up to 64 neighbours in that permutation form a pool, and the blocks of a pool are permuted among
    themselves. Reading an epoch in order packs each window once; starting anywhere costs at most one pool.

    ``counts`` (W,) int64: blocks of each window, zeros allowed; blocks are numbered window by window. The keys of the
    permutations are (seed, source, epoch) and (seed, source, epoch, pool).
    """

    def __init__(self, counts: np.ndarray, seed: int, source: int) -> None:
        self._windows = np.flatnonzero(counts)
        self._counts = counts[self._windows]
        self._firsts = (np.cumsum(counts) - counts)[self._windows]
        self.num_blocks = int(counts.sum())
        if not self.num_blocks:
            raise ValueError("there are no blocks to order")
        self._key = (seed, source)
        # Pools of equal numbers of windows, so that none is left with a window or two that hardly mix.
        pools = -(-len(self._windows) // POOL_WINDOWS)
        self._edges = np.arange(pools + 1, dtype=np.int64) * len(self._windows) // pools
        self._epoch = LRUCache(self._make_epoch, keep=2)
        self._pool = LRUCache(self._make_pool, keep=8)

    def blocks(self, draws: np.ndarray) -> np.ndarray:
        """Block numbers in ``[0, num_blocks)`` of ``draws`` (int64, any shape, >= 0), same dtype and shape."""
        draws = np.asarray(draws, dtype=np.int64)
        epochs, within = np.divmod(draws, self.num_blocks)
        out = np.empty_like(draws)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            _, starts = self._epoch(epoch)
            pools = np.searchsorted(starts, within, side="right") - 1
            for pool in np.unique(pools[here]).tolist():
                these = here & (pools == pool)
                out[these] = self._pool((epoch, pool))[within[these] - starts[pool]]
        return out

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the windows in their order of this epoch, the first draw of each pool and the end of the epoch)."""
        count = len(self._windows)
        order = Permutation(count, (*self._key, epoch))(np.arange(count, dtype=np.int64))
        before = np.concatenate([[0], np.cumsum(self._counts[order])])
        return order, before[self._edges]

    def _make_pool(self, key: tuple[int, int]) -> np.ndarray:
        """The blocks of a pool in the order of its draws."""
        epoch, pool = key
        order, _ = self._epoch(epoch)
        windows = order[self._edges[pool] : self._edges[pool + 1]]
        blocks = concat_ranges(self._firsts[windows], self._counts[windows])
        shuffle = Permutation(len(blocks), (*self._key, epoch, pool))
        return blocks[shuffle(np.arange(len(blocks), dtype=np.int64))]


class PackedBlocks:
    """Blocks of ``block_length`` tokens filled with whole documents as far as possible.

    Every token of the stream is in exactly one block. A document of at most ``slice_length`` tokens (the shortest row
    of the run, which divides ``block_length``) lies in one slice, so that it is whole in rows of every length. A longer
    one lies in one piece if it fits a block. The share of padding is at most ``max_padding``, apart from the last block
    of a window. Documents are cut only if they are longer than a block, or if the blocks could not hold them whole with
    so little padding.

    ``window_tokens``: documents are packed in windows of about that many tokens, by default 2^19 or 128 blocks.
    Raises :class:`UserError` for ``max_padding`` outside [0, 1), shards without tokens and damaged document ends.
    """

    def __init__(
        self,
        shards: ShardSet,
        block_length: int,
        *,
        slice_length: int | None = None,
        max_padding: float = 0.02,
        window_tokens: int | None = None,
    ) -> None:
        if not 0 <= max_padding < 1:
            raise UserError(f"max_padding must be at least 0 and below 1, got {max_padding}")
        slice_length = slice_length or block_length
        if block_length % slice_length:
            raise ValueError(f"slice_length {slice_length} does not divide block_length {block_length}")
        self._shards = shards
        self._block_length, self._slice_length = block_length, slice_length
        self._windows = PackingWindows(
            shards, window_tokens or max(MIN_WINDOW_TOKENS, MIN_WINDOW_BLOCKS * block_length), block_length
        )
        # Blocks that one long document fills need no slack, the others may hold `filled` tokens each on average.
        filled = math.ceil(block_length * (1 - max_padding))
        whole = self._windows.whole_blocks
        self._counts = whole + -(-(self._windows.tokens - whole * block_length) // filled)
        self._firsts = np.concatenate([[0], np.cumsum(self._counts)])
        # Two pools, for a batch may lie across their edge, and the batches of a window of the plan go over the same
        # blocks many times.
        self._packed = LRUCache(
            self._pack, keep=2 * POOL_WINDOWS, budget=_KEPT_SEGMENTS, size=lambda packed: len(packed[0])
        )

    @property
    def shards(self) -> ShardSet:
        """Where the tokens come from."""
        return self._shards

    @property
    def block_length(self) -> int:
        """Tokens of a block, padding included."""
        return self._block_length

    @property
    def num_blocks(self) -> int:
        """Blocks of an epoch."""
        return int(self._firsts[-1])

    @property
    def padding(self) -> float:
        """Share of padding in an epoch, exact, without packing anything."""
        return 1 - self._shards.num_tokens / (self.num_blocks * self._block_length)

    def order(self, seed: int, source: int) -> PoolOrder:
        """The order of the blocks for source number ``source`` of a run with this seed."""
        return PoolOrder(self._counts, seed, source)

    def read(self, blocks: np.ndarray, offset: int, length: int, *, causal: bool) -> Rows:
        """Tokens ``[offset, offset + length)`` of each of ``blocks`` (B,) int64; next tokens if ``causal``.

        ``documents`` numbers the segments of each block, so no two of a row have one number. The last token of a
        document has no next token; the last one before a cut has the document's next token, which is in another place.
        Raises ``ValueError`` for what is outside the blocks and :class:`UserError` for damaged shards.
        """
        blocks = np.asarray(blocks, dtype=np.int64)
        if blocks.size and (blocks.min() < 0 or blocks.max() >= self.num_blocks):
            raise ValueError(f"blocks must lie in [0, {self.num_blocks})")
        if not 0 <= offset < offset + length <= self._block_length:
            raise ValueError(f"[{offset}, {offset + length}) is not a part of a block of {self._block_length} tokens")
        # Of equal firsts the last one: the windows before it are empty.
        windows = np.searchsorted(self._firsts, blocks, side="right") - 1
        rows = blocks - self._firsts[windows]
        found = []
        for window, row in zip(windows.tolist(), rows.tolist(), strict=True):
            segments, edges = self._packed(window)
            found.append(segments[edges[row] : edges[row + 1]])
        segments_of = np.array([len(part) for part in found], dtype=np.int64)
        row = np.repeat(np.arange(len(blocks)), segments_of)
        number = concat_ranges(np.zeros_like(segments_of), segments_of)  # of a segment in its block
        at, starts, sizes, closes = np.concatenate(found or [np.empty((0, 4), dtype=np.int64)]).T

        column = at - rows[row] * self._block_length - offset
        begin, end = np.maximum(column, 0), np.minimum(column + sizes, length)
        closes = (closes > 0) & (column + sizes <= length)
        starts = starts + begin - column
        here = np.flatnonzero(begin < end)
        here = here[np.argsort(starts[here], kind="stable")]  # in the order of the files
        starts, counts = starts[here], (end - begin)[here]

        shape = (len(blocks), length)
        places = concat_ranges((row * length + begin)[here], counts)
        gathered = self._shards.gather(starts, counts)
        tokens = np.full(shape, self._shards.pad_id, dtype=np.int64)
        tokens.reshape(-1)[places] = gathered
        documents = np.full(shape, -1, dtype=np.int32)
        documents.reshape(-1)[places] = np.repeat(number[here].astype(np.int32), counts)
        if not causal:
            return Rows(tokens, None, documents)
        following = np.append(gathered[1:], IGNORE)
        last = np.cumsum(counts) - 1
        following[last] = IGNORE
        cut = np.flatnonzero(~closes[here])
        following[last[cut]] = self._shards.gather(starts[cut] + counts[cut], np.ones(len(cut), dtype=np.int64))
        next_tokens = np.full(shape, IGNORE, dtype=np.int64)
        next_tokens.reshape(-1)[places] = following
        return Rows(tokens, next_tokens, documents)

    def summary(self, max_windows: int = 64) -> PackingSummary:
        """What packing does, counted in at most ``max_windows`` windows spread evenly over the stream."""
        length = self._slice_length
        filled = np.flatnonzero(self._counts)
        chosen = filled[np.arange(min(max_windows, len(filled))) * len(filled) // min(max_windows, len(filled))]
        total = np.zeros(len(PackingSummary._fields), dtype=np.int64)
        for window in chosen.tolist():
            bounds = self._windows.bounds(window)
            at, starts, sizes, _ = self._packed(window)[0].T
            document = np.searchsorted(bounds, starts, side="right") - 1
            whole = np.diff(bounds)
            places = np.bincount(document, minlength=len(whole))
            slices = np.bincount(document, (at + sizes - 1) // length - at // length + 1, minlength=len(whole))
            fits, fits_slice = whole <= self._block_length, whole <= length
            total += [
                whole.sum(),
                self._counts[window] * self._block_length,
                len(whole),
                fits.sum(),
                (fits & (places > 1)).sum(),
                fits_slice.sum(),
                (fits_slice & (slices > 1)).sum(),
            ]
        return PackingSummary(*total.tolist())

    def _pack(self, window: int) -> tuple[np.ndarray, list[int]]:
        """((S, 4) int64: place in the window's blocks, start in the stream, length, whether it closes a document;
        the first segment of each block and the end)."""
        count = int(self._counts[window])
        packed = pack(self._windows.bounds(window), count, self._block_length, self._slice_length)
        edges = np.searchsorted(packed.at, np.arange(count + 1) * self._block_length)
        return np.stack(packed, axis=1), edges.tolist()
