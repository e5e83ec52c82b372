"""Causal Nystrom attention: exact inside a window, landmarks of completed segments beyond it, one softmax over both.

Masking the three matrices of the bidirectional form leaks: a landmark is a mean over a segment, so it holds its own
segment's future. Here the sequence is cut into segments of a fixed c tokens, and with s = d^-1/2

* a token sees exactly the tokens of its own segment up to itself and of the w - 1 segments before;
* it sees every completed segment j farther back through one key k~_j, with logit ``s q.k~_j + M_j`` and value W_j, in
  the same softmax.

Where the landmark comes from. To a query q, segment j weighs ``L_j(q) = logsumexp_(t in j)(s q.k_t)``, a convex
function. Its tangent at a landmark query q~_j (the mean of the segment's queries, plus a learned offset per head) is,
with p the softmax of s q~_j.k_t over the segment,

    L_j(q) >= s q.k~_j + M_j,    k~_j = sum_t p_t k_t,    M_j = -sum_t p_t log p_t

so the key is the mean weighted by p, and the segment's mass M_j is the entropy of p. M_j is log c if the landmark
stands for c tokens that are alike, and 0 if it stands for one. The tangent is exact at q~_j and never more than the
truth. So far text as a whole gets no more attention than in exact attention, and often less. One segment may get more
than its tokens would, at the expense of others. ``weighted=False`` takes the plain mean for k~_j, and for M_j what
makes the logit exact at q~_j: no tangent, and no bound.

Where it comes from. A window and one entry for each earlier chunk in one softmax, with a cache for decoding, is the
layout of EVA (Zheng et al. 2023, arXiv 2302.04542). Key and mass are those of HiLS-Attention (2026, arXiv 2607.02980),
which reads the chunks of highest mass exactly and drops the others. This project's own are the values pooled at the
same tangent point with all segments kept, the triangular inverse, and the bounds.

Values. Without ``gamma``, W_j = P_j = sum_t p_t v_t. With it, W comes from the Nystrom core at landmark level, where
causality is triangular:

    A[i,j] = softmax over j <= i of (s q~_i.k~_j + M_j)
    (B V)[i] = softmax over the tokens of segments <= i of (s q~_i.k) V
    W = (g I + (1 - g) A)^-1 (g P + (1 - g) B V)

The inverse of a lower triangular matrix is lower triangular: W_j depends on segments <= j only. Plain Nystrom, g = 0,
explodes: its relative error on smooth inputs was 377 in a prototype, against 0.12 at g = 0.75. For g > 1/2 the inverse
is bounded by 1 / (2 g - 1) in the maximum norm, whatever the data. It costs m n more logits and, in decoding, all keys
and values.

The segment length is a number of the model and never derived from the row, so a prefix's outputs are the whole's.
Padding on the right is in every real token's future and needs no mask. docs/attention.md has the derivation and the
comparison that chose the defaults.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.attention.blockwise import Window, blockwise_attention
from pretrain.model.attention.pyramid import FLAT, Level, Pyramid, all_levels
from pretrain.model.attention.softmax import attend, segment_means
from pretrain.model.compute import at_least_float32

_SLAB = 128
"""Landmarks that gather at a time: enough to keep a fused kernel busy."""


class Landmarks(NamedTuple):
    """What stands for m completed segments, for each of B heads of all rows; in float32 or more."""

    keys: Tensor
    """(B, m, d), k~."""
    mass: Tensor
    """(B, m), M."""
    values: Tensor
    """(B, m, d), W."""


def causal_nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Window,
    offset: Tensor | None = None,
    gamma: Tensor | None = None,
    weighted: bool = True,
    pyramid: Pyramid = FLAT,
    recall: int = 0,
) -> Tensor:
    """Attention of every token to those before it. q, k, v: (R, H, n, d) for any n; returns (R, H, n, d).

    ``offset``: (H, S, d) or (H, 1, d), added to the mean query of each segment, S at least n / c. ``gamma``: (H,) in
    (1/2, 1), or None for pooled values. ``weighted``: landmark keys are weighted as the values are, or else plain
    means. ``pyramid``: far landmarks have parents, which are seen in their place. ``recall``: far segments that each
    token reads exactly (:mod:`pretrain.model.attention.recall`).

    A sequence of up to ``window.segments`` + ``recall`` segments gets exact causal attention.
    """
    rows, heads, length, _ = q.shape
    size = window.segment_length
    if length <= (window.segments + recall) * size:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    segments = -(-length // size)
    if segments * size > length:  # zeros in the last segment: no landmark, and in the future of all
        q, k, v = (F.pad(x, (0, 0, 0, segments * size - length)) for x in (q, k, v))
    count = segments - window.segments
    queries = landmark_queries(q, size, offset).flatten(0, 1)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    far = causal_landmarks(queries, k, v, None if gamma is None else gamma.repeat(rows), count=count, weighted=weighted)
    if pyramid.levels > 1:
        with torch.autocast(q.device.type, enabled=False):
            far = stacked(Level(queries[:, :count], *far), pyramid, weighted=weighted)
    out = blockwise_attention(q, k, v, far.keys, far.values.to(v.dtype), far.mass, window, pyramid, recall)
    return out.unflatten(0, (rows, heads))[:, :, :length]


def stacked(landmarks: Level, pyramid: Pyramid, *, weighted: bool) -> Landmarks:
    """The levels above the landmarks of all segments, one behind the other."""
    levels = all_levels(landmarks, pyramid, weighted=weighted)
    keys, mass, values = (torch.cat(parts, dim=1) for parts in list(zip(*levels, strict=True))[1:])
    return Landmarks(keys, mass, values)


def causal_window_attention(q: Tensor, k: Tensor, v: Tensor, window: Window) -> Tensor:
    """The window alone, nothing beyond it: what landmarks are to be compared with. All (R, H, n, d)."""
    rows, heads, length, width = q.shape
    if length <= window.segments * window.segment_length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    missing = -length % window.segment_length
    q, k, v = (F.pad(x, (0, 0, 0, missing)).flatten(0, 1) for x in (q, k, v))
    # Two tensors: torch.compile refuses a function that is given the same one twice.
    no_keys, no_values = (k.new_empty(rows * heads, 0, width) for _ in range(2))
    bias = k.new_empty(rows * heads, 0, dtype=at_least_float32(q.dtype))
    out = blockwise_attention(q, k, v, no_keys, no_values, bias, window)
    return out.unflatten(0, (rows, heads))[:, :, :length]


def landmark_queries(q: Tensor, segment_length: int, offset: Tensor | None) -> Tensor:
    """q~: (R, H, S * c, d) -> (R, H, S, d), means and offset (H, S or more or 1, d), in at least float32."""
    with torch.autocast(q.device.type, enabled=False):
        queries = segment_means(q, segment_length)
    return queries if offset is None else queries + offset[:, : queries.shape[2]]


def pool_segments(query: Tensor, k: Tensor, v: Tensor, *, weighted: bool) -> Landmarks:
    """k~, M and P of segments, each from its own tokens alone, in the precision of the queries. query: (B, m, d), in at
    least float32; k, v: (B, m, c, d)."""
    if k.dtype != query.dtype:
        return Landmarks(*_PoolWide.apply(query, k, v, weighted))
    scale = query.shape[-1] ** -0.5
    own = scale * (k @ query.unsqueeze(-1)).squeeze(-1)  # (B, m, c)
    log_p = own.log_softmax(dim=-1)
    p = log_p.exp()
    row = p.unsqueeze(-2)
    values = (row @ v).squeeze(-2)
    if weighted:
        return Landmarks((row @ k).squeeze(-2), -(p * log_p).sum(dim=-1), values)
    keys = k.mean(dim=-2)
    return Landmarks(keys, own.logsumexp(dim=-1) - scale * (query * keys).sum(dim=-1), values)


class _PoolWide(torch.autograd.Function):
    """:func:`pool_segments` of keys and values in 16 bits, widened in both passes and never kept in float32.

    In bfloat16 throughout, logits of deviation 20 had gradients of the queries that were off by 2.5e-2; this way and
    with k~ not rounded before the read it is 5.8e-3, and 7.0e-3 in PyTorch's exact attention.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, k: Tensor, v: Tensor, weighted: bool) -> tuple[Tensor, ...]:
        ctx.save_for_backward(query, k, v)
        ctx.weighted = weighted
        return tuple(pool_segments(query, k.to(query.dtype), v.to(query.dtype), weighted=weighted))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_keys: Tensor, d_mass: Tensor, d_values: Tensor) -> tuple[Tensor | None, ...]:
        query, low_k, low_v = ctx.saved_tensors
        dtype, scale, size = query.dtype, query.shape[-1] ** -0.5, low_k.shape[-2]
        k = low_k.to(dtype)
        own, of_keys = (k @ torch.stack([scale * query, d_keys], dim=-1)).unbind(dim=-1)
        log_p = own.log_softmax(dim=-1)
        p, d_mass = log_p.exp(), d_mass.unsqueeze(-1)
        d_p = (low_v.to(dtype) @ d_values.unsqueeze(-1)).squeeze(-1)
        if ctx.weighted:  # k~ = sum p k, M = - sum p log p
            d_p = d_p + of_keys - d_mass * log_p
            d_own = p * (d_p - (p * d_p).sum(dim=-1, keepdim=True))
            share, d_query = p, 0
        else:  # k~ = mean of k, M = logsumexp - s q~.k~
            d_own = p * (d_p - (p * d_p).sum(dim=-1, keepdim=True) + d_mass)
            share, d_query = torch.full_like(p, 1 / size), -scale * d_mass * k.mean(dim=-2)
            d_keys = d_keys - scale * d_mass * query
        d_own = scale * d_own
        d_query = d_query + (d_own.unsqueeze(-2) @ k).squeeze(-2)
        # Outer products, in the precision of the result: the weights of the read meet its gradients so, too.
        d_k = torch.stack([share, d_own], dim=-1).to(low_k.dtype) @ torch.stack([d_keys, query], dim=-2).to(low_k.dtype)
        d_v = p.to(low_v.dtype).unsqueeze(-1) @ d_values.to(low_v.dtype).unsqueeze(-2)
        return d_query, d_k, d_v, None


