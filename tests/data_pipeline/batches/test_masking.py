"""Masked language modeling noise: against plain loops, rates by counting, and a function of (seed, sample id) only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data_pipeline.batches import IGNORE
from data_pipeline.batches.masking import Masking, mask_tokens
from data_pipeline.batches.spans import choose_spans
from data_pipeline.batches.words import INSIDE, LETTER, SPACE, WordBoundaries
from data_pipeline.errors import UserError

VOCABULARY = 1000
SPECIAL = (0, 1, 2, 3, 4)
PAD, EOS, MASK = 1, 2, 4
# Of the ordinary tokens the even ones begin a word, the odd ones continue one.
WORDS = WordBoundaries(
    [(SPACE, 0)] * len(SPECIAL)
    + [(LETTER if i % 2 else SPACE, LETTER | INSIDE) for i in range(len(SPECIAL), VOCABULARY)]
)
UNITS = ("token", "word", "span")
MASK64 = (1 << 64) - 1


def mask(ids: np.ndarray, samples: np.ndarray, seed: int = 1, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    return mask_tokens(
        ids,
        samples,
        seed=seed,
        masking=Masking(**options),
        boundaries=WORDS,
        mask_id=MASK,
        special_ids=SPECIAL,
        vocab_size=VOCABULARY,
    )


def rows(count: int, length: int, low: int = 0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, VOCABULARY, (count, length))


def documents(count: int, length: int, mean: int, seed: int = 0) -> np.ndarray:
    """Rows of ordinary tokens with documents closed by eos, and padding at the end of some."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(len(SPECIAL), VOCABULARY, (count, length))
    ids[generator.random(ids.shape) < 1 / mean] = EOS
    for row in range(0, count, 4):
        ids[row, int(generator.integers(0, length)) :] = PAD
    return ids


def within(count: float, of: float, share: float, spread: float = 1.0) -> bool:
    """Within 5 standard deviations of a binomial count, ``spread`` times as wide."""
    return bool(abs(count - of * share) <= 5 * spread * np.sqrt(of * share * (1 - share)) + 1e-9)


# Plain loops over Python integers.


