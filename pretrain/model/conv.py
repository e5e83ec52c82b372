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

    For k = 65 the band has 96 columns, where two blocks of 64 have 128.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, weight: Tensor, before: int) -> Tensor:
        ctx.save_for_backward(v, weight)
        ctx.before = before
        return convolve(v, weight, before)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, weight = ctx.saved_tensors
        of_values, of_weight, _ = ctx.needs_input_grad
        return *convolution_gradients(grad, v, weight, ctx.before, of_values, of_weight), None


def convolve(v: Tensor, weight: Tensor, before: int) -> Tensor:
    """(R, H, n, d), laid out in memory as (R, n, H, d): v convolved with weight (H, k), whose tap number ``before``
    falls on the token itself."""
    rows, heads, length, width = v.shape
    out = v.new_empty(rows, length, heads, width).transpose(1, 2)
    values = _Blocks(v, weight.shape[1], before)
    band = _band(weight, _SIZE, values.span).contiguous()
    for row in range(rows):
        for head in range(heads):
            _banded(band[head], values.of(v[row, head]), out[row, head])
    return out


def convolution_gradients(
    grad: Tensor, v: Tensor, weight: Tensor, before: int, of_values: bool = True, of_weight: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Those of v and weight, as far as they are asked for, from the gradient of what :func:`convolve` returns."""
    rows, heads, length, width = v.shape
    taps = weight.shape[1]
    values, grads = _Blocks(v, taps, before), _Blocks(v, taps, taps - 1 - before)
    band = _band(weight.flip(1), _SIZE, grads.span).contiguous()
    d_v = v.new_empty(rows, length, heads, width).transpose(1, 2) if of_values else None
    sums = v.new_zeros(heads, _SIZE, values.span) if of_weight else None
    for row in range(rows):
        for head in range(heads):
            blocks = grads.of(grad[row, head])
            if d_v is not None:
                _banded(band[head], blocks, d_v[row, head])
            if sums is not None:
                sums[head] += torch.bmm(grads.apart, values.of(v[row, head]).transpose(1, 2)).sum(dim=0)
    if sums is None:
        return d_v, None
    # Entry (i, i + j) of a band is tap j: rows that are longer by one turn its diagonals into columns.
    skewed = F.pad(sums.flatten(1), (0, _SIZE)).view(heads, _SIZE, values.span + 1)
    return d_v, skewed[:, :, :taps].sum(dim=1)


class _Blocks:
    """The tokens (n, d) of one head at a time, between zeros, in a buffer that fits the second-level cache.

    All heads share the buffer. A copy of all of them at once took 4 ms of 37 at n = 4096, and its rows lie 12 heads
    apart.
    """

    def __init__(self, like: Tensor, taps: int, before: int) -> None:
        length, width = like.shape[2:]
        count, self.span = -(-length // _SIZE), _SIZE + taps - 1
        padded = like.new_zeros(count * _SIZE + taps - 1, width)
        self._tokens = padded[before : before + length]
        self._blocks = padded.as_strided((count, self.span, width), (_SIZE * width, width, 1))
        self.apart = padded[before : before + count * _SIZE].view(count, _SIZE, width)
        """The tokens in blocks of 32 that do not overlap."""

    def of(self, x: Tensor) -> Tensor:
        """Overlapping blocks (n / 32, 32 + k - 1, d) of x (n, d), valid until the next call."""
        self._tokens.copy_(x)
        return self._blocks


def _banded(band: Tensor, blocks: Tensor, out: Tensor) -> None:
    """Write the product of band (32, 32 + k - 1) and each block into out (n, d)."""
    whole, rest = divmod(out.shape[0], _SIZE)
    if whole:
        of_blocks = out[: whole * _SIZE].unflatten(0, (whole, _SIZE))
        torch.bmm(band.expand(whole, -1, -1), blocks[:whole], out=of_blocks)
    if rest:
        torch.mm(band[:rest], blocks[whole], out=out[whole * _SIZE :])
