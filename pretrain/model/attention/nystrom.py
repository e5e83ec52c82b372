"""Bidirectional Nystrom attention (Xiong et al. 2021, arXiv 2102.03902, equations 10 to 14), linear in the length.

With Q~ and K~ the means of Q and K over m segments and s = d^-1/2:

    softmax(s Q K~^T) . pinv(softmax(s Q~ K~^T)) . softmax(s Q~ K^T) V

No (n, m) matrix has to be held: the expression is two ordinary attentions with a small product between them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.attention.layout import Rectangle, Segments, even_segments
from pretrain.model.attention.softmax import attend, segment_means, softmax_attention
from pretrain.model.compute import at_least_float32


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rectangle: Rectangle,
    *,
    num_landmarks: int,
    iterations: int = 6,
    init: Literal["block", "original"] = "block",
) -> Tensor:
    """Attention of every token to every token of its sequence through m = ``num_landmarks`` landmarks.

    q, k, v: (R, H, L, d); returns (R, H, L, d) in their precision. A sequence of n >= 2 m tokens has m segments
    (:func:`even_segments`). A shorter one gets exact softmax attention: its 4 n h operations per token are fewer than
    the 8 m h of two landmark products, and it has no error. The landmark matrix and its inverse are computed in float32
    (float64 for float64 inputs) whatever the model's precision, also under autocast: in bfloat16 the iteration
    diverges.
    """
    if rectangle.longest < 2 * num_landmarks:
        return softmax_attention(q, k, v, rectangle, causal=False)

    scale = q.shape[-1] ** -0.5
    q_landmarks = landmark_means(q, rectangle, num_landmarks)
    k_landmarks = landmark_means(k, rectangle, num_landmarks)
    with torch.autocast(q.device.type, enabled=False):
        core = (scale * q_landmarks @ k_landmarks.transpose(-1, -2)).softmax(dim=-1)
        inverse = iterative_inverse(core, iterations, init)

    gathered = attend(q_landmarks.to(q.dtype), k, v, rectangle.mask)
    with torch.autocast(q.device.type, enabled=False):
        values = (inverse @ gathered.to(inverse.dtype)).to(v.dtype)
    return attend(q, k_landmarks.to(q.dtype), values)


def pooled_attention(q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, *, num_landmarks: int) -> Tensor:
    """Softmax attention of every token to the mean key and value of each segment, no inverse: the ablation.

    A landmark weighs what its tokens weigh: the logarithm of their number is added to its logit. Sequences of at most m
    tokens get exact softmax attention: the cheaper one of the two up to there. Shapes as :func:`nystrom_attention`.
    """
    if rectangle.longest <= num_landmarks:
        return softmax_attention(q, k, v, rectangle, causal=False)
    keys, values = (landmark_means(x, rectangle, num_landmarks).to(q.dtype) for x in (k, v))
    sizes = _segments(q, rectangle, num_landmarks).sizes
    mass = sizes[:, None, None].to(at_least_float32(q.dtype)).log()  # (R, 1, 1, m)
    if mass.dtype != q.dtype:  # only ratios count: as zeros, equal sizes survive the rounding to 16 bits
        mass = mass - mass.amax(dim=-1, keepdim=True)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mass.to(q.dtype))


def landmark_means(x: Tensor, rectangle: Rectangle, num_landmarks: int) -> Tensor:
    """(R, H, L, d) -> (R, H, m, d) means over each sequence's m segments, in at least float32."""
    rows, heads, length, width = x.shape
    with torch.autocast(x.device.type, enabled=False):
        if rectangle.segments is None and length % num_landmarks == 0:
            return segment_means(x, length // num_landmarks)
        tokens, sizes = _segments(x, rectangle, num_landmarks)
        at = tokens + length * torch.arange(rows, device=x.device)[:, None, None]
        taken = x.transpose(1, 2).reshape(rows * length, heads * width).index_select(0, at.flatten())
        real = torch.arange(tokens.shape[2], device=x.device) < sizes.unsqueeze(2)
        dtype = at_least_float32(x.dtype)
        weights = (real / sizes.unsqueeze(2).to(dtype)).expand(rows, -1, -1).flatten(0, 1).unsqueeze(1)
        means = weights @ taken.view(rows * num_landmarks, -1, heads * width).to(dtype)
        return means.view(rows, num_landmarks, heads, width).transpose(1, 2)


def _segments(x: Tensor, rectangle: Rectangle, num_landmarks: int) -> Segments:
    """Those of ``rectangle``; where that is full, of one row for all."""
    if rectangle.segments is not None:
        return rectangle.segments
    length = x.shape[2]
    return even_segments(torch.full((1,), length, device=x.device), num_landmarks, length)


def iterative_inverse(matrix: Tensor, iterations: int, init: Literal["block", "original"] = "block") -> Tensor:
    """Approximate Moore-Penrose inverse of row-stochastic matrices (paper, equation 14; Razavi et al. 2014).

    ``matrix``: (R, H, m, m). ``init``: ``block`` starts from A^T / (largest column sum of that matrix). ``original``,
    the published code's choice, takes the largest column sum of the whole batch; a sequence's result then depends on
    its batch mates. (The largest row sum, the other factor of the starting scale, is 1 for a softmax.)

    Six steps are a regulariser, not an approximation to be improved: at 6, 12 and 20 the gradient's norm is 1e3, 5e5
    and 8e7. A trained network is adapted to its own count.

    After six, a matrix whose A Z is a projection up to rounding keeps its Z. What rounding leaves of Z in the null
    space of A grows by 13/4 with every step: 50 steps on equal rows gave NaN in float32.
    """
    a = matrix.flatten(0, 1)
    column_sums = a.sum(dim=-2)
    largest = column_sums.amax() if init == "original" else column_sums.amax(dim=-1)[:, None, None]
    z = a.transpose(-1, -2) / largest
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    for step in range(iterations):
        az = a @ z
        done = None if step < _ALWAYS else _is_projection(az.detach(), z.detach())
        inner = torch.baddbmm(eye, az, 7 * eye - az, beta=15, alpha=-1)
        inner = torch.baddbmm(eye, az, inner, beta=13, alpha=-1)
        new = 0.25 * z @ inner
        z = new if done is None else torch.where(done, z, new)
    return z.view_as(matrix)


_ALWAYS = 6
"""Steps that are made without a look at the residual: the default and the paper's count."""


def _is_projection(az: Tensor, z: Tensor) -> Tensor:
    """(B, 1, 1) bool: A Z A Z = A Z but for rounding, at most eps * max |Z| in a row-stochastic A times Z."""
    residual = (az @ az - az).abs().amax(dim=(1, 2), keepdim=True)
    return residual <= 4 * torch.finfo(z.dtype).eps * z.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1)
