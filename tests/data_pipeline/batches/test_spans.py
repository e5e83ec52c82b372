"""Which spans are masked: against span after span in plain Python, and by counting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_pipeline.batches.spans import choose_spans

SPANBERT: dict[str, Any] = {"rate": 0.15, "span_p": 0.2, "span_max": 10}


def layout(rows: int, length: int, mean: float = 1e9, continuing: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ordinary): special tokens every ``mean`` tokens, padding at the end of some rows, words between."""
    generator = np.random.default_rng(0)
    ordinary = generator.random((rows, length)) > 1 / mean
    for row in range(0, rows, 4):
        ordinary[row, int(generator.integers(0, length + 1)) :] = False
    starts = generator.random((rows, length)) > continuing
    starts |= ~ordinary
    starts[:, 1:] |= ~ordinary[:, :-1]
    starts[:, 0] = True
    return starts, ordinary


def noise(rows: int, length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (rows, length + 1), dtype=np.uint64)


def chosen(starts: np.ndarray, ordinary: np.ndarray, **options: Any) -> np.ndarray:
    """The targets as (rows, length) bool."""
    targets = np.zeros(starts.shape, dtype=bool)
    targets.reshape(-1)[choose_spans(starts, ordinary, noise(*starts.shape), **{**SPANBERT, **options})[0]] = True
    return targets


def words_of(starts: list[bool]) -> list[list[int]]:
    words: list[list[int]] = []
    for place, begins in enumerate(starts):
        words.append([place]) if begins else words[-1].append(place)
    return words


def one_after_the_other(
    starts: list[bool], ordinary: list[bool], drawn: list[int], rate: float, span_p: float, span_max: int
) -> dict[int, int]:
    """Target -> first token of its span in one row, taking span after span as SpanBERT does."""
    words = words_of(starts)
    weights = [(1 - span_p) ** n * span_p for n in range(span_max)]
    candidates = []
    for index, word in enumerate(words):
        if not ordinary[word[0]]:
            continue
        # Longer than n words with the probability that is left after n, in steps of 2^-24.
        size = 1
        while size < span_max and drawn[word[0]] % 2**24 < round(sum(weights[size:]) / sum(weights) * 2**24):
            size += 1
        places: list[int] = []
        for following in words[index : index + size]:
            if not ordinary[following[0]]:
                break
            places += following
        candidates.append((drawn[word[0]] >> 24, places))
    targets: dict[int, int] = {}
    budget = rate * sum(ordinary)
    for _, places in sorted(candidates):
        new = [place for place in places if place not in targets]
        if len(targets) + len(new) > budget:
            uniform = (drawn[-1] >> 11) / 2**53
            if uniform * len(new) < budget - len(targets):
                targets |= dict.fromkeys(new, places[0])
            break
        targets |= dict.fromkeys(new, places[0])
    return targets


def assert_same_as_one_after_the_other(starts: np.ndarray, ordinary: np.ndarray, **options: Any) -> None:
    rows, length = starts.shape
    drawn = noise(rows, length)
    expected = {
        row * length + place: row * length + first
        for row in range(rows)
        for place, first in sorted(
            one_after_the_other(starts[row].tolist(), ordinary[row].tolist(), drawn[row].tolist(), **options).items()
        )
    }
    targets, first = choose_spans(starts, ordinary, drawn, **options)
    assert targets.tolist() == list(expected)
    assert first.tolist() == list(expected.values())


@pytest.mark.parametrize("shape", [(30, 97), (200, 6), (3, 1), (2, 700)])
@pytest.mark.parametrize(
    "options", [SPANBERT, {"rate": 0.5, "span_p": 0.05, "span_max": 40}, {"rate": 0.9, "span_p": 0.6, "span_max": 3}]
)
def test_the_same_as_one_span_after_the_other(shape: tuple[int, int], options: dict[str, Any]) -> None:
    for mean in (12, 1e9):
        assert_same_as_one_after_the_other(*layout(*shape, mean), **options)


def test_rows_of_few_words_among_rows_of_many() -> None:
    """The spans looked at first, by the batch's average of words, do not fill the budget of such rows."""
    starts, ordinary = np.ones((8, 300), dtype=bool), np.ones((8, 300), dtype=bool)
    starts[:2, 1:] = False
    starts[2] = np.arange(300) % 60 == 0
    ordinary[3] = False
    for rate in (0.15, 0.4):
        assert_same_as_one_after_the_other(starts, ordinary, rate=rate, span_p=0.2, span_max=10)


