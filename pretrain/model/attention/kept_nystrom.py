"""The masked form with its skip convolution as one autograd function: for a CPU, in float32 and float64.

It computes what :mod:`pretrain.model.attention.nystrom` writes as two attentions around an inverse, some heads at a
time, so that what one product writes the next one finds in the cache. Against two fused attentions, which compute
their weights again in the backward pass (``python -m benchmarks.attention`` measures the whole, docs/attention.md has
the times):

* the weights B and F of all tokens are kept, 2 m numbers for each token and head, where a gradient is wanted;
* every (n, m) matrix has the tokens as its rows, for B too: products with the other layout took 1.3 times as long;
* the convolution, the gather and the landmark means add to one output and one gradient: a product that adds to what is
  there takes no longer than one that overwrites it, and sums of four passes over all tokens are saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.attention.inverse import Init, KeptInverse, KeptStep
from pretrain.model.attention.landmarks import MeansGradient, landmark_means
from pretrain.model.attention.layout import Rectangle
from pretrain.model.conv import convolution_gradients, convolve

_TILE_BYTES = 2**20
"""Of the weights of the heads that are computed together. Tiles of 1024 or 512 tokens within a head took 4 to 15%
longer."""


class Inverse(NamedTuple):
    """How the landmark matrix is inverted."""

    num_landmarks: int
    iterations: int
    init: Init


def kept_nystrom(
    q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, inverse: Inverse, taps: Tensor | None
) -> Tensor:
    """F A^+ B V of q, k, v (R, H, L, d), and the centred convolution of v with ``taps`` (H, k) added to it.

    Returns (R, H, L, d), laid out in memory as (R, L, H, d). ``rectangle``: of at least one token for each landmark.
    Differentiable once.
    """
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, taps))
    with torch.autocast("cpu", enabled=False):
        return _Kept.apply(q, k, v, taps, rectangle, inverse, keep)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        taps: Tensor | None,
        rectangle: Rectangle,
        inverse: Inverse,
        keep: bool,
    ) -> Tensor:
        rows, heads, _, width = q.shape
        m, scale = inverse.num_landmarks, width**-0.5
        q_means, k_means = (landmark_means(x, rectangle, m).contiguous() for x in (q, k))
        core = torch.softmax(scale * q_means @ k_means.transpose(2, 3), dim=3)
        inverted = KeptInverse.of(core, inverse.iterations, inverse.init)

        # B in powers of 2, not normalised: exp2 takes a third of the time of exp.
        queries = (q_means * (scale * math.log2(math.e))).transpose(2, 3)
        tiles = list(_tiles(q, m))
        b_of = _matrices(q, m, tiles, keep)
        highest, sums = (q.new_empty(rows, heads, 1, m) for _ in range(2))
        gathered = torch.empty_like(q_means)
        for at in tiles:
            b = b_of(at)
            torch.bmm(k[at], queries[at], out=b)
            if rectangle.mask is not None:
                b.masked_fill_(~rectangle.mask[at[0]].transpose(1, 2), -torch.inf)
            torch.amax(b, 1, keepdim=True, out=highest[at])
            torch.sum(b.sub_(highest[at]).exp2_(), 1, keepdim=True, out=sums[at])
            torch.bmm(b.transpose(1, 2), v[at], out=gathered[at])
        gathered /= sums.transpose(2, 3)
        values = inverted.result @ gathered

        keys = (scale * k_means).transpose(2, 3)
        out = _like_projected(q).zero_() if taps is None else convolve(_real(v, rectangle), taps, taps.shape[1] // 2)
        f_of = _matrices(q, m, tiles, keep)
        for at in tiles:
            f = f_of(at)
            torch.bmm(q[at], keys[at], out=f)
            torch.softmax(f, 2, out=f)
            out[at].baddbmm_(f, values[at])
        if keep:
            ctx.rectangle, ctx.inverse = rectangle, inverse
            steps = [x for step in inverted.steps for x in step]
            kept = (q_means, k_means, core, b_of(...), f_of(...), sums, gathered, values)
            ctx.save_for_backward(q, k, v, taps, *kept, *steps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, taps, q_means, k_means, core, b, f, sums, gathered, values, *flat = ctx.saved_tensors
        rectangle: Rectangle = ctx.rectangle
        size = len(KeptStep._fields)
        steps = [KeptStep(*flat[i : i + size]) for i in range(0, len(flat), size)]
        inverted = KeptInverse(core, steps, ctx.inverse.init)
        scale, tiles = q.shape[3] ** -0.5, list(_tiles(q, b.shape[3]))

        d_values = torch.empty_like(values)
        for at in tiles:
            torch.bmm(f[at].transpose(1, 2), grad[at], out=d_values[at])
        d_gathered = inverted.result.transpose(2, 3) @ d_values
        d_core = inverted.gradient(d_values @ gathered.transpose(2, 3))
        d_core = scale * torch._softmax_backward_data(d_core, core, 3, core.dtype)
        d_q_means, d_k_means = d_core @ k_means, d_core.transpose(2, 3) @ q_means

        d_v, d_taps = None, None
        if taps is not None:
            d_v, d_taps = convolution_gradients(grad, _real(v, rectangle), taps, taps.shape[1] // 2)
        d_v = _like_projected(v).zero_() if d_v is None else _real(d_v, rectangle)
        d_q, d_k = _like_projected(q), _like_projected(k)
        of_means = MeansGradient(q, rectangle, ctx.inverse.num_landmarks)
        # Softmax(x)' = B (dB - sum(B dB)), and sum(B dB) over tokens is that of B V times its gradient.
        shift = (d_gathered * gathered).sum(dim=3).unsqueeze(2) / -sums
        d_gathered = d_gathered / sums.transpose(2, 3)
        spare, other = torch.empty_like(b[tiles[0]]), torch.empty_like(b[tiles[0]])
        for at in tiles:
            d_b, d_f = spare[: b[at].shape[0]], other[: b[at].shape[0]]
            torch.baddbmm(shift[at], v[at], d_gathered[at].transpose(1, 2), out=d_b)
            d_v[at].baddbmm_(b[at], d_gathered[at])
            d_b.mul_(b[at])
            d_q_means[at].baddbmm_(d_b.transpose(1, 2), k[at], alpha=scale)
            # The gradient of the logits replaces that of F: each row is read before it is written.
            torch.bmm(grad[at], values[at].transpose(1, 2), out=d_f)
            torch._softmax_backward_data(d_f, f[at], 2, f.dtype, grad_input=d_f)
            d_k_means[at].baddbmm_(d_f.transpose(1, 2), q[at], alpha=scale)
            of_means.write(d_k_means[at], at[0], d_k[at])
            d_k[at].baddbmm_(d_b, q_means[at], alpha=scale)
            of_means.write(d_q_means[at], at[0], d_q[at])
            d_q[at].baddbmm_(d_f, k_means[at], alpha=scale)
        return d_q, d_k, d_v, d_taps, None, None, None


_Tile = tuple[int, slice]
"""A row, and heads of it."""


def _tiles(q: Tensor, m: int) -> Iterator[_Tile]:
    """Those of q (R, H, L, d)."""
    rows, heads, length, _ = q.shape
    together = max(_TILE_BYTES // (length * m * q.element_size()), torch.get_num_threads())
    for row in range(rows):
        for first in range(0, heads, together):
            yield row, slice(first, min(first + together, heads))


def _matrices(q: Tensor, m: int, tiles: list[_Tile], keep: bool) -> Callable[[Any], Tensor]:
    """By tile, room for (L, m) weights of each of its heads: of all heads, (R, H, L, m), or one for all tiles."""
    rows, heads, length, _ = q.shape
    if keep:
        return q.new_empty(rows, heads, length, m).__getitem__
    room = q.new_empty(min(heads, tiles[0][1].stop), length, m)
    return lambda at: room[: at[1].stop - at[1].start]


def _like_projected(x: Tensor) -> Tensor:
    """Nothing yet, (R, H, L, d), in the layout that the projections have, (R, L, H, d)."""
    rows, heads, length, width = x.shape
    return x.new_empty(rows, length, heads, width).transpose(1, 2)


def _real(v: Tensor, rectangle: Rectangle) -> Tensor:
    """Zeros for padding."""
    return v if rectangle.mask is None else v.masked_fill(~rectangle.mask.transpose(2, 3), 0)
