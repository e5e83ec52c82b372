"""Bidirectional Nystrom attention: against its formula, its exact limit, and its independence of everything around."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model import Layout
from pretrain.model.attention.inverse import iterative_inverse
from pretrain.model.attention.landmarks import landmark_means
from pretrain.model.attention.layout import Rectangle
from pretrain.model.attention.nystrom import nystrom_attention, pooled_attention

CPU = torch.device("cpu")


def segments(x: Tensor, m: int) -> list[Tensor]:
    """(n, d) in m parts that are as equal as can be."""
    return [x[j * len(x) // m : (j + 1) * len(x) // m] for j in range(m)]


def formula(q: Tensor, k: Tensor, v: Tensor, m: int, iterations: int) -> Tensor:
    """softmax(s Q K~^T) pinv(softmax(s Q~ K~^T)) softmax(s Q~ K^T) V of one head (n, d), every matrix written out."""
    n, d = q.shape
    s = d**-0.5
    if n < 2 * m:
        return (s * q @ k.T).softmax(-1) @ v
    q_mean, k_mean = (torch.stack([part.mean(0) for part in segments(x, m)]) for x in (q, k))
    f, a, b = ((s * x @ y.T).softmax(-1) for x, y in ((q, k_mean), (q_mean, k_mean), (q_mean, k)))
    eye = torch.eye(len(a), dtype=a.dtype)
    z = a.T / (a.sum(0).max() * a.sum(1).max())
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return f @ z @ b @ v


def inputs(*shape: int, seed: int = 0, requires_grad: bool = False) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad) for _ in range(3)]


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, m: int) -> Tensor:
    """(B, N, H, d) in and out."""
    partition = layout.partition(CPU, causal=False, num_landmarks=m)
    outputs = [nystrom_attention(r.take(q), r.take(k), r.take(v), r, num_landmarks=m) for r in partition.rectangles]
    return partition.merge(outputs, v)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 17, 37, 64, 100])
def test_equals_the_formula_at_any_length(n: int) -> None:
    q, k, v = inputs(2, n, 3, 8)
    got = attend(q, k, v, Layout.full(2, n), 8)
    for row in range(2):
        for head in range(3):
            expected = formula(q[row, :, head], k[row, :, head], v[row, :, head], 8, 6)
            torch.testing.assert_close(got[row, :, head], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "layout",
    [
        Layout.from_lengths([0, 5, 37, 100], 100),
        Layout.from_lengths([70, 99, 80, 100], 100),  # one rectangle, no index
        Layout.from_documents(torch.tensor([[0] * 40 + [1] * 23 + [2] * 28 + [3] * 9, [-1] * 60 + [0] * 40] * 2)),
    ],
    ids=["mixed", "similar", "documents"],
)
def test_every_sequence_gets_what_it_gets_alone(layout: Layout) -> None:
    q, k, v = inputs(4, 100, 2, 8)
    got = attend(q, k, v, layout, 8).flatten(0, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    assert layout.starts is not None
    assert layout.lengths is not None
    for start, length in zip(layout.starts, layout.lengths, strict=True):
        of = slice(start, start + length)
        for head in range(2):
            expected = formula(q[of, head], k[of, head], v[of, head], 8, 6)
            torch.testing.assert_close(got[of, head], expected, rtol=0, atol=1e-10)


def test_padding_gets_no_gradient_and_gives_none() -> None:
    layout = Layout.from_lengths([30, 41], 50)
    q, k, v = inputs(2, 50, 2, 8, requires_grad=True)
    out = attend(q, k, v, layout, 8)
    real = torch.arange(50)[None] < torch.tensor([30, 41])[:, None]
    for grad in torch.autograd.grad(out[real].square().sum(), (q, k, v)):
        assert (grad[~real] == 0).all()
        assert (grad[real] != 0).any()


def test_one_landmark_for_each_token_is_exact_attention_as_far_as_the_inverse_converges() -> None:
    q, k, v = inputs(1, 1, 12, 8)
    eye = torch.eye(12, 8, dtype=torch.float64)
    q, k = eye + 0.3 * q, 6 * (eye + 0.1 * k)  # a well-conditioned softmax matrix
    landmarks = (8**-0.5 * q @ k.transpose(-1, -2)).softmax(-1)
    nystrom = landmarks @ iterative_inverse(landmarks, 30) @ landmarks @ v
    torch.testing.assert_close(nystrom, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-8)


def test_fewer_than_two_tokens_for_each_landmark_are_exactly_exact() -> None:
    q, k, v = inputs(2, 2, 15, 4)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(nystrom_attention(q, k, v, Rectangle(15, 15), num_landmarks=8), exact)
    q, k, v = (x[:, :, :8] for x in (q, k, v))
    exact = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(pooled_attention(q, k, v, Rectangle(8, 8), num_landmarks=8), exact)


def test_the_error_has_no_cliff_where_the_landmarks_do_not_divide_the_length() -> None:
    """One token more than a multiple of m = 16 must not cost landmarks. Smooth inputs (AR(1)), 3 seeds: relative errors
    from n = 30 to 49. Segments of ceil(n / m) tokens had 1.5 times the error at 33 and 1.4 at 49."""
    decay = 0.9 ** (torch.arange(49)[:, None] - torch.arange(49)).double()

    def error(n: int, inverse: bool) -> float:
        total = 0.0
        for seed in range(3):
            q, k, v = (decay.tril()[:n, :n] @ x * 0.19**0.5 for x in inputs(1, 4, n, 16, seed=seed))
            exact, full = F.scaled_dot_product_attention(q, k, v), Rectangle(n, n)
            got = (nystrom_attention if inverse else pooled_attention)(q, k, v, full, num_landmarks=16)
            total += float((got - exact).norm() / exact.norm())
        return total / 3

    assert error(31, True) == 0
    for inverse in (True, False):
        for n in (32, 48):
            assert 0 < error(n + 1, inverse) < 1.15 * error(n, inverse)


@pytest.mark.parametrize("layout", [Layout.full(2, 45), Layout.from_lengths([33, 45], 48)], ids=["full", "padded"])
def test_pooled_keys_weigh_what_their_tokens_weigh(layout: Layout) -> None:
    """Against the formula in float64, to float64's precision: log(size) is not rounded to float32 on the way."""
    q, k, v = inputs(2, layout.length, 2, 8)
    lengths = [45, 45] if layout.lengths is None else layout.lengths.tolist()
    (rectangle,) = layout.partition(CPU, causal=False, num_landmarks=16).rectangles
    taken = rectangle.take(q), rectangle.take(k), rectangle.take(v)
    got = pooled_attention(*taken, rectangle, num_landmarks=16)
    for row, n in enumerate(lengths):
        for head in range(2):
            parts = [segments(x[row, :n, head], 16) for x in (k, v)]
            keys, values = (torch.stack([part.mean(0) for part in x]) for x in parts)
            sizes = torch.tensor([len(part) for part in parts[0]]).double()
            expected = (8**-0.5 * q[row, :n, head] @ keys.T + sizes.log()).softmax(-1) @ values
            torch.testing.assert_close(got[row, head, :n], expected, rtol=0, atol=1e-14)