@pytest.mark.parametrize(("length", "mean"), [(512, 1e9), (512, 40), (64, 30), (9, 1e9)])
@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_the_budget_is_met(length: int, mean: float, rate: float) -> None:
    """In each row within a span, and on average exactly."""
    starts, ordinary = layout(2000, length, mean)
    targets = chosen(starts, ordinary, rate=rate)
    assert not targets[~ordinary].any()
    excess = targets.sum(axis=1) - rate * ordinary.sum(axis=1)
    longest = np.diff(np.append(np.flatnonzero(starts), starts.size)).max() * 10
    assert (np.abs(excess) < longest).all()
    assert abs(excess.mean()) < 5 * excess.std() / np.sqrt(len(excess))
    assert excess.std() < 8  # of the order of a span, some six tokens


def test_lengths_are_geometric_up_to_the_longest() -> None:
    """Among few targets spans seldom touch: the runs of targets are the spans (words of one token here)."""
    everywhere = np.ones((4000, 500), dtype=bool)
    targets = chosen(everywhere, everywhere, rate=0.008)
    edges = np.diff(np.pad(targets, ((0, 0), (1, 1))).astype(int), axis=1)
    runs = np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]
    # A budget of 4: the first span is taken if it is no longer than that, else with probability 4 / length. Runs above
    # 4 tokens are in next to all rows the first span.
    expected = 0.8 ** np.arange(4, 10) / np.arange(5, 11)
    counts = np.bincount(runs, minlength=11)
    np.testing.assert_allclose(counts[5:11] / counts[5:11].sum(), expected / expected.sum(), atol=0.04)
    assert counts[11:].sum() < 0.02 * counts.sum()


def test_spans_begin_with_a_word_hold_whole_words_and_stay_within_documents() -> None:
    starts, ordinary = layout(200, 128, mean=12)
    targets, first = choose_spans(starts, ordinary, noise(200, 128), rate=0.5, span_p=0.05, span_max=50)
    assert (np.diff(targets) > 0).all()
    assert starts.reshape(-1)[first].all()
    # Equally many special tokens lie before the two, and they are in one row.
    document = np.cumsum(~ordinary)
    np.testing.assert_array_equal(document[targets], document[first])
    np.testing.assert_array_equal(targets // 128, first // 128)
    assert ordinary.reshape(-1)[targets].all()
    whole = np.zeros(starts.size, dtype=bool)
    whole[targets] = True
    continuing = np.flatnonzero(~starts)
    np.testing.assert_array_equal(whole[continuing], whole[continuing - 1])
    assert (targets - first).max() > 20  # long enough that some had to be cut


def test_one_word_at_most_or_for_certain() -> None:
    starts, ordinary = layout(200, 200)
    one = chosen(starts, ordinary, span_max=1)
    np.testing.assert_array_equal(one, chosen(starts, ordinary, span_p=1.0))
    assert abs(one.sum() / ordinary.sum() - 0.15) < 0.005


def test_nothing_to_mask() -> None:
    for shape in ((0, 8), (2, 0), (3, 8)):
        targets, first = choose_spans(np.ones(shape, bool), np.zeros(shape, bool), noise(*shape), **SPANBERT)
        assert len(targets) == len(first) == 0


def test_rows_longer_than_the_numbers_of_spans_are_refused() -> None:
    shape = (1, (1 << 24) + 1)
    flags = np.broadcast_to(np.array(True), shape)
    with pytest.raises(ValueError, match="numbered with 24 bits"):
        choose_spans(flags, flags, np.broadcast_to(np.uint64(0), shape), **SPANBERT)


def test_spans_of_several_words_end_with_the_packed_document() -> None:
    starts, edges = np.ones((300, 64), dtype=bool), np.zeros((300, 64), dtype=bool)  # every token a word
    pieces = np.broadcast_to(np.arange(64) // 4, starts.shape)
    edges[:, 4::4] = True
    drawn = np.random.default_rng(0).integers(0, 1 << 63, (300, 65), dtype=np.uint64)
    options = {"rate": 0.3, "span_p": 0.2, "span_max": 10}
    targets, first = choose_spans(starts, starts, drawn, edges, **options)
    assert (pieces.reshape(-1)[targets] == pieces.reshape(-1)[first]).all()
    targets, first = choose_spans(starts, starts, drawn, **options)
    assert (pieces.reshape(-1)[targets] != pieces.reshape(-1)[first]).any()
