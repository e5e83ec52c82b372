"""Exact recall: chosen far segments are read token by token in the same softmax; against loops, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.model import ModelConfig, build_model
from pretrain.model.attention import blockwise, recall
from pretrain.model.attention.blockwise import Window, blockwise_attention
from pretrain.model.attention.causal_nystrom import causal_landmarks, causal_nystrom_attention, landmark_queries
from pretrain.model.attention.pyramid import Pyramid

C, W = 2, 2


def inputs(*shape: int, requires_grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad) for _ in range(3)]


def attend(q: Tensor, k: Tensor, v: Tensor, count: int, w: int = W, weighted: bool = True) -> Tensor:
    return causal_nystrom_attention(q, k, v, window=Window(C, w), weighted=weighted, recall=count)


def landmark(q: Tensor, k: Tensor, v: Tensor, weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Key, mass and value of one segment (c, d)."""
    query, s = q.mean(0), q.shape[1] ** -0.5
    logits = s * k @ query
    p = logits.softmax(0)
    key = p @ k if weighted else k.mean(0)
    return key, logits.logsumexp(0) - s * query @ key, p @ v


def logits_and_values(
    q: Tensor, k: Tensor, v: Tensor, t: int, count: int, w: int = W, weighted: bool = True
) -> tuple[Tensor, Tensor, list[int]]:
    """One head (n, d): what token ``t`` reads, and the segments that it chose."""
    s, first = q.shape[1] ** -0.5, max(t // C - w + 1, 0)
    parts = [slice(j * C, (j + 1) * C) for j in range(first)]
    far = [landmark(q[part], k[part], v[part], weighted) for part in parts]
    asked = [(s * q[t] @ key + mass).item() for key, mass, _ in far]
    chosen = sorted(range(first), key=lambda j: (-asked[j], j))[:count]
    window = slice(first * C, t + 1)
    logits, values = [s * k[window] @ q[t]], [v[window]]
    for j, (key, mass, value) in enumerate(far):
        logits.append(s * k[parts[j]] @ q[t] if j in chosen else (s * q[t] @ key + mass)[None])
        values.append(v[parts[j]] if j in chosen else value[None])
    return torch.cat(logits), torch.cat(values), chosen


def formula(q: Tensor, k: Tensor, v: Tensor, count: int, w: int = W, weighted: bool = True) -> Tensor:
    """All (1, H, n, d), by the definition, token by token."""
    heads = []
    for one in zip(q[0], k[0], v[0], strict=True):
        read = [logits_and_values(*one, t, count, w, weighted)[:2] for t in range(q.shape[2])]
        heads.append(torch.stack([logits.softmax(0) @ values for logits, values in read]))
    return torch.stack(heads)[None]


@pytest.fixture(params=["large", "small"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small: several tiles, and blocks of few queries, computed a few at a time and one head after the other."""
    if request.param == "small":
        monkeypatch.setitem(blockwise._TILE_BYTES, "cpu", 2000)
        monkeypatch.setitem(recall._SLAB_BYTES, "cpu", 100)
        monkeypatch.setitem(recall._PAIR_BYTES, "cpu", 1)
        monkeypatch.setattr(recall, "_MOST_QUERIES", 2)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("w", "n", "weighted"), [(1, 23, True), (2, 30, True), (2, 30, False), (3, 13, True)])
def test_values_and_gradients_equal_the_formula(count: int, w: int, n: int, weighted: bool) -> None:
    ours, theirs = inputs(1, 2, n, 4, requires_grad=True), inputs(1, 2, n, 4, requires_grad=True)
    got, expected = attend(*ours, count, w, weighted), formula(*theirs, count, w, weighted)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    grad = torch.randn(got.shape, dtype=got.dtype)
    torch.autograd.backward((got, expected), (grad, grad))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-12)


def blockwise_at_any_length(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """(B, S * c, d), also where :func:`attend` would call exact attention."""
    far = causal_landmarks(
        landmark_queries(q[None], C, None)[0], k, v, None, count=max(q.shape[1] // C - W, 0), weighted=True
    )
    return blockwise_attention(q, k, v, far.keys, far.values, far.mass, Window(C, W), recall=count)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("extra", [0, 3])
def test_with_every_far_segment_it_is_exact(extra: int) -> None:
    n = 20
    ours, theirs = inputs(3, n, 4, requires_grad=True), inputs(3, n, 4, requires_grad=True)
    got = blockwise_at_any_length(*ours, n // C - W + extra)
    expected = F.scaled_dot_product_attention(*theirs, is_causal=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    grad = torch.randn(got.shape, dtype=got.dtype)
    torch.autograd.backward((got, expected), (grad, grad))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-12)


def test_none_is_the_form_without_to_the_bit() -> None:
    results = []
    for count in ({}, {"recall": 0}, {"recall": 1}):
        tensors = inputs(2, 2, 31, 4, requires_grad=True)
        out = causal_nystrom_attention(*tensors, window=Window(C, W), **count)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(results[0], results[2], strict=True))


@pytest.mark.parametrize("scale", [0.3, 3])
def test_far_mass_lies_between_that_of_landmarks_and_that_of_all_tokens(scale: float) -> None:
    torch.manual_seed(1)
    n = 32
    q, k = scale * torch.randn(2, 1, 3, n, 4, dtype=torch.float64)
    for t in (4, 9, 17, 31):
        first = max(t // C - W + 1, 0) * C
        far = (torch.arange(n) < first).to(q.dtype)[None, None, :, None].expand_as(q)
        share = [attend(q, k, far, count)[0, :, t, 0] for count in (0, 1, 2, 4)]
        share.append(F.scaled_dot_product_attention(q, k, far, is_causal=True)[0, :, t, 0])
        for less, more in pairwise(share):
            assert (less <= more + 1e-12).all()
        assert first == 0 or (share[0] < share[-1]).all()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("count", [1, 3])
def test_no_gradient_from_the_future_and_no_effect_of_what_follows(count: int) -> None:
    q, k, v = inputs(1, 1, 40, 4, requires_grad=True)
    out = attend(q, k, v, count)
    for t in (0, 7, 20, 33):
        for grad in torch.autograd.grad(out[0, 0, t].sum(), (q, k, v), retain_graph=True):
            assert (grad[0, 0, t + 1 :] == 0).all()
        whole = torch.autograd.grad(out[0, 0, t].sum(), v, retain_graph=True)[0]
        assert (whole[0, 0, : t + 1] != 0).any(-1).all()  # all of the past is seen
    with torch.no_grad():
        for n in (13, 27, 39):
            prefix = attend(q[:, :, :n], k[:, :, :n], v[:, :, :n], count)
            torch.testing.assert_close(prefix, out[:, :, :n], rtol=0, atol=1e-13)
            other = [torch.cat([x[:, :, :n], 9 * x[:, :, n:].flip(2)], dim=2) for x in (q, k, v)]
            assert torch.equal(attend(*other, count)[:, :, :n], out[:, :, :n])


def test_each_token_chooses_for_itself() -> None:
    """Two tokens of one segment and two heads that ask for different segments."""
    n, d = 20, 4
    q, k, v = (torch.zeros(1, 2, n, d, dtype=torch.float64) for _ in range(3))
    for j in range(4):  # the first token of segment j has a key of its own, and value j + 1
        k[0, :, j * C, j], v[0, :, j * C] = 9, j + 1
    for head, token, j in ((0, 18, 1), (0, 19, 2), (1, 18, 3), (1, 19, 0)):
        q[0, head, token, j] = 9
    got, exact = attend(q, k, v, 1)[0, :, 18:, 0], F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(got, torch.tensor([[2, 3], [4, 1]], dtype=got.dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(got, exact[0, :, 18:, 0], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("tiles")
def test_of_equal_segments_the_oldest_is_chosen() -> None:
    q, k, v = inputs(1, 2, 30, 4)
    k = k[:, :, :C].repeat(1, 1, 15, 1)
    q = q[:, :, :C].repeat(1, 1, 15, 1)
    for count in (1, 2):
        got, expected = attend(q, k, v, count), formula(q, k, v, count)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert logits_and_values(q[0, 0], k[0, 0], v[0, 0], 29, 2)[2] == [0, 1]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_by_differences(weighted: bool) -> None:
    tensors = inputs(1, 1, 9, 2, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, 2, 1, weighted), tensors)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_precision(dtype: torch.dtype, bound: float) -> None:
    """Relative errors of output and gradients, as large as those of the form without."""
    errors = []
    for count in (0, 2):
        exact = inputs(1, 2, 60, 8)
        exact = [x.to(dtype).double().requires_grad_() for x in exact]
        low = [x.detach().to(dtype).requires_grad_() for x in exact]
        grad = torch.randn(1, 2, 60, 8, dtype=torch.float64).to(dtype)
        a, b = attend(*exact, count), attend(*low, count)
        assert b.dtype == dtype
        wide = [a, *torch.autograd.grad(a, exact, grad.double())]
        narrow = [b, *torch.autograd.grad(b, low, grad)]
        errors.append(max(((x - y).norm() / x.norm()).item() for x, y in zip(wide, narrow, strict=True)))
    assert errors[1] < bound, errors
    assert errors[1] < 2 * errors[0], errors


def test_constants_are_reproduced_and_equal_keys_are_exact() -> None:
    q, k, v = inputs(1, 2, 64, 4)
    torch.testing.assert_close(attend(q, k, torch.ones_like(v), 2), torch.ones_like(v), rtol=0, atol=1e-13)
    same = k[:, :, :1].expand_as(k).contiguous()
    exact = F.scaled_dot_product_attention(q, same, v, is_causal=True)
    torch.testing.assert_close(attend(q, same, v, 2), exact, rtol=0, atol=1e-13)


def test_gradients_reach_the_weight_of_the_inverse() -> None:
    """Values through the triangular inverse are an input as any other."""
    q, k, v = inputs(1, 2, 18, 4)
    gamma = torch.tensor([0.6, 0.8], dtype=torch.float64, requires_grad=True)

    def run(gamma: Tensor) -> Tensor:
        return causal_nystrom_attention(q, k, v, window=Window(C, W), gamma=gamma, recall=2)

    assert torch.autograd.gradcheck(run, [gamma])
    assert (run(gamma) - attend(q, k, v, 2)).abs().max() > 1e-3


def test_a_pyramid_is_refused() -> None:
    q, k, v = inputs(1, 2, 20, 4)
    with pytest.raises(ValueError, match="recall 2 chooses among landmarks of single segments, not among 3 levels"):
        causal_nystrom_attention(q, k, v, window=Window(C, W), pyramid=Pyramid(3, 1, 2), recall=2)
    config = ModelConfig(
        objective="clm", vocab_size=9, hidden_size=8, num_heads=2, landmark_levels=3, recall_segments=2
    )
    with pytest.raises(UserError, match="landmark_levels 3 and recall_segments 2 exclude each other"):
        build_model(config)
