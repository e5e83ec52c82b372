"""Causal Nystrom attention: against its formulas written as loops, and its properties in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.attention import blockwise, causal_nystrom
from pretrain.model.attention.causal_nystrom import causal_nystrom_attention, summarize

LENGTHS = [1, 2, 3, 4, 5, 8, 9, 12, 13, 37, 100]


def inputs(*shape: int, requires_grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad) for _ in range(3)]


def formula(q: Tensor, k: Tensor, v: Tensor, c: int, w: int, gamma: float) -> Tensor:
    """One head (n, d), token by token, as the module's docstring has it."""
    n, d = q.shape
    s = d**-0.5
    complete = n // c
    segments = [slice(j * c, (j + 1) * c) for j in range(complete)]
    q_mean = [q[part].mean(0) for part in segments]
    k_mean = [k[part].mean(0) for part in segments]
    mass = [torch.logsumexp(s * k[part] @ q_mean[j], 0) - s * q_mean[j] @ k_mean[j] for j, part in enumerate(segments)]
    values: list[Tensor] = []
    for i in range(complete):  # forward substitution, row by row
        a = torch.stack([s * q_mean[i] @ k_mean[j] + mass[j] for j in range(i + 1)]).softmax(0)
        pooled = (s * k[segments[i]] @ q_mean[i]).softmax(0) @ v[segments[i]]
        past = slice(0, (i + 1) * c)
        right = gamma * pooled + (1 - gamma) * (s * k[past] @ q_mean[i]).softmax(0) @ v[past]
        for j in range(i):
            right = right - (1 - gamma) * a[j] * values[j]
        values.append(right / (gamma + (1 - gamma) * a[i]))
    out = []
    for t in range(n):
        first = max(t // c - w + 1, 0)  # the window's first segment
        window = slice(first * c, t + 1)
        far = [s * q[t] @ k_mean[j] + mass[j] for j in range(first)]
        weights = torch.cat([*(x[None] for x in far), s * k[window] @ q[t]]).softmax(0)
        out.append(weights @ torch.cat([*(values[j][None] for j in range(first)), v[window]]))
    return torch.stack(out)


def attend(q: Tensor, k: Tensor, v: Tensor, c: int = 4, w: int = 2, gamma: float = 0.75) -> Tensor:
    weights = None if gamma == 1 else torch.full((q.shape[1],), gamma, dtype=torch.float64)
    return causal_nystrom_attention(q, k, v, segment_length=c, window_segments=w, gamma=weights)


@pytest.fixture(params=[2**19, 40], ids=["one-chunk", "small-chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blockwise._CHUNK_ELEMENTS, "cpu", request.param)
    monkeypatch.setattr(causal_nystrom, "_SLAB", 128 if request.param > 40 else 3)


@pytest.mark.parametrize("w", [1, 2, 3])
@pytest.mark.parametrize("gamma", [1.0, 0.75, 0.51])
def test_equals_the_formulas_at_any_length(chunk: None, w: int, gamma: float) -> None:
    for n in LENGTHS:
        q, k, v = inputs(2, 3, n, 8)
        got = attend(q, k, v, w=w, gamma=gamma)
        for row in range(2):
            for head in range(3):
                expected = formula(q[row, head], k[row, head], v[row, head], 4, w, gamma)
                torch.testing.assert_close(got[row, head], expected, rtol=0, atol=1e-11, msg=f"n={n}")


@pytest.mark.parametrize("w", [1, 2, 3])
def test_gradients_equal_those_of_the_formulas(chunk: None, w: int) -> None:
    q, k, v = inputs(1, 1, 27, 8, requires_grad=True)
    grad = torch.randn(27, 8, dtype=torch.float64)
    expected = torch.autograd.grad(formula(q[0, 0], k[0, 0], v[0, 0], 4, w, 0.6), (q, k, v), grad)
    got = torch.autograd.grad(attend(q, k, v, w=w, gamma=0.6)[0, 0], (q, k, v), grad)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_gradient_of_gamma_equals_finite_differences() -> None:
    q, k, v = inputs(2, 2, 19, 4)
    gamma = torch.tensor([0.6, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda g: causal_nystrom_attention(q, k, v, segment_length=4, window_segments=1, gamma=g), (gamma,)
    )


@pytest.mark.parametrize("w", [1, 2])
@pytest.mark.parametrize("n", [13, 16, 22])
def test_nothing_depends_on_the_future_by_gradient(chunk: None, n: int, w: int) -> None:
    q, k, v = inputs(1, 2, n, 4, requires_grad=True)
    out = attend(q, k, v, w=w)
    for t in range(n):
        for grad in torch.autograd.grad(out[:, :, t].sum(), (q, k, v), retain_graph=True):
            assert (grad[:, :, t + 1 :] == 0).all(), f"output {t} depends on its future"
        (of_v,) = torch.autograd.grad(out[:, :, t].sum(), v, retain_graph=True)
        assert (of_v[:, :, : t + 1] != 0).all(), f"output {t} does not see all of its past"


def test_a_prefix_gets_what_it_gets_in_the_whole() -> None:
    q, k, v = inputs(1, 2, 61, 8)
    whole = attend(q, k, v)
    for n in range(1, 62):
        torch.testing.assert_close(attend(q[:, :, :n], k[:, :, :n], v[:, :, :n]), whole[:, :, :n], rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", [1, 3, 8, 11, 12])
def test_a_window_over_everything_is_exact_attention(n: int) -> None:
    q, k, v = inputs(2, 2, n, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v, w=3), expected, rtol=0, atol=1e-13)


def test_equal_keys_make_landmarks_weigh_what_their_tokens_weigh() -> None:
    q, _, v = inputs(1, 2, 40, 8)
    k = torch.zeros_like(q) + torch.randn(8, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v, gamma=1.0), expected, rtol=0, atol=1e-12)
    (mass,) = {
        round(float(x), 9) for x in summarize(q[0], k[0], v[0], segment_length=4, count=3, gamma=None).mass.flatten()
    }
    assert mass == round(math.log(4), 9)


@pytest.mark.parametrize("gamma", [0.501, 0.6, 0.75, 0.99])
def test_the_inverse_is_bounded_for_gamma_above_a_half(gamma: float) -> None:
    """Values in [-1, 1] make right-hand sides in [-1, 1], so no landmark's value exceeds 1 / (2 gamma - 1)."""
    torch.manual_seed(0)
    q, k = (8 * torch.randn(4, 400, 8, dtype=torch.float64) for _ in range(2))  # peaky: the hard case
    v = torch.randn(4, 400, 8, dtype=torch.float64).sign()
    weights = torch.full((4,), gamma, dtype=torch.float64)
    values = summarize(q, k, v, segment_length=4, count=100, gamma=weights).values
    assert values.abs().max() <= 1 / (2 * gamma - 1)
    constant = summarize(q, k, torch.ones_like(v), segment_length=4, count=100, gamma=weights).values
    torch.testing.assert_close(constant, torch.ones_like(constant), rtol=0, atol=1e-9)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(2, 2, 150, 8)
    whole = attend(q, k, v)
    for limit in (1, 500, 5000):
        monkeypatch.setitem(blockwise._CHUNK_ELEMENTS, "cpu", limit)
        torch.testing.assert_close(attend(q, k, v), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_within_two_percent(autocast: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 300, 16).cumsum(2) / 8 for _ in range(3))  # smooth along the sequence
    expected = attend(q.double(), k.double(), v.double(), c=16)
    low = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = causal_nystrom_attention(*low, segment_length=16, window_segments=2, gamma=torch.full((2,), 0.75))
        got.float().square().sum().backward()
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).norm() / expected.norm() < 0.02
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in low)
