"""One softmax over landmarks and a sliding window of tokens, in chunks of segments, linear in memory.

Written with ``matmul`` and ``softmax`` over the whole sequence and left to autograd, the (n, m + w c) weights are kept
three times over for the backward pass, and the passes over them take most of the time. Here a chunk's weights stay in
the cache, landmarks that no query of the chunk sees are skipped, and the backward pass computes the weights again, so
nothing of that size is kept (forward and backward of this read, 4 heads of 64, n = 4096, c = 32, w = 2, one thread: 0.6
of the time of the whole-sequence form; the same chunks left to autograd take the same time and keep all weights).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Window(NamedTuple):
    """A token of segment i sees tokens of segments i - w + 1 to i up to itself, and landmarks 0 to i - w."""

    segment_length: int
    """c."""
    segments: int
    """w."""


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, far_bias: Tensor, window: Window
) -> Tensor:
    """Softmax attention, logits scaled by d^-1/2, of every token to its window and to the landmarks before it.

    q, k, v: (B, S * c, d). far_k, far_v: (B, m, d), m = S - w > 0 landmarks, in q's dtype. far_bias: (B, m), added to
    their logits, in float32 or float64. Returns (B, S * c, d) in q's dtype; logits and softmax are in at least float32.
    Differentiable once.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _Blockwise.apply(q, k, v, far_k, far_v, far_bias, window)


# Weights of a chunk, in elements: a CPU wants them in its second-level cache, a GPU wants few launches.
_CHUNK_ELEMENTS = {"cpu": 2**19}
_CHUNK_ELEMENTS_GPU = 2**26


