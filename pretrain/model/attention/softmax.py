"""Softmax attention as PyTorch has it: exact attention, the baseline, and the rectangular pieces of the Nystrom
forms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.attention.blockwise import Window
from pretrain.model.attention.layout import Rectangle
from pretrain.model.compute import at_least_float32, device_type


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, *, causal: bool) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` (Vaswani et al. 2017, equation 1), all (R, H, L, d).

    Under ``causal`` a padded rectangle needs no mask: padding is on the right, where no real token looks.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=rectangle.mask, is_causal=causal)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention where the queries or the keys are few; mask broadcasts to (R, H, queries, keys), True = seen.

    Which form runs where: on a GPU the fused kernel. On a CPU the fused kernel in float32, and in bfloat16 the plain
    product, whose logits are rounded to bfloat16. Where the queries are the few ones, a CPU runs a loop over heads
    whose weights stay in the cache. Measured at n = 4096 with 12 heads, 64 queries, one thread, forward and backward in
    one interleaved run: 45 ms against 52 for the fused kernel in float32. In bfloat16 it was 28 against 42, and 53 for
    the plain product. float16 always takes the fused kernel, whose logits are float32: a logit may exceed 65504.
    """
    if not torch.compiler.is_compiling() and device_type(q) == "cpu" and q.dtype != torch.float16:
        if mask is None and k.shape[2] >= 4 * q.shape[2]:
            with torch.autocast("cpu", enabled=False):
                return _FewQueries.apply(q, k, v)
        if q.dtype == torch.bfloat16:
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            if mask is not None:
                logits = logits.masked_fill(~mask, float("-inf"))
            return logits.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class _FewQueries(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v head by head, the weights in one buffer and computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        logits, weights = (q.new_empty(q.shape[2], k.shape[2]) for _ in range(2))
        for row in range(q.shape[0]):
            for head in range(q.shape[1]):
                at = (row, head)
                torch.mm(q[at], k[at].t(), out=logits)
                torch.softmax(logits, 1, out=weights)
                torch.mm(weights, v[at], out=out[at])
        ctx.save_for_backward(q, k, v)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v = ctx.saved_tensors
        grad = grad.to(q.dtype).contiguous()
        d_q, d_k, d_v = torch.empty_like(grad), torch.empty_like(k), torch.empty_like(v)
        logits, weights, d_logits = (q.new_empty(q.shape[2], k.shape[2]) for _ in range(3))
        for row in range(q.shape[0]):
            for head in range(q.shape[1]):
                at = (row, head)
                torch.mm(q[at], k[at].t(), out=logits)
                torch.softmax(logits, 1, out=weights)
                d_v[at] = weights.t() @ grad[at]
                d_weights = torch.mm(grad[at], v[at].t(), out=logits)
                torch._softmax_backward_data(d_weights, weights, 1, weights.dtype, grad_input=d_logits)
                torch.mm(d_logits, k[at], out=d_q[at])
                d_k[at] = d_logits.t() @ q[at]
        return d_q * q.shape[-1] ** -0.5, d_k, d_v


def segment_means(x: Tensor, size: int) -> Tensor:
    """Means over consecutive segments: (R, H, m * size, d) -> (R, H, m, d), in at least float32.

    As a product with a row of equal weights, over the memory as the projections leave it, (R, L, H * d). At n = 4096
    with 12 heads, forward and backward take 1.9 ms against 4.6 for ``mean`` in float32. 16 bits are widened before the
    sum: a sum in them has an error of 1.6e-3, and in float16 it may overflow.
    """
    rows, heads, length, width = x.shape
    power = 2.0 ** (size.bit_length() - 1)
    natural = x.transpose(1, 2).reshape(rows * length // size, size, heads * width).to(at_least_float32(x.dtype))
    means = (natural.new_full((1, size), 1 / power) @ natural) * (power / size)
    return means.view(rows, length // size, heads, width).transpose(1, 2)


def window_attention(q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, window: Window) -> Tensor:
    """Bidirectional attention to near tokens only: those of the own segment and of w - 1 on both sides. The ablation
    that shows what landmarks see beyond it. All (R, H, L, d)."""
    size, back, length = window.segment_length, window.segments - 1, q.shape[2]
    segments = (length + size - 1) // size
    end = segments * size - length
    q = F.pad(q, (0, 0, 0, end)).unflatten(2, (segments, size))
    k, v = (_spans(F.pad(x, (0, 0, back * size, end + back * size)), size, 2 * back + 1, segments) for x in (k, v))
    real = rectangle.mask
    if real is None:
        real = torch.ones(1, 1, 1, length, dtype=torch.bool, device=q.device)
    real = F.pad(real.transpose(2, 3), (0, 0, back * size, end + back * size))
    seen = _spans(real, size, 2 * back + 1, segments).transpose(3, 4)  # (1 or R, 1, segments, 1, keys)
    rows = q.shape[0]
    seen = seen | ~seen.any(dim=4, keepdim=True)  # padding with nothing real near: anything but a softmax of nothing
    # Rows and heads in one axis, segments in the other: fused kernels take four axes.
    seen = seen.expand(rows, q.shape[1], *seen.shape[2:]).flatten(0, 1)
    out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=seen)
    return out.unflatten(0, (rows, -1)).flatten(2, 3)[:, :, :length]


def _spans(x: Tensor, size: int, count: int, segments: int) -> Tensor:
    """Each segment with those after it: (R, H, (segments + count - 1) * size, d) -> (R, H, segments, count * size,
    d)."""
    x = x.unflatten(2, (-1, size))
    return torch.cat([x[:, :, i : i + segments] for i in range(count)], dim=3)
