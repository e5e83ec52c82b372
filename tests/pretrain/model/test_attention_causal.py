"""Causal Nystrom attention: against its formulas written as loops, and its properties in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.attention import blockwise, causal_nystrom
from pretrain.model.attention.blockwise import Window
from pretrain.model.attention.causal_nystrom import (
    causal_landmarks,
    causal_nystrom_attention,
    causal_window_attention,
    landmark_queries,
    pool_segments,
)

LENGTHS = [1, 2, 3, 4, 5, 8, 9, 12, 13, 37, 100]


def inputs(*shape: int, requires_grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad) for _ in range(3)]


def formula(
    q: Tensor, k: Tensor, v: Tensor, c: int, w: int, gamma: float | None, weighted: bool, offset: Tensor | None
) -> Tensor:
    """One head (n, d), token by token, as the module's docstring has it."""
    n, d = q.shape
    s = d**-0.5
    complete = n // c
    segments = [slice(j * c, (j + 1) * c) for j in range(complete)]
    queries = [q[part].mean(0) + (0 if offset is None else offset[j]) for j, part in enumerate(segments)]
    p = [(s * k[part] @ queries[j]).softmax(0) for j, part in enumerate(segments)]
    keys = [p[j] @ k[part] if weighted else k[part].mean(0) for j, part in enumerate(segments)]
    mass = [torch.logsumexp(s * k[part] @ queries[j], 0) - s * queries[j] @ keys[j] for j, part in enumerate(segments)]
    values: list[Tensor] = []
    for i in range(complete):
        pooled = p[i] @ v[segments[i]]
        if gamma is None:
            values.append(pooled)
            continue
        a = torch.stack([s * queries[i] @ keys[j] + mass[j] for j in range(i + 1)]).softmax(0)
        past = slice(0, (i + 1) * c)
        right = gamma * pooled + (1 - gamma) * (s * k[past] @ queries[i]).softmax(0) @ v[past]
        for j in range(i):  # forward substitution, row by row
            right = right - (1 - gamma) * a[j] * values[j]
        values.append(right / (gamma + (1 - gamma) * a[i]))
    out = []
    for t in range(n):
        first = max(t // c - w + 1, 0)  # the window's first segment
        window = slice(first * c, t + 1)
        far = [s * q[t] @ keys[j] + mass[j] for j in range(first)]
        weights = torch.cat([*(x[None] for x in far), s * k[window] @ q[t]]).softmax(0)
        out.append(weights @ torch.cat([*(values[j][None] for j in range(first)), v[window]]))
    return torch.stack(out)


class Form(NamedTuple):
    gamma: float | None
    weighted: bool = True
    offset: bool = False

    def offsets(self, heads: int, segments: int, d: int) -> Tensor | None:
        generator = torch.Generator().manual_seed(7)
        return torch.randn(heads, segments, d, dtype=torch.float64, generator=generator) if self.offset else None


POOLED, INVERSE = Form(None), Form(0.75)
FORMS = [
    POOLED,
    Form(None, offset=True),
    Form(None, weighted=False),
    Form(0.75),
    Form(0.51, False),
    Form(0.6, True, True),
]


def attend(q: Tensor, k: Tensor, v: Tensor, c: int = 4, w: int = 2, form: Form = INVERSE) -> Tensor:
    heads, _, d = q.shape[1:]
    weights = None if form.gamma is None else torch.full((heads,), form.gamma, dtype=torch.float64)
    offset = form.offsets(heads, 30, d)
    return causal_nystrom_attention(q, k, v, window=Window(c, w), gamma=weights, weighted=form.weighted, offset=offset)


@pytest.fixture(params=[2**20, 2000], ids=["large-tiles", "small-tiles"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blockwise._TILE_BYTES, "cpu", request.param)
    monkeypatch.setattr(causal_nystrom, "_SLAB", 128 if request.param > 2000 else 3)


@pytest.mark.parametrize("w", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_formulas_at_any_length(chunk: None, w: int, form: Form) -> None:
    for n in LENGTHS:
        q, k, v = inputs(2, 2, n, 8)
        got = attend(q, k, v, w=w, form=form)
        offset = form.offsets(2, 30, 8)
        for row in range(2):
            for head in range(2):
                u = None if offset is None else offset[head]
                expected = formula(q[row, head], k[row, head], v[row, head], 4, w, form.gamma, form.weighted, u)
                torch.testing.assert_close(got[row, head], expected, rtol=0, atol=1e-11, msg=f"n={n}")


@pytest.mark.parametrize("w", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_those_of_the_formulas(chunk: None, w: int, form: Form) -> None:
    q, k, v = inputs(1, 1, 27, 8, requires_grad=True)
    grad = torch.randn(27, 8, dtype=torch.float64)
    offset = form.offsets(1, 30, 8)
    u = None if offset is None else offset[0]
    loops = formula(q[0, 0], k[0, 0], v[0, 0], 4, w, form.gamma, form.weighted, u)
    expected = torch.autograd.grad(loops, (q, k, v), grad)
    got = torch.autograd.grad(attend(q, k, v, w=w, form=form)[0, 0], (q, k, v), grad)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_gradients_of_gamma_and_offset_equal_finite_differences() -> None:
    q, k, v = inputs(2, 2, 19, 4)
    gamma = torch.tensor([0.6, 0.9], dtype=torch.float64, requires_grad=True)
    offset = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda g, u: causal_nystrom_attention(q, k, v, window=Window(4, 1), gamma=g, offset=u), (gamma, offset)
    )


@pytest.mark.parametrize("w", [1, 2])
@pytest.mark.parametrize("n", [13, 16, 22])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_depends_on_the_future_by_gradient(chunk: None, n: int, w: int, form: Form) -> None:
    q, k, v = inputs(1, 2, n, 4, requires_grad=True)
    out = attend(q, k, v, w=w, form=form)
    for t in range(n):
        for grad in torch.autograd.grad(out[:, :, t].sum(), (q, k, v), retain_graph=True):
            assert (grad[:, :, t + 1 :] == 0).all(), f"output {t} depends on its future"
        (of_v,) = torch.autograd.grad(out[:, :, t].sum(), v, retain_graph=True)
        assert (of_v[:, :, : t + 1] != 0).all(), f"output {t} does not see all of its past"


@pytest.mark.parametrize("form", FORMS)
def test_a_prefix_gets_what_it_gets_in_the_whole(form: Form) -> None:
    q, k, v = inputs(1, 2, 61, 8)
    whole = attend(q, k, v, form=form)
    for n in range(1, 62):
        part = attend(q[:, :, :n], k[:, :, :n], v[:, :, :n], form=form)
        torch.testing.assert_close(part, whole[:, :, :n], rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", [1, 3, 8, 11, 12])
def test_a_window_over_everything_is_exact_attention(n: int) -> None:
    q, k, v = inputs(2, 2, n, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v, w=3), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("weighted", [True, False])
def test_equal_keys_make_landmarks_weigh_what_their_tokens_weigh(weighted: bool) -> None:
    q, _, v = inputs(1, 2, 40, 8)
    k = torch.zeros_like(q) + torch.randn(8, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v, form=Form(None, weighted)), expected, rtol=0, atol=1e-12)
    landmarks = causal_landmarks(landmark_queries(q, 4, None)[0], k[0], v[0], None, count=3, weighted=weighted)
    torch.testing.assert_close(landmarks.mass, torch.full((2, 3), math.log(4), dtype=torch.float64))


def test_a_landmark_is_the_tangent_of_its_segment_and_never_weighs_more() -> None:
    """s q.k~ + M <= logsumexp(s q.k) for every query, equal at the landmark's own; M is an entropy, in [0, log c]."""
    q, k, v = (8 * x for x in inputs(3, 40, 8))
    queries = landmark_queries(q[None], 4, None)[0]
    keys, mass, _ = causal_landmarks(queries, k, v, None, count=10)
    scale = 8**-0.5
    truth = (scale * torch.einsum("bqd,bjcd->bqjc", q, k.unflatten(1, (10, 4)))).logsumexp(3)
    assert (scale * q @ keys.transpose(1, 2) + mass.unsqueeze(1) <= truth + 1e-9).all()
    at_own = scale * torch.einsum("bjd,bjcd->bjc", queries, k.unflatten(1, (10, 4)))
    torch.testing.assert_close(scale * (queries * keys).sum(2) + mass, at_own.logsumexp(2))
    assert mass.min() >= 0
    assert mass.max() <= math.log(4)


def test_far_text_as_a_whole_never_gets_more_than_in_exact_attention() -> None:
    """Each landmark's mass is at most that of its tokens, before normalisation; so is the share of all far text."""
    c, w, n = 4, 2, 40
    q, k, _ = (3 * x for x in inputs(2, 3, n, 8))
    for segment in range(w, n // c):
        far = (torch.arange(n) < (segment - w + 1) * c).double()[:, None].expand(2, 3, n, 8)
        rows = slice(segment * c, (segment + 1) * c)
        share = attend(q, k, far, form=POOLED)[:, :, rows, 0]  # values of 1 afar and 0 nearby
        exact = F.scaled_dot_product_attention(q, k, far, is_causal=True)[:, :, rows, 0]
        assert (share <= exact + 1e-12).all()
        assert (share < exact - 1e-3).any()


def test_one_landmark_may_get_more_than_its_tokens_would() -> None:
    """Keys {0, 0} and {3, -3}, seen from q = 2 with landmark queries of 0: halves, where exact attention has 3 and 97%.
    What a landmark lacks in mass goes to all others, so a bound for each share does not exist."""
    k = torch.tensor([[[0.0, 0], [0, 0], [3, 0], [-3, 0]]], dtype=torch.float64)
    far = causal_landmarks(torch.zeros(1, 2, 2, dtype=torch.float64), k, k, None, count=2)
    q = torch.tensor([2.0, 0], dtype=torch.float64) / 2**0.5
    share = (far.keys @ q + far.mass).softmax(1)
    exact = (k @ q).softmax(1).unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(share, torch.full((1, 2), 0.5, dtype=torch.float64))
    torch.testing.assert_close(exact, torch.tensor([[0.028, 0.972]], dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("w", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 4, 5, 13, 61])
def test_the_window_alone_is_attention_under_a_mask(chunk: None, n: int, w: int) -> None:
    q, k, v = inputs(2, 3, n, 8, requires_grad=True)
    segment = torch.arange(n) // 4
    seen = (segment[:, None] - segment < w).tril()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    got = causal_window_attention(q, k, v, Window(4, w))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.501, 0.6, 0.75, 0.99])
def test_the_inverse_is_bounded_for_gamma_above_a_half(gamma: float) -> None:
    """Values in [-1, 1] make right-hand sides in [-1, 1], so no landmark's value exceeds 1 / (2 gamma - 1)."""
    torch.manual_seed(0)
    q, k = (8 * torch.randn(4, 400, 8, dtype=torch.float64) for _ in range(2))  # peaky: the hard case
    v = torch.randn(4, 400, 8, dtype=torch.float64).sign()
    weights = torch.full((4,), gamma, dtype=torch.float64)
    queries = landmark_queries(q[None], 4, None)[0]
    values = causal_landmarks(queries, k, v, weights, count=100).values
    assert values.abs().max() <= 1 / (2 * gamma - 1)
    constant = causal_landmarks(queries, k, torch.ones_like(v), weights, count=100).values
    torch.testing.assert_close(constant, torch.ones_like(constant), rtol=0, atol=1e-9)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(2, 2, 150, 8)
    whole = attend(q, k, v)
    for limit in (1, 4000, 40000):
        monkeypatch.setitem(blockwise._TILE_BYTES, "cpu", limit)
        torch.testing.assert_close(attend(q, k, v), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gamma", [None, 0.75])
def test_bfloat16_is_within_two_percent(autocast: bool, gamma: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 300, 16).cumsum(2) / 8 for _ in range(3))  # smooth along the sequence
    form = Form(gamma)
    expected = attend(q.double(), k.double(), v.double(), c=16, form=form)
    low = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        weights = None if gamma is None else torch.full((2,), gamma)
        got = causal_nystrom_attention(*low, window=Window(16, 2), gamma=weights)
        got.float().square().sum().backward()
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).norm() / expected.norm() < 0.02
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in low)


@pytest.mark.parametrize("deviation", [1, 20])
def test_bfloat16_loses_what_rounding_inputs_and_weights_costs(deviation: int) -> None:
    """Relative errors against float64 on the same inputs, logits of this deviation. The read's logits and masses are
    float32, and so are landmarks until they are read: in bfloat16 the errors at 20 were 1.2e-2 and 4.9e-2."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, 224, 32) for _ in range(4))
    low = [x.bfloat16() for x in (q * deviation**0.5, k * deviation**0.5, v, grad)]

    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = causal_nystrom_attention(*leaves, window=Window(16, 2))
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    expected = run(*(x.double() for x in low))
    errors = [float((x - y).norm() / y.norm()) for x, y in zip(run(*low), expected, strict=True)]
    assert errors[0] < 4e-3
    assert max(errors[1:]) < 1.5e-2


@pytest.mark.parametrize("weighted", [True, False])
def test_landmarks_of_16_bits_are_those_of_the_same_numbers_in_float32(weighted: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 3, 8, requires_grad=True)
    k, v = (torch.randn(2, 3, 5, 8).bfloat16().requires_grad_() for _ in range(2))
    grads = (torch.randn(2, 3, 8), torch.randn(2, 3), torch.randn(2, 3, 8))

    def run(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        found = pool_segments(query, k, v, weighted=weighted)
        return (*(x.detach() for x in found), *torch.autograd.grad(found, (query, k, v), grads))

    wide = run(*(x.detach().float().requires_grad_() for x in (k, v)))
    for got, expected in zip(run(k, v), wide, strict=True):
        # Gradients of the tokens are outer products of what was rounded to 16 bits.
        loss = 1e-5 if got.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=loss * float(expected.abs().max()))


@pytest.mark.parametrize("gamma", [None, 0.75])
def test_float16_is_finite_where_a_logit_exceeds_its_range(gamma: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = (scale * torch.randn(1, 2, 40, 8) for scale in (400, 400, 1))
    assert (q @ k.transpose(2, 3)).abs().max() * 8**-0.5 > 2 * torch.finfo(torch.float16).max
    low = [x.half().requires_grad_() for x in (q, k, v)]
    weights = None if gamma is None else torch.full((2,), gamma)
    got = causal_nystrom_attention(*low, window=Window(4, 2), gamma=weights)
    q, k, v = (x.detach().double() for x in low)
    expected = attend(q, k, v, form=Form(gamma))
    assert (got - expected).norm() < 0.01 * expected.norm()
    assert all(x.isfinite().all() for x in torch.autograd.grad(got.float().sum(), low))
