"""The filters against transformers', draws against their probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.model.sampling import Sampling, draw, keep_top_k, keep_top_p, penalize, uniform_noise


def random_logits(rows: int = 5, vocabulary: int = 40) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("k", [1, 7, 40, 100])
def test_top_k_is_that_of_transformers(k: int) -> None:
    transformers = pytest.importorskip("transformers")
    logits = random_logits()
    logits[:, 3:6] = logits[:, 3:4]  # ties
    expected = transformers.TopKLogitsWarper(k)(torch.zeros(5, 1), logits.clone())
    torch.testing.assert_close(keep_top_k(logits, k), expected, rtol=0, atol=0)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.8, 0.95, 0.9999])
def test_top_p_is_that_of_transformers(p: float) -> None:
    transformers = pytest.importorskip("transformers")
    logits = random_logits()
    expected = transformers.TopPLogitsWarper(p)(torch.zeros(5, 1), logits.clone())
    torch.testing.assert_close(keep_top_p(logits, p), expected, rtol=0, atol=0)


def test_nucleus_is_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64).log()
    for p, kept in [(0.2, [1]), (0.49, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, [1, 2, 3]), (0.91, [0, 1, 2, 3])]:
        assert keep_top_p(logits, p).isfinite()[0].nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_penalty_is_that_of_transformers(penalty: float) -> None:
    transformers = pytest.importorskip("transformers")
    logits, text = random_logits(), torch.tensor([[1, 2, 2], [0, 0, 0], [39, 7, 1], [4, 5, 6], [9, 9, 8]])
    seen = torch.zeros(5, 40, dtype=torch.bool).scatter(1, text, True)
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(text, logits.clone())
    torch.testing.assert_close(penalize(logits, seen, penalty), expected, rtol=0, atol=0)


def test_all_in_their_order_as_transformers_chains_them() -> None:
    transformers = pytest.importorskip("transformers")
    rows = 4000
    logits, text = random_logits(1).expand(rows, -1), torch.full((rows, 2), 3)
    seen = torch.zeros(rows, 40, dtype=torch.bool).scatter(1, text, True)
    chain = transformers.LogitsProcessorList(
        [
            transformers.RepetitionPenaltyLogitsProcessor(1.5),
            transformers.TemperatureLogitsWarper(1.7),
            transformers.TopKLogitsWarper(12),
            transformers.TopPLogitsWarper(0.9),
        ]
    )
    expected = chain(text[:1], logits[:1].clone()).softmax(-1)[0]
    noise = torch.linspace(0, 1, rows + 1, dtype=torch.float64)[:-1]
    sampling = Sampling(repetition_penalty=1.5, temperature=1.7, top_k=12, top_p=0.9)
    shares = torch.bincount(sampling.choose(logits, noise, seen), minlength=40) / rows
    assert (expected == 0).any()
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=2 / rows)


def test_draws_never_leave_what_is_possible() -> None:
    probabilities = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]], dtype=torch.float64)
    largest = 1 - 2**-53
    for noise, token in [(0.0, 1), (0.29, 1), (0.31, 3), (largest, 3)]:
        assert draw(probabilities, torch.tensor([noise], dtype=torch.float64)).item() == token


def test_temperature_zero_and_nearly_zero_take_the_likeliest() -> None:
    logits, noise = random_logits(), torch.full((5,), 0.999, dtype=torch.float64)
    best = logits.argmax(-1)
    assert torch.equal(Sampling(temperature=0).choose(logits, noise), best)
    assert torch.equal(Sampling(temperature=1e-300, top_p=0.9).choose(logits, noise), best)


def test_noise_is_each_seeds_own() -> None:
    noise = uniform_noise([4, 5], 6)
    assert torch.equal(noise[1:], uniform_noise([5], 6))
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0 must not be negative"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1 must not be negative"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 must be above 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        Sampling().choose(torch.tensor([[0.0, float("nan")]]), torch.zeros(1, dtype=torch.float64))
