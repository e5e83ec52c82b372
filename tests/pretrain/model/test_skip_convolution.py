"""The skip convolution against PyTorch's conv2d."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.conv import skip_convolution


def reference(v: Tensor, weight: Tensor, causal: bool) -> Tensor:
    taps = weight.shape[2]
    if causal:
        return F.conv2d(F.pad(v, (0, 0, taps - 1, 0)), weight, groups=weight.shape[0])
    return F.conv2d(v, weight, padding=(taps // 2, 0), groups=weight.shape[0])


@pytest.mark.parametrize(
    ("taps", "causal"),
    [(taps, causal) for causal in (False, True) for taps in (1, 2, 3, 33, 65, 67) if causal or taps % 2],
)
@pytest.mark.parametrize("length", [1, 5, 64, 130])
@pytest.mark.parametrize("rows", [1, 3])
def test_equals_conv2d_with_its_gradients(rows: int, length: int, taps: int, causal: bool) -> None:
    torch.manual_seed(0)
    v = torch.randn(rows, 2, length, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, taps, 1, dtype=torch.float64, requires_grad=True)
    ours, theirs = skip_convolution(v, weight, causal=causal), reference(v, weight, causal)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    grad = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (v, weight), grad), torch.autograd.grad(theirs, (v, weight), grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_masked_tokens_are_as_if_the_sequence_ended() -> None:
    torch.manual_seed(0)
    v, weight = torch.randn(2, 2, 20, 4, dtype=torch.float64), torch.randn(2, 1, 9, 1, dtype=torch.float64)
    mask = torch.arange(20)[None] < torch.tensor([13, 20])[:, None]
    out = skip_convolution(v, weight, causal=False, mask=mask[:, None, None])
    torch.testing.assert_close(out[:1, :, :13], reference(v[:1, :, :13], weight, False), rtol=0, atol=1e-12)
    torch.testing.assert_close(out[1:], reference(v[1:], weight, False), rtol=0, atol=1e-12)


def test_works_in_bfloat16() -> None:
    torch.manual_seed(0)
    v, weight = torch.randn(2, 2, 200, 8), torch.randn(2, 1, 65, 1) / 8
    low = skip_convolution(v.bfloat16(), weight.bfloat16(), causal=True)
    assert low.dtype == torch.bfloat16
    high = reference(v, weight, True)
    assert (low.float() - high).norm() / high.norm() < 1e-2
