"""Attention in 16 bits against float64 on the same 16-bit inputs, beside PyTorch's exact attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.attention.blockwise import Window
from pretrain.model.attention.causal_nystrom import causal_nystrom_attention
from pretrain.model.attention.inverse import iterative_inverse
from pretrain.model.attention.landmarks import landmark_means
from pretrain.model.attention.layout import Rectangle
from pretrain.model.attention.nystrom import nystrom_attention, pooled_attention

DEVIATIONS = (1, 20)
"""Standard deviations of the logits of random inputs."""
TITLES = {
    "exact-causal": "exact, causal (PyTorch)",
    "causal": "causal, landmarks",
    "causal-inverse": "causal, triangular inverse",
    "causal-16-bits": "causal, all in 16 bits",
    "exact": "exact, masked (PyTorch)",
    "masked": "masked",
    "masked-fused": "masked, both products in the fused kernel",
    "masked-pooled": "masked, no inverse",
}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def forms(landmarks: int, window: Window) -> dict[str, Attention]:
    """What is measured, (1, H, n, d) to (1, H, n, d), by the names of :data:`TITLES`."""

    def inverse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        gamma = torch.full((q.shape[1],), 0.75, dtype=wide, device=q.device)
        return causal_nystrom_attention(q, k, v, window=window, gamma=gamma)

    def whole(q: Tensor) -> Rectangle:
        return Rectangle(q.shape[2], q.shape[2])

    return {
        "exact-causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "causal": lambda q, k, v: causal_nystrom_attention(q, k, v, window=window),
        "causal-inverse": inverse,
        "causal-16-bits": lambda q, k, v: written_out(q, k, v, window),
        "exact": F.scaled_dot_product_attention,
        "masked": lambda q, k, v: nystrom_attention(q, k, v, whole(q), num_landmarks=landmarks),
        "masked-fused": lambda q, k, v: masked_fused(q, k, v, landmarks),
        "masked-pooled": lambda q, k, v: pooled_attention(q, k, v, whole(q), num_landmarks=landmarks),
    }


def written_out(q: Tensor, k: Tensor, v: Tensor, window: Window) -> Tensor:
    """The causal form with pooled values, every step in the inputs' own precision; n a multiple of the segment."""
    size, length, scale = window.segment_length, q.shape[2], q.shape[3] ** -0.5
    own_k, own_v = (x.unflatten(2, (-1, size)) for x in (k, v))
    queries = q.unflatten(2, (-1, size)).mean(dim=3)
    log_p = (scale * (own_k @ queries.unsqueeze(-1)).squeeze(-1)).log_softmax(dim=-1)  # (1, H, S, c)
    p = log_p.exp()
    keys, values = ((p.unsqueeze(-2) @ x).squeeze(-2) for x in (own_k, own_v))
    mass = -(p * log_p).sum(dim=-1)
    token = torch.arange(length, device=q.device)
    segment = token // size
    first = segment - window.segments + 1  # of the segments that a token sees exactly
    near = (token <= token[:, None]) & (segment >= first[:, None])
    far = torch.arange(length // size, device=q.device) < first[:, None]
    logits = torch.cat([q @ k.transpose(2, 3) * scale, q @ keys.transpose(2, 3) * scale + mass.unsqueeze(2)], dim=3)
    weights = logits.masked_fill(~torch.cat([near, far], dim=1), float("-inf")).softmax(dim=-1)
    return weights @ torch.cat([v, values], dim=2)


def masked_fused(q: Tensor, k: Tensor, v: Tensor, landmarks: int) -> Tensor:
    """The masked form with PyTorch's fused kernel for both products, whose logits are float32."""
    rectangle, scale = Rectangle(q.shape[2], q.shape[2]), q.shape[3] ** -0.5
    q_means, k_means = (landmark_means(x, rectangle, landmarks) for x in (q, k))
    core = (scale * q_means @ k_means.transpose(2, 3)).softmax(dim=-1)
    gathered = F.scaled_dot_product_attention(q_means.to(q.dtype), k, v)
    values = iterative_inverse(core, 6) @ gathered.to(core.dtype)
    return F.scaled_dot_product_attention(q, k_means.to(q.dtype), values.to(v.dtype))


def errors(
    names: Sequence[str], length: int, *, width: int, heads: int, landmarks: int, window: Window, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """For each form and each of :data:`DEVIATIONS` the relative errors of the output and of the three gradients."""
    rows = []
    for deviation in DEVIATIONS:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, heads, length, width) for _ in range(3))
        scaled = (q * deviation**0.5, k * deviation**0.5, v, torch.randn(1, heads, length, width))
        low = [x.to(dtype) for x in scaled]
        for name in names:
            attention = forms(landmarks, window)[name]
            pairs = zip(_run(attention, *low), _run(attention, *(x.double() for x in low)), strict=True)
            found = [float((got.double() - right).norm() / right.norm()) for got, right in pairs]
            rows.append(
                {"form": name, "deviation": deviation, **dict(zip(("out", "dq", "dk", "dv"), found, strict=True))}
            )
    return rows


def _run(attention: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]
