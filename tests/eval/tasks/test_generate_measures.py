"""Measures of texts against closed forms, naive loops and libraries."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from eval.tasks.generation import likeness, measures


def test_distinct_and_repetition_of_known_texts() -> None:
    assert measures.distinct([[1, 2, 3, 1]], 1) == 0.75
    assert measures.distinct([[1, 2], [1, 2]], 2) == 0.5
    assert np.isnan(measures.distinct([[1]], 2))
    assert measures.repeated([1, 2, 3, 4, 1, 2, 3, 4]) == (1, 5)
    assert measures.repeated([7] * 10) == (6, 7)
    assert measures.repeated([1, 2, 3]) == (0, 0)
    assert measures.copied([1, 2, 3, 4, 5], [2, 3, 4, 5, 2, 3, 4, 9]) == (1, 5)
    assert measures.cut_to([[1, 2], [3, 4], [5]], 3) == [[1, 2], [3], []]


def test_repeats_equal_a_naive_search() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 5, 40):
        for vocabulary in (1, 2, 6):
            text = rng.integers(0, vocabulary, size).tolist()
            longest = max(
                (
                    n
                    for n in range(1, size)
                    for i in range(size - n + 1)
                    for j in range(i)
                    if text[i:][:n] == text[j:][:n]
                ),
                default=0,
            )
            assert measures.longest_repeat(text) == longest
            hits = sum(any(text[i] == text[j] for j in range(max(0, i - 3), i)) for i in range(1, size))
            assert measures.repeated_in_window(text, 3) == (hits, max(size - 1, 0))


def test_zipf_exponent_of_exact_power_laws() -> None:
    ranks = np.arange(1, 400)
    for exponent in (0.5, 1.0, 1.7):
        assert measures.zipf_exponent(1e6 * ranks**-exponent) == pytest.approx(exponent, rel=1e-9)
    spoilt = 1e6 / ranks
    spoilt[:9] = 1e9  # the first ranks are not fitted
    assert measures.zipf_exponent(spoilt) == pytest.approx(1, rel=1e-9)
    assert np.isnan(measures.zipf_exponent(1e6 / ranks[:28]))
    assert measures.rank_frequencies([[3, 1, 3], [3, 1, 2]]).tolist() == [3, 2, 1]


def test_self_bleu_of_known_texts() -> None:
    same = ["the river runs past the stone house"] * 3
    assert measures.self_bleu(same) == pytest.approx(1)
    assert measures.self_bleu(["a b c d e f", "g h i j k l", "m n o p q r"]) < 0.1
    # Of "a b c d e" against "a b c d x": precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty.
    assert measures.self_bleu(["a b c d e", "a b c d x"]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert np.isnan(measures.self_bleu(["alone"]))


def test_cosines_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 8))
    assert likeness.cosines(a, b) == pytest.approx(np.diag(cosine_similarity(a, b)))
    a[2] = 0
    assert likeness.cosines(a, b)[2] == 0
    for count in (2, 3, 8):
        assert sorted(likeness.others(count)) == list(range(count))
        assert not any(likeness.others(count) == np.arange(count))
    assert likeness.others(1).tolist() == [0]


def test_mauve_is_near_one_for_one_distribution_and_falls_with_distance(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 300, 16)) + 1
    same, std = likeness.mauve(first, second)
    near, _ = likeness.mauve(first + np.linspace(0, 1, 16), second)
    far, _ = likeness.mauve(first * np.where(np.arange(16) < 8, -1, 1), second)
    assert same > 0.9
    assert same > near > far
    assert far < 0.1
    assert 0 < std < 0.1
    assert likeness.mauve(first, second) == (same, std)
    assert capfd.readouterr().err == ""


def test_mauve_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fewer than 100 texts" in (likeness.mauve_problem(99) or "")
    monkeypatch.setattr(likeness, "find_spec", lambda name: None)
    assert "pip install" in (likeness.mauve_problem(100) or "")
    monkeypatch.setattr(likeness, "find_spec", lambda name: name)
    assert likeness.mauve_problem(100) is None