def test_inverse_is_an_inverse_and_scales_each_matrix_by_itself() -> None:
    torch.manual_seed(0)
    a = (3 * torch.eye(6, dtype=torch.float64) + torch.randn(3, 2, 6, 6, dtype=torch.float64)).softmax(-1)
    torch.testing.assert_close(
        iterative_inverse(a, 25) @ a, torch.eye(6, dtype=torch.float64).expand_as(a), rtol=0, atol=1e-9
    )
    together, alone = iterative_inverse(a, 4), iterative_inverse(a[1:2], 4)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-12)
    published = iterative_inverse(a, 4, "original")
    assert (published[1:2] - iterative_inverse(a[1:2], 4, "original")).abs().max() > 1e-6  # why it is not the default


def test_landmarks_are_means_over_as_many_segments_as_asked_for() -> None:
    x = torch.arange(10.0).view(1, 1, 10, 1)  # segments of 2, 3, 2 and 3 tokens
    assert landmark_means(x, Rectangle(10, 10), 4).flatten().tolist() == [0.5, 3.0, 5.5, 8.0]


@pytest.mark.parametrize("layout", [Layout.full(2, 48), Layout.full(2, 45), Layout.from_lengths([33, 45], 48)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_landmarks_of_16_bit_inputs_are_float32(layout: Layout, dtype: torch.dtype) -> None:
    """Sums in 16 bits had an error of 1.6e-3, and in float16 they overflowed."""
    (rectangle,) = layout.partition(CPU, causal=False, num_landmarks=16).rectangles
    x = rectangle.take(2e4 * torch.rand(2, layout.length, 2, 8).to(dtype) + 3e4)
    means = landmark_means(x, rectangle, 16)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means.double(), landmark_means(x.double(), rectangle, 16), rtol=1e-6, atol=0)


@pytest.mark.parametrize("attention", [nystrom_attention, pooled_attention])
def test_float16_is_finite_where_a_logit_exceeds_its_range(attention: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    q, k, v = ((scale * torch.randn(1, 2, 64, 8)).half().requires_grad_() for scale in (400, 400, 1))
    out = attention(q, k, v, Rectangle(64, 64), num_landmarks=8)
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.float().sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_stays_at_its_fixed_point(dtype: torch.dtype) -> None:
    """Rounding in the null space of a singular matrix grows by 13/4 a step: equal rows gave NaN at 50 steps."""
    torch.manual_seed(0)
    some = torch.randn(6, 12, dtype=torch.float64).softmax(-1)
    equal, twice = some[:1].expand(12, 12), some.repeat_interleave(2, 0)  # ranks 1 and 6
    regular = (2 * torch.eye(12, dtype=torch.float64)).softmax(-1)
    a = torch.stack([equal, twice, regular]).to(dtype)[None]
    tolerance = 2e-3 if dtype == torch.float32 else 1e-10
    expected = torch.linalg.pinv(a.double(), rtol=1e-5)
    for steps in (50, 100):
        got = iterative_inverse(a, steps)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    singular = a.requires_grad_()
    iterative_inverse(singular, 50).square().sum().backward()
    assert singular.grad is not None
    assert singular.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_within_two_percent_and_inverts_in_float32(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def spy(matrix: Tensor, *args: object) -> Tensor:
        result = iterative_inverse(matrix, *args)  # type: ignore[arg-type]
        seen.extend([matrix.dtype, result.dtype])
        return result

    monkeypatch.setattr("pretrain.model.attention.nystrom.iterative_inverse", spy)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 256, 16).cumsum(2) / 8 for _ in range(3))  # smooth along the sequence
    expected = nystrom_attention(q.double(), k.double(), v.double(), Rectangle(256, 256), num_landmarks=16)
    seen.clear()
    low = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = nystrom_attention(*low, Rectangle(256, 256), num_landmarks=16)
    assert got.dtype == torch.bfloat16
    assert seen == [torch.float32, torch.float32]
    assert (got.double() - expected).norm() / expected.norm() < 0.02
    got.float().square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in low)
