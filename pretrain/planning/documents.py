"""Packed documents as they may come, where the real ones are not known."""

from __future__ import annotations

import numpy as np
import torch

from pretrain.model.attention.layout import Layout

SHORTEST_SHARE = 64
"""The shortest document is a row's length divided by this."""


def typical_documents(rows: int, length: int) -> Layout:
    """Rows full of documents whose lengths are spread evenly over octaves, from 1/64 of the row to all of it; the same
    on every call."""
    generator = np.random.default_rng(0)
    lowest = np.log(max(length / SHORTEST_SHARE, 1))
    ids = np.empty((rows, length), dtype=np.int64)
    for row in ids:
        start = number = 0
        while start < length:
            size = max(1, int(np.exp(generator.uniform(lowest, np.log(length)))))
            row[start : start + size] = number
            start, number = start + size, number + 1
    return Layout.from_documents(torch.from_numpy(ids))
