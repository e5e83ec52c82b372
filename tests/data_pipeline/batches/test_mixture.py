"""Mixtures: shares kept to within a draw, counts by arithmetic, epochs of each source, weights that change."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batches.blocks import StreamBlocks
from data_pipeline.batches.mixture import PERIOD, MixturePlan, TrainingData, chairman_sequence, quotas
from data_pipeline.errors import UserError
from data_pipeline.prepare.plan import plan_preparation
from data_pipeline.prepare.run import prepare
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.training import train_tokenizer

WEIGHTS = [(1.0,), (1.0, 1.0), (0.7, 0.2, 0.1), (1.0, 1e-4), (5.0, 0.0, 3.0), tuple(range(1, 13)), (1.0,) * 7]


def deviations(sequence: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """(N + 1, S): what each source has had after n places less its exact share of n."""
    had = np.zeros((len(sequence) + 1, len(counts)))
    had[np.arange(1, len(sequence) + 1), sequence] = 1
    ideal = np.arange(len(sequence) + 1)[:, None] * (np.array(counts) / sum(counts))
    return had.cumsum(0) - ideal


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_become_draws_of_a_period(weights: tuple[float, ...]) -> None:
    found = quotas(weights)
    assert sum(found) == PERIOD
    exact = np.array(weights) / sum(weights) * PERIOD
    assert np.abs(found - exact).max() < 1
    assert found == quotas([3 * weight for weight in weights])
    assert [quota == 0 for quota in found] == [weight == 0 for weight in weights]


def test_largest_remainders_are_rounded_up() -> None:
    assert quotas((1, 1, 1)) == (21846, 21845, 21845)  # equal remainders: the first
    assert quotas((0.5, 0.25, 0.25)) == (32768, 16384, 16384)
    assert quotas((10.6, 65525.4)) == (11, 65525)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.0, 0.0), r"all weights are 0 \(web, code\)"),
        ((1.0, -0.5), "the weight of source code is -0.5"),
        ((1.0, float("nan")), "the weight of source code is nan"),
        ((float("inf"), 1.0), "the weight of source web is inf"),
        ((1.0, 1e-9), r"source code, 1e-09, is less than one draw in 65,536 .* \(weight 0\)"),
    ],
)
def test_impossible_weights_are_refused(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        quotas(weights, ["web", "code"])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_stretch_of_the_sequence_has_its_shares(weights: tuple[float, ...]) -> None:
    counts = quotas(weights)
    sequence = chairman_sequence(counts)
    np.testing.assert_array_equal(np.bincount(sequence, minlength=len(counts)), counts)
    off = deviations(sequence, counts)
    present = sum(count > 0 for count in counts)
    bound = 1 - 1 / (2 * present - 2) if present > 1 else 0.0
    assert np.abs(off).max() <= bound + 1e-9  # Tijdeman's bound, below 1
    assert (off.max(0) - off.min(0)).max() < 2  # a window is the difference of two prefixes
    assert np.abs(off[-1]).max() < 1e-9  # so it holds across periods


def test_the_bound_holds_for_all_small_shares() -> None:
    """All ways to divide 12 among four, each against a walk through its prefixes."""
    for a in range(13):
        for b in range(13 - a):
            for c in range(13 - a - b):
                counts = (a, b, c, 12 - a - b - c)
                present = sum(count > 0 for count in counts)
                bound = 1 - 1 / (2 * present - 2) if present > 1 else 0.0
                assert np.abs(deviations(chairman_sequence(counts), counts)).max() <= bound + 1e-9


def brute_force(stages: Sequence[tuple[int, tuple[int, ...]]], draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources and own draw numbers of the first draws, walked one by one."""
    sequences = [chairman_sequence(counts) for _, counts in stages]
    used = [0] * len(stages[0][1])
    sources, own = [], []
    for draw in range(draws):
        stage = max(i for i, (first, _) in enumerate(stages) if first <= draw)
        source = int(sequences[stage][(draw - stages[stage][0]) % PERIOD])
        sources.append(source)
        own.append(used[source])
        used[source] += 1
    return np.array(sources), np.array(own)


STAGES = [(0, quotas((3, 1, 2))), (1000, quotas((1, 0, 1))), (70_000, quotas((1, 5, 0)))]


def test_places_and_counts_equal_a_walk_through_all_stages() -> None:
    plan, draws = MixturePlan(STAGES), 150_000
    sources, own = brute_force(STAGES, draws)
    found = plan.place(np.arange(draws))
    np.testing.assert_array_equal(found[0], sources)
    np.testing.assert_array_equal(found[1], own)
    for draw in (0, 1, 999, 1000, 1001, 65_536, 66_536, 69_999, 70_000, 70_001, 135_536, 150_000):
        np.testing.assert_array_equal(plan.counts(draw), np.bincount(sources[:draw], minlength=3))
    assert not (sources[1000:70_000] == 1).any()  # weight 0 in a stage: not one draw
    assert not (sources[70_000:] == 2).any()