def causal_landmarks(
    queries: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, *, count: int, weighted: bool = True
) -> Landmarks:
    """Landmarks of the first m = ``count`` of S segments. queries: (B, S, d), q~; k, v: (B, S * c, d); gamma: (B,).

    All is in float32 (float64 for float64 inputs) whatever the model's precision, but for B V (:func:`attend`).
    """
    size, scale = k.shape[1] // queries.shape[1], k.shape[2] ** -0.5
    with torch.autocast(k.device.type, enabled=False):
        # All segments and then the first m: slices of k and v would cost a zero-filled gradient each.
        pooled = pool_segments(queries, k.unflatten(1, (-1, size)), v.unflatten(1, (-1, size)), weighted=weighted)
        landmarks = Landmarks(*(x[:, :count] for x in pooled))
        if gamma is None:
            return landmarks
        queries = queries[:, :count]
        gathered = _gather(queries.to(k.dtype), k, v, size).to(queries.dtype)
        future = torch.ones(count, count, dtype=torch.bool, device=k.device).triu(1)
        core = scale * queries @ landmarks.keys.transpose(1, 2) + landmarks.mass.unsqueeze(1)
        core = core.masked_fill(future, -torch.inf).softmax(dim=2)
        g = gamma.to(queries.dtype)[:, None, None]
        system = g * torch.eye(count, dtype=g.dtype, device=g.device) + (1 - g) * core
        right = g * landmarks.values + (1 - g) * gathered
        return landmarks._replace(values=torch.linalg.solve_triangular(system, right, upper=False))


