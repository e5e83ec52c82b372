"""Softmax attention as PyTorch has it: exact attention, the baseline, and the rectangular pieces of the Nystrom
forms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
