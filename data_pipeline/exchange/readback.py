"""Reading back what was written: the ids of shards, hashed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.exchange.tokenfile import IdsHash, map_file
from data_pipeline.shards.manifest import ShardEntry

_AT_ONCE = 1 << 20  # tokens, but for a longer document


def shard_hash(
    folder: Path, shards: Sequence[ShardEntry], dtype: str, on_tokens: Callable[[int], None] = lambda count: None
) -> IdsHash:
    """Of the documents of shards in order, each without its end token, as they are on disk."""
    import pyarrow as pa

    found = IdsHash()
    for shard in shards:
        tokens = map_file(folder / shard.tokens.name, np.dtype(dtype).newbyteorder("<"))
        try:
            with pa.OSFile(str(folder / shard.index.name)) as file:
                ends = pa.ipc.open_file(file).read_all().column("end").to_numpy().astype(np.int64)
        except (pa.ArrowInvalid, KeyError, OSError) as error:
            raise UserError(f"{folder / shard.index.name} cannot be read: {error}") from None
        if len(ends) and int(ends[-1]) != len(tokens):
            raise UserError(f"{folder / shard.tokens.name} has {len(tokens):,} tokens, its index {int(ends[-1]):,}")
        begin = start = 0
        while start < len(ends):
            stop = max(start + 1, int(np.searchsorted(ends, begin + _AT_ONCE, side="right")))
            part = ends[start:stop]
            ids = tokens[begin : int(part[-1])]
            keep = np.ones(len(ids), dtype=bool)
            keep[part - 1 - begin] = False
            found.update(ids[keep], np.diff(part, prepend=begin) - 1)
            on_tokens(len(ids))
            begin, start = int(part[-1]), stop
    return found