def _gather(query: Tensor, k: Tensor, v: Tensor, segment_length: int) -> Tensor:
    """B V: landmark queries (B, m, d) over the tokens of all segments up to their own.

    In slabs of landmarks: what lies beyond a slab is neither computed nor masked, and no mask is larger than a slab.
    """
    count = query.shape[1]
    parts = []
    for first in range(0, count, _SLAB):
        last = min(first + _SLAB, count)
        visible = last * segment_length
        segment_of = torch.arange(visible, device=query.device) // segment_length
        mask = segment_of <= torch.arange(first, last, device=query.device)[:, None]
        part = attend(query[None, :, first:last], k[None, :, :visible], v[None, :, :visible], mask)
        parts.append(part.squeeze(0))
    return torch.cat(parts, dim=1)


def next_value(
    query: Tensor, pooled: Tensor, known: Landmarks, k: Tensor, v: Tensor, number: Tensor, gamma: Tensor
) -> Tensor:
    """W of one landmark more for each of R rows, by forward substitution: (R, H, d).

    ``query``, ``pooled``: (R, H, d), q~ and P, in at least float32. ``known``: (R, H, n, ...). Its landmarks up to the
    new one, ``number`` (R,), have keys and mass; those before it have values too. ``k``, ``v``: (R, H, n * c, d).
    ``gamma``: (H,).
    """
    count, gamma, number = known.keys.shape[2], gamma.to(query.dtype)[:, None], number[:, None, None]
    core = query.shape[-1] ** -0.5 * (known.keys.to(query.dtype) @ query.unsqueeze(-1)).squeeze(-1) + known.mass
    order = torch.arange(count, device=query.device)
    core = core.masked_fill(order > number, -torch.inf).softmax(dim=-1)
    own = core.gather(-1, number.expand(-1, core.shape[1], -1))
    earlier = (core.masked_fill(order >= number, 0).unsqueeze(-2) @ known.values.to(query.dtype)).squeeze(-2)
    visible = (order <= number).repeat_interleave(k.shape[2] // count, dim=-1).unsqueeze(1)
    gathered = attend(query.unsqueeze(-2).to(k.dtype), k, v, visible).squeeze(-2).to(query.dtype)
    return (gamma * pooled + (1 - gamma) * (gathered - earlier)) / (gamma + (1 - gamma) * own)
