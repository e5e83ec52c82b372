"""Windows: the token stream cut at document ends into parts of about equal size, each of which is packed by itself."""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.shards.shardset import ShardSet


class Windows:
    """Window w holds the documents whose last token lies in ``[w * window_tokens, (w + 1) * window_tokens)``.

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
