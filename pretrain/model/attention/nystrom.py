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

from pretrain.model.attention.layout import Rectangle
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
    """Attention of every token to every token of its sequence through at most m = ``num_landmarks`` landmarks.

    q, k, v: (R, H, L, d); returns (R, H, L, d) in their precision. A sequence of n > m tokens has segments of
    ``ceil(n / m)`` tokens, the last one possibly short; one of n <= m tokens gets exact softmax attention. The landmark
    matrix and its inverse are computed in float32 (float64 for float64 inputs) whatever the model's precision, also
    under autocast: in bfloat16 the iteration diverges.
    """
    if rectangle.longest <= num_landmarks:
        return softmax_attention(q, k, v, rectangle, causal=False)

    scale = q.shape[-1] ** -0.5
    q_landmarks = landmark_means(q, rectangle, num_landmarks)
    k_landmarks = landmark_means(k, rectangle, num_landmarks)
    present = None  # (R, 1, 1, m), which landmarks a sequence has
    if rectangle.landmark_sizes is not None:
        present = rectangle.landmark_sizes.transpose(-1, -2) > 0

    with torch.autocast(q.device.type, enabled=False):
        logits = scale * q_landmarks @ k_landmarks.transpose(-1, -2)
        if present is None:
            core = logits.softmax(dim=-1)
        else:
            # Absent landmarks become a block of the identity. Its row and column sums are 1, never above those of a
            # softmax matrix, so it changes neither the starting scale nor, being a block of its own, anything else.
            core = logits.masked_fill(~present, float("-inf")).softmax(dim=-1)
            both = present & present.transpose(-1, -2)
            core = torch.where(both, core, torch.eye(core.shape[-1], dtype=core.dtype, device=core.device))
        inverse = iterative_inverse(core, iterations, init)

    gathered = attend(q_landmarks.to(q.dtype), k, v, rectangle.mask)
    with torch.autocast(q.device.type, enabled=False):
        values = (inverse @ gathered.to(inverse.dtype)).to(v.dtype)
    return attend(q, k_landmarks.to(q.dtype), values, present)


def pooled_attention(q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, *, num_landmarks: int) -> Tensor:
    """Softmax attention of every token to the mean key and value of each segment, no inverse: the ablation.

    A landmark weighs what its tokens weigh: the logarithm of their number is added to its logit. Shapes as
    :func:`nystrom_attention`.
    """
    if rectangle.longest <= num_landmarks:
        return softmax_attention(q, k, v, rectangle, causal=False)
    keys, values = (landmark_means(x, rectangle, num_landmarks).to(q.dtype) for x in (k, v))
    if rectangle.landmark_sizes is not None:
        sizes = rectangle.landmark_sizes.transpose(-1, -2)  # (R, 1, 1, m), 0 for absent landmarks
    else:
        segment = -(-q.shape[2] // num_landmarks)
        sizes = torch.full((1, keys.shape[2]), float(segment), device=q.device)
        sizes[0, -1] = q.shape[2] - (keys.shape[2] - 1) * segment
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=sizes.log().to(q.dtype))


def landmark_means(x: Tensor, rectangle: Rectangle, num_landmarks: int) -> Tensor:
    """(R, H, L, d) -> (R, H, m, d) means over each sequence's segments, in at least float32."""
    with torch.autocast(x.device.type, enabled=False):
        if rectangle.pooling is not None and rectangle.landmark_sizes is not None:
            sums = (rectangle.pooling.to(x.dtype) @ x).to(at_least_float32(x.dtype))
            return sums / rectangle.landmark_sizes.to(sums.dtype).clamp(min=1)

        length = x.shape[2]
        segment = -(-length // num_landmarks)
        whole = length // segment * segment
        means = segment_means(x[:, :, :whole], segment)
        if whole == length:
            return means
        return torch.cat([means, segment_means(x[:, :, whole:], length - whole)], dim=2)


def iterative_inverse(matrix: Tensor, iterations: int, init: Literal["block", "original"] = "block") -> Tensor:
    """Approximate Moore-Penrose inverse of row-stochastic matrices (paper, equation 14; Razavi et al. 2014).

    ``matrix``: (R, H, m, m). ``init``: ``block`` starts from A^T / (largest column sum of that matrix). ``original``,
    the published code's choice, takes the largest column sum of the whole batch; a sequence's result then depends on
    its batch mates. (The largest row sum, the other factor of the starting scale, is 1 for a softmax.)

    Six steps are a regulariser, not an approximation to be improved: at 6, 12 and 20 the gradient's norm is 1e3, 5e5
    and 8e7. A trained network is adapted to its own count.
    """
    a = matrix.flatten(0, 1)
    column_sums = a.sum(dim=-2)
    largest = column_sums.amax() if init == "original" else column_sums.amax(dim=-1)[:, None, None]
    z = a.transpose(-1, -2) / largest
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    for _ in range(iterations):
        az = a @ z
        inner = torch.baddbmm(eye, az, 7 * eye - az, beta=15, alpha=-1)
        inner = torch.baddbmm(eye, az, inner, beta=13, alpha=-1)
        z = 0.25 * z @ inner
    return z.view_as(matrix)
