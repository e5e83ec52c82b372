"""Bidirectional Nystrom attention (Xiong et al. 2021, arXiv 2102.03902, equations 10 to 14), linear in the length.

With Q~ and K~ the means of Q and K over m segments and s = d^-1/2:

    softmax(s Q K~^T) . pinv(softmax(s Q~ K~^T)) . softmax(s Q~ K^T) V

No (n, m) matrix has to be held: the expression is two ordinary attentions with a small product between them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.attention.inverse import Init, iterative_inverse
from pretrain.model.attention.kept_nystrom import Inverse, kept_nystrom
from pretrain.model.attention.landmarks import landmark_means, segments_of
from pretrain.model.attention.layout import Rectangle
from pretrain.model.attention.softmax import attend, softmax_attention
from pretrain.model.compute import at_least_float32, device_type
from pretrain.model.conv import skip_convolution


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rectangle: Rectangle,
    *,
    num_landmarks: int,
    iterations: int = 6,
    init: Init = "block",
    conv_weight: Tensor | None = None,
) -> Tensor:
    """Attention of every token to every token of its sequence through m = ``num_landmarks`` landmarks.

    q, k, v: (R, H, L, d); returns (R, H, L, d) in their precision. A sequence of n >= 2 m tokens has m segments
    (:func:`even_segments`). A shorter one gets exact softmax attention: its 4 n h operations per token are fewer than
    the 8 m h of two landmark products, and it has no error. The landmark matrix and its inverse are computed in float32
    (float64 for float64 inputs) whatever the model's precision, also under autocast: in bfloat16 the iteration
    diverges. With ``conv_weight`` (H, 1, k, 1) the skip convolution of v is added.

    On a CPU in float32 and float64 all of it is one function (:mod:`pretrain.model.attention.kept_nystrom`).
    """
    exact = rectangle.longest < 2 * num_landmarks
    on_cpu = device_type(q) == "cpu" and q.dtype in (torch.float32, torch.float64)
    if on_cpu and not exact and not torch.compiler.is_compiling():
        taps = None if conv_weight is None else conv_weight[:, 0, :, 0]
        return kept_nystrom(q, k, v, rectangle, Inverse(num_landmarks, iterations, init), taps)
    if exact:
        out = softmax_attention(q, k, v, rectangle, causal=False)
    else:
        out = two_attentions(q, k, v, rectangle, num_landmarks=num_landmarks, iterations=iterations, init=init)
    if conv_weight is None:
        return out
    return out + skip_convolution(v, conv_weight, causal=False, mask=rectangle.mask)


def two_attentions(
    q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, *, num_landmarks: int, iterations: int, init: Init
) -> Tensor:
    """:func:`nystrom_attention` of longer sequences on any device, in any precision, also compiled."""
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
    sizes = segments_of(q, rectangle, num_landmarks).sizes
    mass = sizes[:, None, None].to(at_least_float32(q.dtype)).log()  # (R, 1, 1, m)
    if mass.dtype != q.dtype:  # only ratios count: as zeros, equal sizes survive the rounding to 16 bits
        mass = mass - mass.amax(dim=-1, keepdim=True)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mass.to(q.dtype))