def test_a_place_does_not_depend_on_what_was_asked_before() -> None:
    expected = MixturePlan(STAGES).place(np.arange(100_000))
    for ask in (np.array([[99_999, 3], [70_000, 999]]), np.arange(69_990, 70_010), np.arange(1000)[::-1]):
        for sources, wanted in zip(MixturePlan(STAGES).place(ask), expected, strict=True):
            np.testing.assert_array_equal(sources, wanted[ask])
    assert MixturePlan(STAGES).place(np.empty(0, dtype=np.int64))[0].shape == (0,)


def test_an_edge_without_a_change_leaves_the_sequence_alone() -> None:
    counts = quotas((3, 2))
    one, many = MixturePlan([(0, counts)]), MixturePlan([(0, counts), (777, counts), (5000, counts)])
    for a, b in zip(one.place(np.arange(9000)), many.place(np.arange(9000)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_stages_to_come_do_not_change_what_was() -> None:
    short, long = MixturePlan(STAGES[:1]), MixturePlan(STAGES)
    for a, b in zip(short.place(np.arange(1000)), long.place(np.arange(1000)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_threads_that_ask_at_once_get_the_same_places() -> None:
    expected = MixturePlan(STAGES).place(np.arange(69_000, 71_000))
    for _ in range(3):
        plan = MixturePlan(STAGES)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(plan.place, [np.arange(69_000, 71_000)] * 8))
        for sources, own in found:
            np.testing.assert_array_equal(sources, expected[0])
            np.testing.assert_array_equal(own, expected[1])


def test_one_source_takes_every_draw() -> None:
    sources, own = MixturePlan([(0, (PERIOD,))]).place(np.arange(10) + 10**12)
    assert not sources.any()
    np.testing.assert_array_equal(own, np.arange(10) + 10**12)
    assert MixturePlan([(0, (PERIOD,))]).counts(10**12).tolist() == [10**12]


def test_a_far_draw_costs_what_the_first_costs() -> None:
    plan = MixturePlan(STAGES)
    plan.place(np.array([80_000]))  # tables are made once
    began = time.perf_counter()
    sources, own = plan.place(np.arange(10**15, 10**15 + 1000))
    plan.counts(10**15)
    assert time.perf_counter() - began < 0.05
    assert own.min() > 10**14
    np.testing.assert_array_equal(np.bincount(sources, minlength=3) > 0, [True, True, False])


def test_impossible_plans_are_refused() -> None:
    half = (PERIOD // 2, PERIOD // 2)
    with pytest.raises(ValueError, match="begins at draw 0"):
        MixturePlan([(5, half)])
    with pytest.raises(ValueError, match="increasing draws"):
        MixturePlan([(0, half), (0, (PERIOD, 0))])
    with pytest.raises(ValueError, match="are not 2 counts that sum to 65536"):
        MixturePlan([(0, half), (5, (1, 2))])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("mixture")
    texts = [f"line {i} of a few hundred, the square is {i * i}" for i in range(300)]
    (folder / "a.txt").write_text("\n".join(texts))
    tokenizer = train_tokenizer(texts, 280)
    prepare(plan_preparation([folder / "a.txt"], tokenizer), folder / "shards")
    return ShardSet.open(folder / "shards")


def test_epochs_of_each_source_by_arithmetic(shards: ShardSet) -> None:
    data = TrainingData(
        ("big", "small"), (StreamBlocks(shards, 16), StreamBlocks(shards, 16)), MixturePlan([(0, quotas((3, 1)))])
    )
    blocks = data.blocks[0].num_blocks
    found = data.epochs(8 * blocks)
    assert found["big"] == pytest.approx(6, abs=1 / blocks)
    assert found["small"] == pytest.approx(2, abs=1 / blocks)
    assert data.epochs(0) == {"big": 0.0, "small": 0.0}
    assert data.num_tokens == 2 * shards.num_tokens


def test_sources_must_share_a_tokenizer_and_a_block_length(shards: ShardSet, tmp_path: Path) -> None:
    other = copy.copy(shards)
    other.tokenizer_hash, other.path = "0" * 32, tmp_path / "other"
    two = MixturePlan([(0, quotas((1, 1)))])
    with pytest.raises(UserError, match=rf"{tmp_path}/other were made with another tokenizer than those in .*shards"):
        TrainingData(("a", "b"), (StreamBlocks(shards, 16), StreamBlocks(other, 16)), two)
    with pytest.raises(ValueError, match="blocks of different lengths"):
        TrainingData(("a", "b"), (StreamBlocks(shards, 16), StreamBlocks(shards, 8)), two)
    with pytest.raises(ValueError, match="1 names, 2 sources, a mixture of 2"):
        TrainingData(("a",), (StreamBlocks(shards, 16), StreamBlocks(shards, 16)), two)
