"""Masked language modeling noise: rates by counting, and a function of (seed, sample id) only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_pipeline.batches.masking import IGNORE, mask_tokens
from data_pipeline.errors import UserError

VOCABULARY = 1000
SPECIAL = (0, 1, 2, 3, 4)
MASK = 4
BERT: dict[str, Any] = {
    "seed": 1,
    "rate": 0.15,
    "mask_share": 0.8,
    "random_share": 0.1,
    "mask_id": MASK,
    "special_ids": SPECIAL,
    "vocab_size": VOCABULARY,
}


def rows(count: int, length: int, low: int = 0) -> np.ndarray:
    return np.random.default_rng(0).integers(low, VOCABULARY, (count, length))


def within(count: int, of: int, share: float) -> bool:
    """Within 5 standard deviations of a binomial count."""
    return bool(abs(count - of * share) <= 5 * np.sqrt(of * share * (1 - share)) + 1e-9)


@pytest.mark.parametrize(
    ("rate", "mask_share", "random_share"), [(0.15, 0.8, 0.1), (0.4, 0.5, 0.5), (0.3, 0.0, 0.0), (0.3, 1.0, 0.0)]
)
def test_rates(rate: float, mask_share: float, random_share: float) -> None:
    ids = rows(400, 500)
    options = {**BERT, "rate": rate, "mask_share": mask_share, "random_share": random_share}
    inputs, labels = mask_tokens(ids, np.arange(400), **options)
    targets = labels != IGNORE
    ordinary = ids >= len(SPECIAL)
    assert within(int(targets.sum()), int(ordinary.sum()), rate)
    np.testing.assert_array_equal(labels[targets], ids[targets])
    np.testing.assert_array_equal(inputs[~targets], ids[~targets])
    number = int(targets.sum())
    masked = int((inputs[targets] == MASK).sum())
    changed = int(((inputs[targets] != MASK) & (inputs[targets] != ids[targets])).sum())
    assert within(masked, number, mask_share)
    assert within(changed, number, random_share * (1 - 1 / (VOCABULARY - len(SPECIAL))))  # the same token may be drawn
    assert targets.any(axis=0).all()  # no position is left out, the first and the last included


def test_special_tokens_are_never_targets_and_never_drawn() -> None:
    ids = np.tile(np.array([0, 1, 2, 3, 4, 500, 501]), (200, 50))
    inputs, labels = mask_tokens(ids, np.arange(200), **{**BERT, "rate": 0.9, "mask_share": 0.0, "random_share": 1.0})
    special = np.isin(ids, SPECIAL)
    assert (labels[special] == IGNORE).all()
    np.testing.assert_array_equal(inputs[special], ids[special])
    drawn = inputs[labels != IGNORE]
    assert len(drawn) > 10_000
    assert not np.isin(drawn, SPECIAL).any()


def test_special_ids_may_lie_anywhere() -> None:
    special = (3, 500, 999)
    options = {**BERT, "special_ids": special, "mask_id": 500, "rate": 0.5, "mask_share": 0.0, "random_share": 1.0}
    ids = rows(100, 300)
    inputs, labels = mask_tokens(ids, np.arange(100), **options)
    assert (labels[np.isin(ids, special)] == IGNORE).all()
    assert not np.isin(inputs[labels != IGNORE], special).any()


def test_random_tokens_are_uniform_over_the_ordinary_ones() -> None:
    ids = np.full((400, 500), 7)
    inputs, labels = mask_tokens(ids, np.arange(400), **{**BERT, "rate": 0.9, "mask_share": 0.0, "random_share": 1.0})
    counts = np.bincount(inputs[labels != IGNORE], minlength=VOCABULARY)[len(SPECIAL) :]
    expected = counts.sum() / len(counts)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - (len(counts) - 1)) < 6 * np.sqrt(2 * len(counts))


def test_noise_depends_on_seed_and_sample_id_only() -> None:
    ids, samples = rows(32, 64), np.arange(32) * 64 + 10**12
    inputs, labels = mask_tokens(ids, samples, **BERT)
    shuffled = np.random.default_rng(1).permutation(32)
    for chosen in (shuffled, shuffled[:5], np.array([31]), np.array([3, 3, 3])):
        again = mask_tokens(ids[chosen], samples[chosen], **BERT)
        np.testing.assert_array_equal(again[0], inputs[chosen])
        np.testing.assert_array_equal(again[1], labels[chosen])
    other_seed = mask_tokens(ids, samples, **{**BERT, "seed": 2})[1]
    other_samples = mask_tokens(ids, samples + 1, **BERT)[1]
    for other in (other_seed, other_samples):
        assert 0.1 < ((other != IGNORE) & (labels != IGNORE)).sum() / (labels != IGNORE).sum() < 0.2  # as by chance


def test_a_shorter_row_has_the_beginning_of_the_noise() -> None:
    ids, samples = rows(8, 128), np.arange(8)
    inputs, labels = mask_tokens(ids, samples, **BERT)
    short = mask_tokens(ids[:, :48], samples, **BERT)
    np.testing.assert_array_equal(short[0], inputs[:, :48])
    np.testing.assert_array_equal(short[1], labels[:, :48])


def test_rows_are_independent_of_each_other() -> None:
    _, labels = mask_tokens(rows(2000, 16, low=5), np.arange(2000), **{**BERT, "rate": 0.5})
    targets = (labels != IGNORE).astype(float)
    assert np.abs(np.corrcoef(targets[:-1].ravel(), targets[1:].ravel())[0, 1]) < 0.03
    assert np.abs(np.corrcoef(targets[:, :-1].ravel(), targets[:, 1:].ravel())[0, 1]) < 0.03


GOLDEN_TARGETS = [6, 7, 8, 13, 15, 18, 20, 22, 24, 27, 30, 31, 32, 34, 37, 39]
GOLDEN_INPUTS = [958, 4, 4, 652, 4, 4, 203, 4, 4, 4, 4, 131, 188, 422, 4, 139]


def test_the_stream_of_noise_is_fixed() -> None:
    """A change of the generator would change resumed runs: these values may not move."""
    options = {**BERT, "rate": 0.4, "mask_share": 0.4, "random_share": 0.4}
    inputs, labels = mask_tokens(np.arange(100, 140)[None], np.array([12345]), **options)
    assert np.flatnonzero(labels[0] != IGNORE).tolist() == GOLDEN_TARGETS
    assert inputs[0, GOLDEN_TARGETS].tolist() == GOLDEN_INPUTS


def test_the_input_is_not_changed_and_types_hold() -> None:
    ids = rows(4, 32)
    before = ids.copy()
    inputs, labels = mask_tokens(ids, np.arange(4), **BERT)
    np.testing.assert_array_equal(ids, before)
    assert inputs.dtype == labels.dtype == np.int64
    assert inputs.shape == labels.shape == (4, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.0}, "masking rate"),
        ({"rate": 1.0}, "masking rate"),
        ({"mask_share": 0.8, "random_share": 0.3}, "sum to more than 1"),
        ({"mask_share": -0.1}, "must not be negative"),
    ],
)
def test_impossible_shares_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mask_tokens(rows(1, 8), np.arange(1), **{**BERT, **change})