def word64(seed: int, sample: int, counter: int) -> int:
    def mixed(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    key = mixed((mixed(seed) + sample * gamma) & MASK64)
    return mixed((key + counter * gamma) & MASK64)


def words_of(row: list[int]) -> list[list[int]]:
    """Positions of each word; a special token is one of its own."""
    words: list[list[int]] = []
    for place, token in enumerate(row):
        if words and token not in SPECIAL and token % 2 and row[place - 1] not in SPECIAL:
            words[-1].append(place)
        else:
            words.append([place])
    return words


def reference(
    ids: np.ndarray, samples: np.ndarray, seed: int, masking: Masking
) -> tuple[list[list[int]], list[list[int]]]:
    ordinary = [token for token in range(VOCABULARY) if token not in SPECIAL]
    inputs, labels = ids.tolist(), [[IGNORE] * ids.shape[1] for _ in ids]
    for row, answers, sample in zip(inputs, labels, samples.tolist(), strict=True):

        def chosen(place: int, sample: int = sample) -> bool:
            word = word64(seed, sample, place // 2)
            return (word >> 32 if place % 2 else word % 2**32) < masking.rate * 2**32

        if masking.unit == "token":
            targets = {place: place for place in range(len(row)) if chosen(place)}
        elif masking.unit == "word":
            targets = {place: place for word in words_of(row) if chosen(word[0]) for place in word}
        else:
            words = [word64(seed, sample, (1 << 33) + place) for place in range(len(row) + 1)]
            starts, drawn = WORDS.starts(np.array([row])), np.array([words], dtype=np.uint64)
            options: Any = {"rate": masking.rate, "span_p": masking.span_p, "span_max": masking.span_max}
            places, first = choose_spans(starts, ~np.isin([row], SPECIAL), drawn, **options)  # see test_spans.py
            targets = dict(zip(places.tolist(), first.tolist(), strict=True))
        for place, deciding in targets.items():
            if row[place] in SPECIAL:
                continue
            answers[place] = row[place]
            how = (word64(seed, sample, (1 << 32) + deciding) >> 32) / 2**32
            if how < masking.mask_share:
                row[place] = MASK
            elif how < masking.mask_share + masking.random_share:
                row[place] = ordinary[word64(seed, sample, (1 << 32) + place) % 2**32 * len(ordinary) >> 32]
    return inputs, labels


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shape", [(6, 97), (40, 6), (3, 1), (1, 400)])
@pytest.mark.parametrize(
    "options", [{}, {"rate": 0.5, "mask_share": 0.3, "random_share": 0.5}, {"span_p": 0.6, "span_max": 3, "rate": 0.9}]
)
def test_the_same_as_plain_loops(unit: str, shape: tuple[int, int], options: dict[str, Any]) -> None:
    ids, samples = documents(*shape, mean=20), np.arange(shape[0]) * 7919 + 10**14
    inputs, labels = mask(ids, samples, seed=3, unit=unit, **options)
    expected = reference(ids, samples, 3, Masking(unit=unit, **options))  # type: ignore[arg-type]
    assert labels.tolist() == expected[1]
    assert inputs.tolist() == expected[0]


@pytest.mark.parametrize("unit", ["token", "word"])
@pytest.mark.parametrize(
    ("rate", "mask_share", "random_share"), [(0.15, 0.8, 0.1), (0.4, 0.5, 0.5), (0.3, 0.0, 0.0), (0.3, 1.0, 0.0)]
)
def test_rates(unit: str, rate: float, mask_share: float, random_share: float) -> None:
    ids = rows(400, 500)
    inputs, labels = mask(ids, np.arange(400), unit=unit, rate=rate, mask_share=mask_share, random_share=random_share)
    targets = labels != IGNORE
    ordinary = ids >= len(SPECIAL)
    # Words of 2 tokens on average, geometric: counts spread by the root of E[n^2] / E[n] = 3.
    assert within(int(targets.sum()), int(ordinary.sum()), rate, 1.0 if unit == "token" else 3**0.5)
    check_shares(ids, inputs, labels, mask_share, random_share)
    assert targets.any(axis=0).all()  # no position is left out, the first and the last included


def check_shares(
    ids: np.ndarray, inputs: np.ndarray, labels: np.ndarray, mask_share: float, random_share: float, spread: float = 1.0
) -> None:
    targets = labels != IGNORE
    np.testing.assert_array_equal(labels[targets], ids[targets])
    np.testing.assert_array_equal(inputs[~targets], ids[~targets])
    number = int(targets.sum())
    masked = int((inputs[targets] == MASK).sum())
    changed = int(((inputs[targets] != MASK) & (inputs[targets] != ids[targets])).sum())
    assert within(masked, number, mask_share, spread)
    # The same token may be drawn.
    assert within(changed, number, random_share * (1 - 1 / (VOCABULARY - len(SPECIAL))), spread)


@pytest.mark.parametrize("unit", UNITS)
def test_special_tokens_and_padding_are_never_targets_and_never_drawn(unit: str) -> None:
    ids = documents(300, 100, mean=10)
    inputs, labels = mask(ids, np.arange(300), unit=unit, rate=0.9, mask_share=0.0, random_share=1.0)
    special = np.isin(ids, SPECIAL)
    assert (labels[special] == IGNORE).all()
    np.testing.assert_array_equal(inputs[special], ids[special])
    drawn = inputs[labels != IGNORE]
    assert len(drawn) > 10_000
    assert not np.isin(drawn, SPECIAL).any()


@pytest.mark.parametrize("unit", UNITS)
def test_rows_without_an_ordinary_token_and_empty_batches(unit: str) -> None:
    for shape in ((3, 8), (0, 8), (2, 0)):
        ids = np.full(shape, PAD)
        inputs, labels = mask(ids, np.arange(shape[0]), unit=unit, rate=0.9)
        np.testing.assert_array_equal(inputs, ids)
        assert labels.shape == shape
        assert (labels == IGNORE).all()
    mixed = np.array([[PAD] * 8, [10] * 8])
    assert ((mask(mixed, np.arange(2), unit=unit, rate=0.9)[1] != IGNORE).sum(axis=1) > 0).tolist() == [False, True]


def test_special_ids_may_lie_anywhere() -> None:
    special = (3, 500, 999)
    ids = rows(100, 300)
    inputs, labels = mask_tokens(
        ids,
        np.arange(100),
        seed=1,
        masking=Masking(rate=0.5, mask_share=0.0, random_share=1.0),
        boundaries=None,
        mask_id=500,
        special_ids=special,
        vocab_size=VOCABULARY,
    )
    assert (labels[np.isin(ids, special)] == IGNORE).all()
    assert not np.isin(inputs[labels != IGNORE], special).any()


@pytest.mark.parametrize("unit", UNITS)
def test_random_tokens_are_uniform_over_the_ordinary_ones(unit: str) -> None:
    ids = np.full((400, 500), 7)
    inputs, labels = mask(ids, np.arange(400), unit=unit, rate=0.9, mask_share=0.0, random_share=1.0)
    counts = np.bincount(inputs[labels != IGNORE], minlength=VOCABULARY)[len(SPECIAL) :]
    expected = counts.sum() / len(counts)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - (len(counts) - 1)) < 6 * np.sqrt(2 * len(counts))


def test_targets_are_spread_evenly_over_positions_and_rows() -> None:
    _, labels = mask(rows(2000, 512, low=5), np.arange(2000) * 512)
    targets = labels != IGNORE
    for axis in (0, 1):
        counts = targets.sum(axis=axis)
        number = targets.shape[axis]
        chi_square = ((counts - number * 0.15) ** 2 / (number * 0.15 * 0.85)).sum()
        assert abs(chi_square - len(counts)) < 6 * np.sqrt(2 * len(counts))


def test_neighbours_are_independent() -> None:
    """Targets at neighbouring positions, in neighbouring samples (by one, by one bit) and under neighbouring seeds."""
    ids, samples = rows(2000, 128, low=5), np.arange(2000)
    targets = mask(ids, samples)[1] != IGNORE
    pairs = [(targets[:, :-distance], targets[:, distance:]) for distance in (1, 2, 3, 64)]
    pairs += [(targets, mask(ids, samples ^ (1 << bit))[1] != IGNORE) for bit in (0, 1, 10, 30, 62)]
    pairs += [(targets, mask(ids, samples + 1)[1] != IGNORE)]
    pairs += [(targets, mask(ids, samples, seed=seed)[1] != IGNORE) for seed in (0, 2, 1 + (1 << 40))]
    for a, b in pairs:
        assert within(int((a & b).sum()), a.size, 0.15**2)


@pytest.mark.parametrize("unit", UNITS)
def test_noise_depends_on_seed_and_sample_id_only(unit: str) -> None:
    ids, samples = documents(32, 64, mean=30), np.arange(32) * 64 + 10**12
    inputs, labels = mask(ids, samples, unit=unit)
    shuffled = np.random.default_rng(1).permutation(32)
    for chosen in (shuffled, shuffled[:5], np.array([31]), np.array([3, 3, 3])):
        again = mask(ids[chosen], samples[chosen], unit=unit)
        np.testing.assert_array_equal(again[0], inputs[chosen])
        np.testing.assert_array_equal(again[1], labels[chosen])
    for other in (mask(ids, samples, seed=2, unit=unit)[1], mask(ids, samples + 1, unit=unit)[1]):
        assert 0.05 < ((other != IGNORE) & (labels != IGNORE)).sum() / (labels != IGNORE).sum() < 0.3  # as by chance


@pytest.mark.parametrize("unit", ["token", "word"])
def test_a_shorter_row_has_the_beginning_of_the_noise(unit: str) -> None:
    ids, samples = rows(8, 128), np.arange(8)
    inputs, labels = mask(ids, samples, unit=unit)
    for length in (1, 47, 48, 127):
        short = mask(ids[:, :length], samples, unit=unit)
        np.testing.assert_array_equal(short[0], inputs[:, :length])
        np.testing.assert_array_equal(short[1], labels[:, :length])


@pytest.mark.parametrize("unit", ["word", "span"])
def test_words_are_targets_as_a_whole(unit: str) -> None:
    ids = documents(100, 200, mean=50)
    targets = mask(ids, np.arange(100), unit=unit, rate=0.3)[1] != IGNORE
    continues = ~WORDS.starts(ids)
    assert continues.sum() > 5000
    np.testing.assert_array_equal(targets[continues], np.roll(targets, 1, axis=1)[continues])


@pytest.mark.parametrize("unit", ["word", "span"])
def test_no_word_or_span_goes_on_in_the_next_packed_document(unit: str) -> None:
    ids = rows(400, 70, low=len(SPECIAL)) | 1  # nothing but tokens that continue a word
    pieces = np.broadcast_to(np.arange(70) // 7, ids.shape).astype(np.int32)
    options = {"unit": unit, "rate": 0.4, "span_max": 1 if unit == "span" else 10}
    masking = Masking(**options)
    common = {"seed": 1, "boundaries": WORDS, "mask_id": MASK, "special_ids": SPECIAL, "vocab_size": VOCABULARY}
    samples = np.arange(400)
    chosen = mask_tokens(ids, samples, masking=masking, documents=pieces, **common)[1] != IGNORE
    by_piece = chosen.reshape(400, 10, 7)
    assert (by_piece.all(2) == by_piece.any(2)).all()  # each piece is a word of its own, hidden whole or not at all
    assert within(by_piece.any(2).sum(), 4000, 0.4)
    alone = mask_tokens(ids, samples, masking=masking, **common)[1] != IGNORE
    assert (alone.all(1) == alone.any(1)).all()  # without documents a row is one word


def test_how_a_word_is_hidden_is_drawn_for_each_token() -> None:
    ids = np.tile([6, 7, 9, 11], (500, 50))  # words of four tokens
    inputs, labels = mask(ids, np.arange(500), unit="word", mask_share=0.5, random_share=0.0)
    words = (labels != IGNORE).reshape(-1, 4)
    hidden = (inputs == MASK).reshape(-1, 4)[words.all(axis=1)].sum(axis=1)
    for number, share in enumerate((1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)):
        assert within(int((hidden == number).sum()), len(hidden), share)


def test_spans_hide_all_their_tokens_alike() -> None:
    ids = rows(400, 256, low=5)
    inputs, labels = mask(ids, np.arange(400), unit="span", mask_share=0.8, random_share=0.1)
    # Independent tokens would vary as 1; spans of some eight tokens each with one fate vary as several.
    check_shares(ids, inputs, labels, 0.8, 0.1, spread=4.0)
    targets, hidden = labels != IGNORE, inputs == MASK
    both = targets[:, :-1] & targets[:, 1:]
    alike = (hidden[:, :-1] == hidden[:, 1:])[both].mean()
    assert alike > 0.93  # 0.68 if each token were drawn; the rest are spans that touch


GOLDEN = {
    "token": (
        [1, 3, 4, 8, 11, 12, 16, 17, 18, 19, 23, 24, 28, 29, 32, 33, 38, 39],
        [734, 4, 154, 108, 801, 550, 4, 4, 4, 4, 12, 13, 128, 129, 132, 4, 161, 466],
    ),
    "word": (
        [4, 5, 8, 9, 12, 13, 16, 17, 18, 19, 24, 25, 28, 29, 32, 33, 38, 39],
        [154, 4, 108, 4, 550, 4, 4, 4, 4, 4, 13, 343, 128, 129, 132, 4, 161, 466],
    ),
    "span": (
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37],
        [
            4,
            4,
            4,
            4,
            4,
            4,
            4,
            4,
            4,
            4,
            4,
            4,
            711,
            12,
            13,
            343,
            235,
            125,
            128,
            129,
            596,
            519,
            150,
            587,
            696,
            470,
            906,
            669,
        ],
    ),
}


@pytest.mark.parametrize("unit", UNITS)
def test_the_stream_of_noise_is_fixed(unit: str) -> None:
    """A change of the generator would change resumed runs: these values may not move."""
    inputs, labels = mask(
        np.arange(100, 140)[None], np.array([12345]), unit=unit, rate=0.4, mask_share=0.4, random_share=0.4
    )
    targets = np.flatnonzero(labels[0] != IGNORE)
    assert (targets.tolist(), inputs[0, targets].tolist()) == GOLDEN[unit]


@pytest.mark.parametrize("unit", UNITS)
def test_the_input_is_not_changed_and_types_hold(unit: str) -> None:
    ids = rows(4, 32)
    before = ids.copy()
    inputs, labels = mask(ids, np.arange(4), unit=unit)
    np.testing.assert_array_equal(ids, before)
    assert inputs.dtype == labels.dtype == np.int64
    assert inputs.shape == labels.shape == (4, 32)
    for layout in (ids.astype(np.int32), np.asfortranarray(ids), np.repeat(ids, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(mask(layout, np.arange(4), unit=unit)[0], inputs)
    assert not np.shares_memory(inputs, ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.0}, "masking rate must lie between 0 and 1, got 0.0"),
        ({"rate": 1.0}, "masking rate"),
        ({"rate": float("nan")}, "masking rate"),
        ({"mask_share": 0.8, "random_share": 0.3}, "sum to more than 1"),
        ({"mask_share": -0.1}, "must not be negative"),
        ({"mask_share": float("nan")}, "must not be negative"),
        ({"unit": "sentence"}, "unit must be one of token, word, span, got 'sentence'"),
        ({"span_p": 0.0}, "span_p must lie above 0 and not above 1, got 0.0"),
        ({"span_p": 1.5}, "span_p"),
        ({"span_max": 0}, "span_max must be a number of words from 1 to 255, got 0"),
        ({"span_max": 2.5}, "span_max"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Masking(**change)
    with pytest.raises(UserError, match=message):
        replace(Masking(), **change)


def test_shares_may_sum_to_one_but_for_rounding() -> None:
    mask_share, random_share = 0.8, 0.2000000000000001
    assert mask_share + random_share > 1
    ids = rows(4, 64, low=5)
    inputs, labels = mask(ids, np.arange(4), rate=0.5, mask_share=mask_share, random_share=random_share)
    assert (inputs != ids)[labels != IGNORE].mean() > 0.9


@pytest.mark.parametrize("unit", ["word", "span"])
def test_words_need_boundaries(unit: str) -> None:
    with pytest.raises(UserError, match=f"masking unit '{unit}' needs the boundaries of words"):
        mask_tokens(
            rows(1, 8),
            np.arange(1),
            seed=1,
            masking=Masking(unit=unit),  # type: ignore[arg-type]
            boundaries=None,
            mask_id=MASK,
            special_ids=SPECIAL,
            vocab_size=VOCABULARY,
        )
