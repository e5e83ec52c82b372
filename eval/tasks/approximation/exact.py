"""Exact softmax attention with its weights looked at, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BUDGET = 2**24
"""Attention weights held at once: 64 MiB in float32."""


@dataclass(frozen=True)
class Exact:
    """Of R windows and H heads."""

    output: Tensor
    """(R, H, n, d)."""
    entropy: Tensor
    """(R, H): mean over the queries of -sum_j p_j log p_j, in nats."""
    entropy_share: Tensor
    """(R, H): mean over the queries that see more than one token of entropy / log(tokens seen): 1 is uniform."""
    near: Tensor | None
    """(R, H): share of the weights that lies inside the window, mean over the queries that see anything beyond it; None
    where no query does, or without a window."""


def exact_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: Tensor | None = None) -> Exact:
    """``softmax(q k^T / sqrt(d)) v`` (Vaswani et al. 2017, equation 1) and what its rows look like.

    q, k, v: (R, H, n, d). window: (n,) int64, the first token that each query sees exactly (causal models).
    """
    rows, heads, length, _ = q.shape
    output = torch.empty_like(v)
    entropy, share, near = (q.new_zeros(rows, heads) for _ in range(3))
    seen = torch.arange(1, length + 1, device=q.device) if causal else torch.full((length,), length, device=q.device)
    compared = (seen > 1).sum().clamp(min=1)
    beyond = None if window is None else window > 0
    for block in _blocks(rows * heads, length):
        weights = _weights(q, k, block, causal)
        output[:, :, block] = weights @ v
        # xlogy: 0 log 0 is 0, for what the mask hides and for what underflows.
        nats = -torch.xlogy(weights, weights).sum(-1)
        entropy += nats.sum(-1)
        share += (nats / seen[block].to(nats.dtype).log()).masked_fill(seen[block] == 1, 0).sum(-1)
        if window is not None and beyond is not None:
            inside = torch.arange(length, device=q.device) >= window[block, None]
            near += ((weights * inside).sum(-1) * beyond[block]).sum(-1)
    return Exact(
        output,
        entropy / length,
        share / compared,
        None if beyond is None or not bool(beyond.any()) else near / beyond.sum(),
    )


def matrix_distance(q: Tensor, k: Tensor, implied: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """``implied`` (R, H, n, n) against exact attention's weights S, and uniform attention against them.

    Returns ||implied - S||_F / ||S||_F and ||U - S||_F / ||S||_F, (R, H) each; U has 1 / (tokens seen) everywhere.
    """
    rows, heads, length, _ = q.shape
    difference, norm, uniform = (q.new_zeros(rows, heads) for _ in range(3))
    for block in _blocks(rows * heads, length):
        weights = _weights(q, k, block, causal)
        squares = weights.square().sum(-1)
        seen = torch.arange(1, length + 1, device=q.device)[block] if causal else length
        difference += (implied[:, :, block] - weights).square().sum((-1, -2))
        norm += squares.sum(-1)
        uniform += (squares - 1 / seen).sum(-1)  # each row of S sums to 1, so that is ||U_i - S_i||^2
    return (difference / norm).sqrt(), (uniform.clamp(min=0) / norm).sqrt()


def _weights(q: Tensor, k: Tensor, block: slice, causal: bool) -> Tensor:
    """Rows ``block`` of softmax(q k^T / sqrt(d)), (R, H, rows, n)."""
    logits = (q[:, :, block] * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        at = torch.arange(q.shape[2], device=q.device)
        logits = logits.masked_fill(at > at[block, None], -torch.inf)
    return logits.softmax(dim=-1)


def _blocks(matrices: int, length: int) -> Iterator[slice]:
    """Blocks of queries, so that ``matrices`` of them have at most BUDGET weights."""
    step = max(1, BUDGET // (matrices * length))
    for first in range(0, length, step):
        yield slice(first, min(first + step, length))
