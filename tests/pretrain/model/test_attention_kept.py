"""The masked form as one function for CPUs: against the same form as two attentions, which autograd differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.model import Layout
from pretrain.model.attention import kept_nystrom as kept
from pretrain.model.attention.inverse import Init, KeptInverse, iterative_inverse
from pretrain.model.attention.layout import Rectangle
from pretrain.model.attention.nystrom import nystrom_attention, two_attentions
from pretrain.model.conv import skip_convolution

M = 8
LAYOUTS = {
    "whole segments": Layout.full(2, 64),
    "uneven segments": Layout.full(2, 45),
    "padded": Layout.from_lengths([33, 45], 48),
    "documents": Layout.from_documents(torch.tensor([[0] * 40 + [1] * 24, [0] * 35 + [1] * 29])),
}
Inputs = tuple[Tensor, ...]


def inputs(length: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """q, k, v (2, n, 3, 4), and a convolution of 5 taps for each of the heads."""
    torch.manual_seed(0)
    shapes = [(2, length, 3, 4)] * 3 + [(3, 1, 5, 1)]
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)


def one(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, rectangle: Rectangle) -> Tensor:
    return nystrom_attention(q, k, v, rectangle, num_landmarks=M, conv_weight=weight)


def two(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, rectangle: Rectangle) -> Tensor:
    out = two_attentions(q, k, v, rectangle, num_landmarks=M, iterations=6, init="block")
    if weight is None:
        return out
    return out + skip_convolution(v, weight, causal=False, mask=rectangle.mask)


def results(form: Callable[..., Tensor], layout: Layout, given: Inputs, convolve: bool = True) -> Inputs:
    """The output, (B, N, H, d), and the gradients."""
    q, k, v, weight = given
    rectangles = layout.partition(torch.device("cpu"), causal=False, num_landmarks=M)
    outputs = [form(r.take(q), r.take(k), r.take(v), weight if convolve else None, r) for r in rectangles.rectangles]
    out = rectangles.merge(outputs, v)
    torch.manual_seed(1)
    grad = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    if layout.lengths is not None and rectangles.slots is None:
        grad[torch.arange(layout.length) >= torch.from_numpy(layout.lengths)[:, None]] = 0
        out = out * (grad != 0)
    wanted = given if convolve else given[:3]
    return out, *torch.autograd.grad(out, wanted, grad)


@pytest.mark.parametrize("tile_bytes", [1, 2**20], ids=["head by head", "all heads at once"])
@pytest.mark.parametrize("convolve", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_two_attentions_with_all_gradients(
    layout: Layout, convolve: bool, tile_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_TILE_BYTES", tile_bytes)
    given = inputs(layout.length)
    for got, expected in zip(results(one, layout, given, convolve), results(two, layout, given, convolve), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_float32_is_as_exact_as_with_two_attentions(layout: Layout) -> None:
    """Relative to the float64 result on the same inputs."""
    low = inputs(layout.length, torch.float32)
    right = results(two, layout, tuple(x.detach().double().requires_grad_() for x in low))
    ours, theirs = ([_error(a, b) for a, b in zip(results(f, layout, low), right, strict=True)] for f in (one, two))
    assert all(a < 1.5 * b + 1e-7 for a, b in zip(ours, theirs, strict=True))
    assert max(ours) < 1e-5


def _error(got: Tensor, right: Tensor) -> float:
    return float((got.detach() - right.detach()).norm() / right.detach().norm())


def test_a_second_backward_pass_gives_the_same() -> None:
    """Nothing that is kept for the backward pass is overwritten by it."""
    given = inputs(64)
    out = one(*(x.transpose(1, 2) for x in given[:3]), given[3], Rectangle(64, 64))
    first, second = (torch.autograd.grad(out.square().sum(), given, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradients_it_is_the_same_and_holds_the_weights_of_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_TILE_BYTES", 1)
    shapes: list[int] = []
    original = kept._matrices

    def spy(*given: Any) -> Callable[[Any], Tensor]:
        of = original(*given)
        shapes.append(of((1, slice(2, 3))).untyped_storage().nbytes() // 8)
        return of

    monkeypatch.setattr(kept, "_matrices", spy)
    given = inputs(64)
    args = (*(x.transpose(1, 2) for x in given[:3]), given[3], Rectangle(64, 64))
    expected = one(*args)
    with torch.no_grad():
        assert torch.equal(one(*args), expected)
    assert shapes == [2 * 3 * 64 * M] * 2 + [min(3, torch.get_num_threads()) * 64 * M] * 2


def test_large_logits_do_not_overflow() -> None:
    """Weights of B are powers of 2 of differences to the largest logit."""
    given = inputs(64, torch.float32)
    q, k, v = (scale * x.detach().transpose(1, 2) for scale, x in zip((50, 50, 1), given[:3], strict=True))
    got = one(q, k, v, None, Rectangle(64, 64))
    assert got.isfinite().all()
    expected = one(q.double(), k.double(), v.double(), None, Rectangle(64, 64))
    assert (got - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize("init", ["block", "original"])
@pytest.mark.parametrize("steps", [1, 6, 9])
def test_the_gradient_of_the_inverse_is_that_of_its_steps(steps: int, init: Init) -> None:
    """Also where a singular matrix has converged and keeps its inverse, and where column sums are equal."""
    torch.manual_seed(0)
    matrix = (2 * torch.randn(2, 3, 16, 16, dtype=torch.float64)).softmax(dim=3)
    matrix[0, 0] = matrix[0, 0, :1]
    matrix[0, 1] = 1 / 16
    inverse = iterative_inverse(matrix.requires_grad_(), steps, init)
    grad = torch.randn_like(inverse)
    (expected,) = torch.autograd.grad(inverse, matrix, grad)
    with torch.no_grad():
        ours = KeptInverse.of(matrix, steps, init)
        assert torch.equal(ours.result, inverse)
        if steps == 9:
            assert any(step.done is not None and step.done.any() for step in ours.steps)
        torch.testing.assert_close(ours.gradient(grad), expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
