"""Causal Nystrom attention: exact inside a window, landmarks of completed segments beyond it, one softmax over both.

Masking the three matrices of the bidirectional form leaks: a landmark is a mean over a segment, so it holds its own
segment's future. Here the sequence is cut into segments of a fixed c tokens, and with s = d^-1/2

* a token sees exactly the tokens of its own segment up to itself and of the w - 1 segments before;
* it sees every completed segment j farther back through one key k~_j, with logit ``s q.k~_j + M_j`` and value W_j, in
  the same softmax. k~_j and q~_j are the segment's means;
* M_j = logsumexp_(t in j)(s q~_j.k_t) - s q~_j.k~_j is the segment's mass as its own landmark query sees it (log c if
  its keys are alike), so that a landmark weighs what its tokens weigh;
* W is the Nystrom core at landmark level, where causality is triangular:

      A[i,j] = softmax over j <= i of (s q~_i.k~_j + M_j)
      (B V)[i] = softmax over the tokens of segments <= i of (s q~_i.k) V
      P[i]     = softmax over the tokens of segment i of (s q~_i.k) V
      W = (g I + (1 - g) A)^-1 (g P + (1 - g) B V)

  The inverse of a lower triangular matrix is lower triangular: W_j depends on segments <= j only. g = 0 is plain
  Nystrom and explodes (relative error 377 on smooth inputs, against 0.12); for g > 1/2 the inverse is bounded by 1 / (2
  g - 1) in the maximum norm, whatever the data. g = 1 is pooling, W = P.

The segment length is a number of the model and never derived from the row, so a prefix's outputs are the whole's.
Padding on the right is in every real token's future and needs no mask. :func:`summarize` and the read in
:func:`causal_nystrom_attention` are separate so that decoding can keep landmarks and append to them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.attention.blockwise import Window, blockwise_attention
from pretrain.model.attention.softmax import attend

_SLAB = 128
"""Landmarks that gather at a time: enough to keep a fused kernel busy."""


class Landmarks(NamedTuple):
    """What stands for m completed segments, for each of B heads of all rows."""

    keys: Tensor
    """(B, m, d), k~, in float32 or more."""
    mass: Tensor
    """(B, m), M, in float32 or more."""
    values: Tensor
    """(B, m, d), W, in float32 or more."""


def causal_nystrom_attention(
    q: Tensor, k: Tensor, v: Tensor, *, segment_length: int, window_segments: int, gamma: Tensor | None
) -> Tensor:
    """Attention of every token to those before it. q, k, v: (R, H, n, d) for any n; returns (R, H, n, d).

    gamma: (H,) in (1/2, 1], or None for 1. A sequence of up to ``window_segments`` segments gets exact causal
    attention.
    """
    rows, heads, length, _ = q.shape
    if length <= window_segments * segment_length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    segments = -(-length // segment_length)
    if segments * segment_length > length:  # zeros in the last segment: no landmark, and in the future of all
        q, k, v = (F.pad(x, (0, 0, 0, segments * segment_length - length)) for x in (q, k, v))
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    gamma = None if gamma is None else gamma.repeat(rows)
    far = summarize(q, k, v, segment_length=segment_length, count=segments - window_segments, gamma=gamma)
    window = Window(segment_length, window_segments)
    out = blockwise_attention(q, k, v, far.keys.to(q.dtype), far.values.to(v.dtype), far.mass, window)
    return out.unflatten(0, (rows, heads))[:, :, :length]


def summarize(q: Tensor, k: Tensor, v: Tensor, *, segment_length: int, count: int, gamma: Tensor | None) -> Landmarks:
    """Landmarks of the first m = ``count`` segments. q, k, v: (B, S * c, d); gamma: (B,) or None for 1.

    See the module's formulas for M, P, A, B and W. Means, M, A and the triangular solve are in float32 (float64 for
    float64 inputs) whatever the model's precision; what is big, (m, n), has the precision of its inputs and a float32
    softmax.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[2] ** -0.5
    with torch.autocast(q.device.type, enabled=False):
        # All segments and then the first m: slices of (B, S * c, d) would cost a zero-filled gradient each.
        k_segments, v_segments = k.unflatten(1, (-1, segment_length)), v.unflatten(1, (-1, segment_length))
        q_mean = q.unflatten(1, (-1, segment_length)).mean(dim=2, dtype=dtype)
        k_mean = k_segments.mean(dim=2, dtype=dtype)
        query = q_mean.to(q.dtype)

        own = scale * (k_segments @ query.unsqueeze(3)).squeeze(3).to(dtype)  # (B, S, c)
        mass = (own.logsumexp(dim=2) - scale * (q_mean * k_mean).sum(dim=2))[:, :count]
        pooled = (own.softmax(dim=2).to(v.dtype).unsqueeze(2) @ v_segments).squeeze(2).to(dtype)[:, :count]
        k_mean = k_mean[:, :count]
        if gamma is None:
            return Landmarks(k_mean, mass, pooled)

        q_mean, query = q_mean[:, :count], query[:, :count]
        gathered = _gather(query, k, v, segment_length).to(dtype)
        future = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(1)
        core = scale * q_mean @ k_mean.transpose(1, 2) + mass.unsqueeze(1)
        core = core.masked_fill(future, float("-inf")).softmax(dim=2)
        g = gamma.to(dtype)[:, None, None]
        system = g * torch.eye(count, dtype=dtype, device=q.device) + (1 - g) * core
        values = torch.linalg.solve_triangular(system, g * pooled + (1 - g) * gathered, upper=False)
    return Landmarks(k_mean, mass, values)


def _gather(query: Tensor, k: Tensor, v: Tensor, segment_length: int) -> Tensor:
    """B V: landmark queries (B, m, d) over the tokens of all segments up to their own, in slabs of landmarks, so that
    what lies beyond a slab is neither computed nor masked and no mask is larger than a slab."""
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
