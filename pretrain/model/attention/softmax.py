"""Softmax attention as PyTorch has it: exact attention, the baseline, and the rectangular pieces of the Nystrom
forms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.attention.blockwise import Window
from pretrain.model.attention.layout import Rectangle


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, *, causal: bool) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` (Vaswani et al. 2017, equation 1), all (R, H, L, d).

    Under ``causal`` a padded rectangle needs no mask: padding is on the right, where no real token looks.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=rectangle.mask, is_causal=causal)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention where the queries or the keys are few; mask broadcasts to (R, H, queries, keys), True = seen.

    On a CPU below float32 the plain product is faster than the fused kernel (forward and backward of the whole
    attention relative to exact attention, n = 1024: 0.30 against 0.39; n = 4096: 0.07 against 0.08; one thread, torch
    2.13); everywhere else the fused kernel is as fast or faster and keeps no (n, m) matrix for the backward pass.
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        return logits.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def window_attention(q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, window: Window) -> Tensor:
    """Bidirectional attention to near tokens only: those of the own segment and of w - 1 on both sides. The ablation
    that shows what landmarks see beyond it. All (R, H, L, d)."""
    size, back, length = window.segment_length, window.segments - 1, q.shape[2]
    segments = -(-length // size)
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
