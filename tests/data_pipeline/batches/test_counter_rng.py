"""The counter-based generator: known answers, and counting for uniformity and independence."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from data_pipeline.batches.counter_rng import as_uint32, mix64, random_at, random_rows, row_keys, threshold32

MASK64 = (1 << 64) - 1


def splitmix64(state: int, count: int) -> list[int]:
    """The generator as it is usually written, one output after the other."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        outputs.append(z ^ (z >> 31))
    return outputs


def test_words_are_the_outputs_of_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(1234567, 4) == published
    assert random_rows(np.array([1234567], dtype=np.uint64), 4, first=1)[0].tolist() == published


def test_words_at_positions_are_those_of_the_rows() -> None:
    keys = row_keys(3, np.array([0, 1, 2**62, 2**63 - 1]))
    for first in (0, 1 << 33):
        whole = random_rows(keys, 37, first).reshape(-1)
        positions = np.array([0, 5, 36, 37, 100, 147])
        np.testing.assert_array_equal(random_at(keys, positions, 37, first), whole[positions])


def test_arguments_are_left_as_they_are() -> None:
    keys, positions = row_keys(3, np.arange(4)), np.arange(8)
    before = keys.copy()
    random_at(keys, positions, 2, 0)
    random_rows(keys, 5, 0)
    np.testing.assert_array_equal(keys, before)
    np.testing.assert_array_equal(positions, np.arange(8))


def test_mixing_is_a_bijection_and_flips_half_the_bits() -> None:
    x = np.random.default_rng(0).integers(0, 2**64, 4096, dtype=np.uint64)
    mixed = mix64(x.copy())
    assert len(np.unique(mixed)) == len(np.unique(x))
    for bit in range(64):
        flipped = np.bitwise_count(mix64(x ^ np.uint64(1 << bit)) ^ mixed)
        assert abs(float(flipped.mean()) - 32) < 6 * 4 / np.sqrt(4096)


def test_keys_differ_with_the_seed_and_with_the_sample() -> None:
    samples = np.concatenate([np.arange(5000), 2 ** np.arange(20, 63), np.arange(5000) * 512 + 10**15])
    keys = [row_keys(seed, samples) for seed in (0, 1, 2, 2**63 - 1)]
    assert len(np.unique(np.concatenate(keys))) == 4 * len(samples)


@pytest.mark.parametrize("step", [1, 512, 2**40])
def test_words_are_uniform_in_each_byte(step: int) -> None:
    """Over rows of neighbouring samples, whatever the distance of their ids."""
    words = random_rows(row_keys(0, np.arange(2000) * step), 32, first=0)
    for byte in words.view(np.uint8).reshape(-1, 8).T:
        counts = np.bincount(byte, minlength=256)
        chi_square = ((counts - words.size / 256) ** 2 / (words.size / 256)).sum()
        assert abs(chi_square - 255) < 6 * np.sqrt(2 * 255)


def test_neighbours_are_independent() -> None:
    """Words side by side in position, sample, seed and end, and the two halves: joint counts of 16 x 16 classes."""

    def words(seed: int, samples: np.ndarray, first: int = 0) -> np.ndarray:
        return random_rows(row_keys(seed, samples), 64, first)

    samples = np.arange(3000)
    here = words(7, samples)
    others = {
        "position": np.roll(here, 1, axis=1),
        "sample": np.roll(here, 1, axis=0),
        "bit": words(7, samples ^ 1024),
        "seed": words(8, samples),
        "seed and sample": words(8, samples + 1),
        "end": words(7, samples, first=1 << 32),
    }
    halved = as_uint32(here)
    pairs = {name: (here >> np.uint64(60), other >> np.uint64(60)) for name, other in others.items()}
    pairs["halves"] = (halved[:, ::2] >> np.uint32(28), halved[:, 1::2] >> np.uint32(28))
    for name, (a, b) in pairs.items():
        counts = np.bincount(a.ravel().astype(int) * 16 + b.ravel().astype(int), minlength=256)
        expected = a.size / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 6 * np.sqrt(2 * 255), name


def test_halves_are_lower_then_upper() -> None:
    words = np.array([[0x1122334455667788, 1]], dtype=np.uint64)
    assert as_uint32(words).tolist() == [[0x55667788, 0x11223344, 1, 0]]


def test_thresholds_are_exact_to_a_part_in_ten_thousand() -> None:
    for rate, factor in itertools.product((1e-5, 0.01, 0.15, 0.4, 0.99), (1.0, 0.77)):
        assert abs(int(threshold32(rate * factor)) / 2**32 / (rate * factor) - 1) < 1e-4
    assert int(threshold32(1 - 1e-12)) == 2**32 - 1