def _chunks(q: Tensor, far_k: Tensor, window: Window) -> list[tuple[int, int]]:
    size, back = window
    segments, columns = q.shape[1] // size, far_k.shape[1] + back * size
    limit = _CHUNK_ELEMENTS.get(q.device.type, _CHUNK_ELEMENTS_GPU)
    step = min(segments, max(1, limit // (q.shape[0] * size * columns)))
    return [(first, min(first + step, segments)) for first in range(0, segments, step)]


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, far_bias: Tensor, window: Window
    ) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for first, last in _chunks(q, far_k, window):
            rows = slice(first * window.segment_length, last * window.segment_length)
            weights, visible, _ = _weights(q[:, rows] * q.shape[2] ** -0.5, k, far_k, far_bias, window, first, last)
            weights = weights.to(q.dtype)
            part = (weights[..., visible:] @ _windows(v, window, first, last)).flatten(1, 2)
            if visible:
                part += weights[..., :visible].flatten(1, 2) @ far_v[:, :visible]
            out[:, rows] = part
        ctx.save_for_backward(q, k, v, far_k, far_v, far_bias)
        ctx.window = window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            q, k, v, far_k, far_v, far_bias = ctx.saved_tensors
            return (*_backward(grad, q, k, v, far_k, far_v, far_bias, ctx.window), None)


def _weights(
    q: Tensor, k: Tensor, far_k: Tensor, far_bias: Tensor, window: Window, first: int, last: int
) -> tuple[Tensor, int, Tensor]:
    """For segments [first, last), whose scaled queries are q (B, count * c, d): the softmax weights (B, count, c,
    visible + w c) of landmarks and window in at least float32, how many landmarks some of them sees, and the windows'
    keys."""
    dtype = far_bias.dtype
    size, back = window.segment_length, (window.segments - 1) * window.segment_length
    count, visible = last - first, max(last - window.segments, 0)
    segment = torch.arange(first, last, device=q.device)

    keys = _windows(k, window, first, last)
    near = (q.view(-1, count, size, q.shape[2]) @ keys.transpose(2, 3)).to(dtype)
    column = torch.arange(back + size, device=q.device)
    hidden = column > torch.arange(size, device=q.device)[:, None] + back
    if first < window.segments - 1:
        hidden = hidden | (column + segment[:, None, None] * size - back < 0)  # before the sequence's start
    near += torch.zeros(hidden.shape, dtype=dtype, device=q.device).masked_fill_(hidden, -torch.inf)
    if not visible:
        return near.softmax(dim=3), visible, keys

    far = (q @ far_k[:, :visible].transpose(1, 2)).to(dtype).view(-1, count, size, visible)
    hidden = torch.arange(visible, device=q.device) > segment[:, None] - window.segments
    far += far_bias[:, None, :visible].masked_fill(hidden, -torch.inf).unsqueeze(2)
    return torch.cat([far, near], dim=3).softmax(dim=3), visible, keys


def _windows(x: Tensor, window: Window, first: int, last: int) -> Tensor:
    """(B, S * c, d) -> (B, count, w * c, d): for each of segments [first, last) the tokens of the w - 1 segments before
    and then its own; zeros before the sequence's start."""
    size, back, count = window.segment_length, window.segments - 1, last - first
    part = x[:, max(first - back, 0) * size : last * size]
    if first < back:
        part = F.pad(part, (0, 0, (back - first) * size, 0))
    part = part.unflatten(1, (count + back, size))
    return torch.cat([part[:, i : i + count] for i in range(window.segments)], dim=2)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, far_bias: Tensor, window: Window
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, far_k, far_v, far_bias; sums over chunks are kept in at least float32."""
    size, back, scale = window.segment_length, window.segments - 1, q.shape[2] ** -0.5
    d_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    padded = (k.shape[0], k.shape[1] // size + back, size, k.shape[2])  # room for what falls before the start
    d_k, d_v = k.new_zeros(padded), v.new_zeros(padded)
    d_bias = torch.zeros_like(far_bias)
    d_far_k, d_far_v = (torch.zeros(x.shape, dtype=far_bias.dtype, device=x.device) for x in (far_k, far_v))

    for first, last in _chunks(q, far_k, window):
        rows = slice(first * size, last * size)
        part, d_out = q[:, rows] * scale, grad[:, rows].contiguous()
        weights, visible, keys = _weights(part, k, far_k, far_bias, window, first, last)
        by_segment = (-1, last - first, size, q.shape[2])

        d_weights = d_out.view(by_segment) @ _windows(v, window, first, last).transpose(2, 3)
        if visible:
            d_far = (d_out @ far_v[:, :visible].transpose(1, 2)).view_as(weights[..., :visible])
            d_weights = torch.cat([d_far, d_weights], dim=3)
        d_weights = d_weights.to(weights.dtype)
        d_logits = weights * (d_weights - (weights * d_weights).sum(dim=3, keepdim=True))
        low, d_low = weights.to(q.dtype), d_logits.to(q.dtype)

        near, d_near = low[..., visible:], d_low[..., visible:]
        d_part = (d_near @ keys).flatten(1, 2)
        d_keys, d_values = d_near.transpose(2, 3) @ part.view(by_segment), near.transpose(2, 3) @ d_out.view(by_segment)
        for i in range(window.segments):
            to, of = slice(first + i, last + i), slice(i * size, (i + 1) * size)
            d_k[:, to] += d_keys[:, :, of]
            d_v[:, to] += d_values[:, :, of]
        if visible:
            far, d_far = low[..., :visible].flatten(1, 2), d_low[..., :visible].flatten(1, 2)
            d_part += d_far @ far_k[:, :visible]
            d_far_k[:, :visible] += d_far.transpose(1, 2) @ part
            d_far_v[:, :visible] += far.transpose(1, 2) @ d_out
            d_bias[:, :visible] += d_logits[..., :visible].sum(dim=(1, 2))
        d_q[:, rows] = d_part * scale

    d_k, d_v = (x[:, back:].flatten(1, 2) for x in (d_k, d_v))
    return d_q, d_k, d_v, d_far_k.to(far_k.dtype), d_far_v.to(far_v.dtype), d_bias
