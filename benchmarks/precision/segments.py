"""The masked form against exact attention on smooth inputs, by the way in which the text is cut into segments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.attention.inverse import iterative_inverse
from pretrain.model.attention.layout import even_segments

SEEDS = 3
COEFFICIENT = 0.9
QUERY_SCALE = 1.5
"""Logits of this standard deviation: landmarks of a flatter softmax have next to no error."""


def ceiling(length: int, count: int) -> list[int]:
    """Segments of ceil(n / m) tokens, as many as that takes."""
    size = -(-length // count)
    return [min(size, length - first) for first in range(0, length, size)]


def longer_first(length: int, count: int) -> list[int]:
    """m segments: those of ceil(n / m) tokens, then those of floor(n / m)."""
    size, more = divmod(length, count)
    return [size + 1] * more + [size] * (count - more)


def spread(length: int, count: int) -> list[int]:
    """The model's own, :func:`even_segments`."""
    return even_segments(torch.tensor([length]), count, length).sizes[0].tolist()


WAYS: dict[str, Callable[[int, int], list[int]]] = {"ceiling": ceiling, "longer first": longer_first, "spread": spread}


def smooth(heads: int, length: int, width: int, seed: int) -> Tensor:
    """(3, H, n, d) float64, an AR(1) process along n of variance 1, each number by itself."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, heads, length, width, generator=generator, dtype=torch.float64)
    out = noise.clone()
    for t in range(1, length):
        out[:, :, t] = COEFFICIENT * out[:, :, t - 1] + math.sqrt(1 - COEFFICIENT**2) * noise[:, :, t]
    return out


def _means(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.stack([part.mean(dim=-2) for part in x.split(list(sizes), dim=-2)], dim=-2)


def through_inverse(q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int]) -> Tensor:
    """The formula of the masked form over segments of these sizes. q, k, v: (H, n, d)."""
    scale, a, b = q.shape[-1] ** -0.5, _means(q, sizes), _means(k, sizes)
    outer, core, gather = ((scale * x @ y.transpose(1, 2)).softmax(dim=-1) for x, y in ((q, b), (a, b), (a, k)))
    return outer @ iterative_inverse(core[None], 6)[0] @ (gather @ v)


def pooled(q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int]) -> Tensor:
    """The same without the inverse."""
    mass = torch.tensor(sizes, dtype=q.dtype).log()
    logits = q.shape[-1] ** -0.5 * q @ _means(k, sizes).transpose(1, 2) + mass
    return logits.softmax(dim=-1) @ _means(v, sizes)


def errors(lengths: Sequence[int], *, landmarks: int, heads: int, width: int) -> list[dict[str, Any]]:
    """For each length and way of cutting, the relative errors with and without the inverse, means over the seeds."""
    rows = []
    for length in lengths:
        found = {way: [0.0, 0.0] for way in WAYS}
        for seed in range(SEEDS):
            q, k, v = smooth(heads, length, width, seed)
            q = q * QUERY_SCALE
            exact = F.scaled_dot_product_attention(q, k, v)
            for way, cut in WAYS.items():
                for at, form in enumerate((through_inverse, pooled)):
                    off = form(q, k, v, cut(length, landmarks)) - exact
                    found[way][at] += float(off.norm() / exact.norm()) / SEEDS
        rows += [{"length": length, "segments": way, "inverse": a, "pooled": b} for way, (a, b) in found.items()]
    return rows
