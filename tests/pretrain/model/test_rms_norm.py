"""The RMS norm is the formula and torch's own, with its gradients, and keeps little."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.model.rms_norm import RMSNorm


def norms(width: int, dtype: torch.dtype) -> tuple[RMSNorm, nn.RMSNorm]:
    ours, theirs = RMSNorm(width, eps=1e-3, dtype=dtype), nn.RMSNorm(width, eps=1e-3, dtype=dtype)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.normal_())
    return ours, theirs


def results(norm: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = norm(x)
    return [out, *torch.autograd.grad(out, [x, norm.weight], grad)]


@pytest.mark.parametrize("shape", [(24,), (7, 24), (2, 5, 3, 24)])
def test_values_and_gradients_are_torch_s_own(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours, theirs = norms(24, torch.float64)
    x, grad = torch.randn(2, *shape, dtype=torch.float64)
    for got, expected in zip(results(ours, x, grad), results(theirs, x, grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_formula_of_rows_that_are_not_contiguous() -> None:
    ours, _ = norms(6, torch.float64)
    x = torch.randn(6, 4, 5, dtype=torch.float64).permute(1, 2, 0)
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * ours.weight
    torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, _: ours(x), (x.detach().requires_grad_(), ours.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, _ = norms(64, torch.float64)
    x, grad = (torch.randn(32, 64, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        ours.weight.copy_(ours.weight.to(dtype))
    expected = results(ours, x.double(), grad.double())
    got = results(ours.to(dtype), x, grad)
    for low, high in zip(got, expected, strict=True):
        assert low.dtype == dtype
        assert (low.double() - high).abs().max() <= torch.finfo(dtype).eps * high.abs().max()


def test_half_precision_with_a_wide_gain_as_under_autocast() -> None:
    """Rounded once more than what PyTorch returns there, which is as wide as the gain."""
    torch.manual_seed(0)
    ours, theirs = norms(64, torch.float32)
    x, grad = (torch.randn(32, 64, dtype=torch.bfloat16) for _ in range(2))
    got, d_x, d_weight = results(ours, x, grad)
    expected = results(theirs, x.float(), grad.float())
    assert (got.dtype, d_x.dtype, d_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for low, high in zip((got, d_x, d_weight), expected, strict=True):
        assert (low.float() - high).abs().max() <= torch.finfo(torch.bfloat16).eps * high.abs().max()


def test_it_keeps_its_input_and_a_number_for_each_row() -> None:
    ours, _ = norms(16, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ours(torch.randn(10, 16, requires_grad=True))
    assert sorted(tuple(x.shape) for x in kept) == [(10, 1), (10, 16), (16,)]
