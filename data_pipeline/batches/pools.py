"""The order of blocks that belong to windows: shuffled over the whole epoch, and yet window by window in use."""

from __future__ import annotations

import numpy as np

from data_pipeline.batches.order import Permutation
from data_pipeline.batches.recent import Recent
from data_pipeline.shards.shardset import ramps

POOL_WINDOWS = 64


class PoolOrder:
    """Which block each draw takes: a new permutation of all blocks in each epoch, without end.

    A window's blocks cost a packing of the window, so an epoch goes through the windows pool by pool: the windows are
    permuted, up to 64 neighbours in that permutation form a pool, and the blocks of a pool are permuted among
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
        self._epoch = Recent(self._make_epoch, keep=2)
        self._pool = Recent(self._make_pool, keep=8)

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
        blocks = ramps(self._firsts[windows], self._counts[windows])
        shuffle = Permutation(len(blocks), (*self._key, epoch, pool))
        return blocks[shuffle(np.arange(len(blocks), dtype=np.int64))]
