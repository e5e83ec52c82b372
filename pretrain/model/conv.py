"""The skip convolution over values (Nystromformer, section 3.3): depthwise, one kernel for each head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.compute import device_type

_SIZE = 32
"""Tokens of a block of outputs on a CPU."""


def skip_convolution(v: Tensor, weight: Tensor, *, causal: bool, mask: Tensor | None = None) -> Tensor:
    """Convolve v (R, H, n, d) along n with ``weight`` (H, 1, k, 1), one kernel of k taps for the d columns of a head.

    Centred (k odd), or ``causal``: the last tap falls on the token itself. mask (R, 1, 1, n): tokens that count, the
    others are zeros as if the sequence ended there. Equal to ``conv2d`` with groups = heads and padding k // 2, or k -
    1 on the left.

    Computed as a banded Toeplitz matrix times blocks of tokens: more arithmetic than ``conv2d``, at the speed of a
    matrix product. Which blocks is the device's.
    """
    if mask is not None:
        v = v.masked_fill(~mask.transpose(-1, -2), 0.0)
    taps = weight.shape[2]
    before = taps - 1 if causal else taps // 2
    if not torch.compiler.is_compiling() and device_type(v) == "cpu" and v.dtype in (torch.float32, torch.float64):
        return _HeadByHead.apply(v, weight[:, 0, :, 0], before)
    return _two_products(v, weight[:, 0, :, 0], before)


def _two_products(v: Tensor, weight: Tensor, before: int) -> Tensor:
    """In blocks of s >= k - 1 tokens. A block of outputs needs its own block of (padded) inputs and the next one: two
    (s, s) by (s, blocks * d) products for each head."""
    rows, heads, length, width = v.shape
    taps = weight.shape[1]
    size = max(32, -(-(taps - 1) // 16) * 16)
    blocks = (length + size - 1) // size  # of positive numbers: ONNX rounds a negative quotient towards 0

    # x[h, i, (r, block, column)]: the padded input's blocks side by side, one more than there are blocks of outputs.
    x = F.pad(v.transpose(1, 2), (0, 0, 0, 0, before, (blocks + 1) * size - length - before))
    x = x.view(rows, blocks + 1, size, heads, width).permute(3, 2, 0, 1, 4).reshape(heads, size, -1)

    band = _band(weight, size, 2 * size)
    # Columns of the block after a row's last belong to the next row; they are computed and dropped.
    first = band[:, :, :size] @ x[:, :, :-width]
    out = torch.baddbmm(first, band[:, :, size:], x[:, :, width:])
    if rows == 1:
        out = out.view(heads, size, 1, blocks, width)
    else:
        out = F.pad(out, (0, width)).view(heads, size, rows, blocks + 1, width)[:, :, :, :blocks]
    return out.permute(2, 0, 3, 1, 4).reshape(rows, heads, blocks * size, width)[:, :, :length]


def _band(weight: Tensor, size: int, span: int) -> Tensor:
    """(H, k) -> (H, size, span): weight[h, j - i] for output i and input j of a block."""
    kernel = F.pad(weight, (size - 1, span - weight.shape[1]))
    return kernel.unfold(1, span, 1).flip(1)


class _HeadByHead(torch.autograd.Function):
    """In blocks of 32 tokens, each of which needs k - 1 inputs more, head by head.

    The blocks are views of the values as the projections leave them, (R, n, H, d), so nothing is transposed. For k = 65
    the band has 96 columns, where two blocks of 64 have 128. Forward and backward took 0.70 to 0.81 of the time of
    :func:`_two_products` (12 heads of 64 and n = 1024 and 4096; 32 rows of 128; one thread of Zen 4, by hand).
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, weight: Tensor, before: int) -> Tensor:
        ctx.save_for_backward(v, weight)
        ctx.before = before
        return _convolve(v, weight, before)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, weight = ctx.saved_tensors
        taps: int = weight.shape[1]
        d_v = _convolve(grad, weight.flip(1), taps - 1 - ctx.before) if ctx.needs_input_grad[0] else None
        d_weight = _of_weight(v, grad, taps, ctx.before) if ctx.needs_input_grad[1] else None
        return d_v, d_weight, None


def _convolve(v: Tensor, weight: Tensor, before: int) -> Tensor:
    blocks, span = _blocks(v, weight.shape[1], before)
    rows, heads, length, width = v.shape
    band = _band(weight, _SIZE, span).contiguous()
    out = v.new_empty(rows, blocks.shape[2] * _SIZE, heads, width)
    for row in range(rows):
        for head in range(heads):
            part = torch.bmm(band[head].expand(blocks.shape[2], -1, -1), blocks[row, head])
            out[row, :, head] = part.flatten(0, 1)
    return out[:, :length].transpose(1, 2)


def _of_weight(v: Tensor, grad: Tensor, taps: int, before: int) -> Tensor:
    """(H, k): the sum over tokens and columns of the gradient times the input at each tap."""
    blocks, span = _blocks(v, taps, before)
    rows, heads, length, width = v.shape
    count = blocks.shape[2]
    grad = F.pad(grad.transpose(1, 2), (0, 0, 0, 0, 0, count * _SIZE - length)).view(rows, count, _SIZE, heads, width)
    sums = v.new_zeros(heads, _SIZE, span)
    for row in range(rows):
        for head in range(heads):
            sums[head] += torch.bmm(grad[row, :, :, head], blocks[row, head].transpose(1, 2)).sum(dim=0)
    # Entry (i, i + j) of a band is tap j: rows that are longer by one turn its diagonals into columns.
    return F.pad(sums.flatten(1), (0, _SIZE)).view(heads, _SIZE, span + 1)[:, :, :taps].sum(dim=1)


def _blocks(v: Tensor, taps: int, before: int) -> tuple[Tensor, int]:
    """Overlapping views (R, H, blocks, 32 + k - 1, d) of the padded input, and 32 + k - 1."""
    rows, heads, length, width = v.shape
    blocks, span = -(-length // _SIZE), _SIZE + taps - 1
    padded = v.new_zeros(rows, blocks * _SIZE + taps - 1, heads, width)
    padded[:, before : before + length] = v.transpose(1, 2)
    row, token = padded.stride()[:2]
    return padded.as_strided((rows, heads, blocks, span, width), (row, width, _SIZE * token, token, 1)), span
