"""The order of training: a bijection, every token once an epoch, a pure function of the position."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from data_pipeline.batches.order import BlockOrder, Permutation, Plan, StageSpec
from data_pipeline.errors import UserError

SIZES = [*range(1, 70), 100, 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 4097, 65_537, 100_003]


def test_permutations_are_bijections() -> None:
    for n in SIZES:
        image = Permutation(n, (7, 0))(np.arange(n))
        assert image.dtype == np.int64
        np.testing.assert_array_equal(np.sort(image), np.arange(n))


def test_large_permutations_do_not_collide() -> None:
    for n in (10**9, 10**12 + 39, 2**40, 2**62):
        indices = np.unique(np.random.default_rng(0).integers(0, n, 50_000))
        image = Permutation(n, (1, 2))(indices)
        assert image.min() >= 0
        assert image.max() < n
        assert len(np.unique(image)) == len(indices)


def test_permutations_depend_on_every_part_of_the_key() -> None:
    indices = np.arange(1000)
    images = [Permutation(1000, key)(indices) for key in [(0, 0), (0, 1), (1, 0), (1, 1), (2**63 - 1, 0), (0,)]]
    for i, a in enumerate(images):
        for b in images[:i]:
            assert np.mean(a == b) < 0.02  # 0.001 is expected of independent permutations


def test_a_permutation_is_the_same_in_any_grouping() -> None:
    p = Permutation(12_345, (3, 4))
    whole = p(np.arange(12_345))
    np.testing.assert_array_equal(p(np.arange(12_345)[::-1]), whole[::-1])
    np.testing.assert_array_equal([int(p(np.array([i]))[0]) for i in range(50)], whole[:50])
    np.testing.assert_array_equal(p(np.arange(12).reshape(3, 4)), whole[:12].reshape(3, 4))


@pytest.mark.parametrize("n", [16, 100])
def test_every_place_is_equally_likely(n: int) -> None:
    # Chi-square over 4000 keys: where does index 0 go, and where does index 1 go relative to it?
    images = np.stack([Permutation(n, (5, epoch))(np.arange(2)) for epoch in range(4000)])
    bound = n - 1 + 6 * np.sqrt(2 * (n - 1))
    for values, cells in ((images[:, 0], n), ((images[:, 1] - images[:, 0]) % n - 1, n - 1)):
        counts = np.bincount(values, minlength=cells)
        assert len(counts) == cells
        assert ((counts - 4000 / cells) ** 2 / (4000 / cells)).sum() < bound


def test_neighbours_do_not_stay_together() -> None:
    image = Permutation(100_000, (1, 1))(np.arange(100_000))
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), image)[0, 1]) < 0.02


def test_permutation_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        Permutation(0, (1,))
    for outside in (-1, 10):
        with pytest.raises(ValueError, match=r"\[0, 10\)"):
            Permutation(10, (1,))(np.array([outside]))


@pytest.mark.parametrize("num_blocks", [1, 2, 7, 8192, 10_000, 20_001])
def test_every_block_once_an_epoch_and_epochs_differ(num_blocks: int) -> None:
    order = BlockOrder(num_blocks, seed=3)
    draws = order.blocks(np.arange(3 * num_blocks)).reshape(3, num_blocks)
    for epoch in draws:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(num_blocks))
    if num_blocks > 5:
        assert (draws[0] != draws[1]).any()
        assert (draws[1] != draws[2]).any()
        assert (BlockOrder(num_blocks, seed=4).blocks(np.arange(num_blocks)) != draws[0]).any()


def test_draws_do_not_depend_on_what_was_asked_before() -> None:
    used, draws = BlockOrder(1000, seed=1), np.arange(30_000)
    expected = used.blocks(draws)
    for ask in (draws[29_000:], draws[::-7], np.array([5, 25_000, 5, 0]), draws[8190:8195]):
        np.testing.assert_array_equal(used.blocks(ask), expected[ask])
        np.testing.assert_array_equal(BlockOrder(1000, seed=1).blocks(ask), expected[ask])


# (lengths and ends, and the stage's batch where it has its own; block, batch)
PLANS: list[tuple[list[tuple[int, ...]], int, int]] = [
    ([(8, 1000)], 8, 32),
    ([(2, 100), (4, 200), (8, 900)], 8, 32),
    ([(8, 1), (2, 600), (4, 1500), (1, 3000), (8, 5000)], 8, 24),
    ([(4, 100)], 8, 8),
    ([(3, 500), (12, 1500), (6, 4000)], 12, 60),
    ([(2, 100, 16), (4, 500), (8, 900, 64), (2, 2000, 8)], 8, 32),
]


def plan_of(stages: Sequence[tuple[int, ...]], block: int, batch: int) -> Plan:
    return Plan([StageSpec(*stage) for stage in stages], block_length=block, batch_tokens=batch)


def positions(plan: Plan) -> list[int]:
    out = []
    position = 0
    while position < plan.total_tokens:
        out.append(position)
        position += plan.stages[plan.stage_index(position)].batch_tokens
    assert position == plan.total_tokens
    return out


@pytest.mark.parametrize(("stages", "block", "batch"), PLANS)
def test_stages_end_at_windows_and_batches_are_constant_within(
    stages: list[tuple[int, ...]], block: int, batch: int
) -> None:
    plan = plan_of(stages, block, batch)
    start = 0
    for stage, (seq_len, until, *own) in zip(plan.stages, stages, strict=True):
        tokens = own[0] if own else batch
        window = tokens * block // seq_len
        assert (stage.start_tokens, stage.seq_len, stage.rows * seq_len) == (start, seq_len, tokens)
        assert (stage.batch_tokens, stage.start_tokens % block) == (tokens, 0)
        assert (stage.end_tokens - start) % window == 0
        assert until <= stage.end_tokens < until + window
        start = stage.end_tokens
    assert plan.total_tokens == start
    assert plan.num_batches == len(positions(plan))


@pytest.mark.parametrize(("stages", "block", "batch"), PLANS)
@pytest.mark.parametrize("num_blocks", [5, 16, 33, 1000])
def test_every_token_of_an_epoch_once_through_changes_of_length(
    stages: list[tuple[int, ...]], block: int, batch: int, num_blocks: int
) -> None:
    """Walk the whole run by single tokens: after n draws, each token of the drawn blocks has come exactly once."""
    walk(plan_of(stages, block, batch), num_blocks)


def walk(plan: Plan, num_blocks: int) -> None:
    block, order = plan.block_length, BlockOrder(num_blocks, seed=11)
    seen = np.zeros((plan.total_tokens // block, block), dtype=np.int64)  # by draw and place in the block
    stream = np.zeros(num_blocks * block, dtype=np.int64)
    for position in positions(plan):
        stage = plan.stages[plan.stage_index(position)]
        draws, slices = plan.rows(position)
        assert len(draws) == len(slices) == stage.rows
        assert len(np.unique(draws)) == stage.rows  # a batch of R rows is text from R draws
        columns = slices[:, None] * stage.seq_len + np.arange(stage.seq_len)
        seen[draws[:, None], columns] += 1
        np.add.at(stream, order.blocks(draws)[:, None] * block + columns, 1)
        if position + stage.batch_tokens == stage.end_tokens:  # nothing is half used where the length changes
            done = stage.end_tokens // block
            assert (seen[:done] == 1).all()
            assert (seen[done:] == 0).all()
            epochs, rest = divmod(done, num_blocks)
            assert ((stream == epochs) | (stream == epochs + 1)).all()
            assert (stream == epochs + 1).sum() == rest * block
    assert (seen == 1).all()


def random_plan(seed: int) -> Plan:
    """Up to five stages of any length that divides the block, with any batch of whole blocks, the ends anywhere."""
    rng = np.random.default_rng(seed)
    block = int(rng.choice([6, 8, 12, 16]))
    lengths = [n for n in range(1, block + 1) if block % n == 0]
    stages, end = [], 0
    for _ in range(rng.integers(1, 6)):
        batch = block * int(rng.integers(1, 9)) if rng.random() < 0.8 else None
        # Beyond the end that any rounding gives the stage before: its window is at most block * 8 * block tokens.
        end += block * 8 * block + int(rng.integers(1, 40 * block))
        stages.append(StageSpec(int(rng.choice(lengths)), end, batch))
    return Plan(stages, block_length=block, batch_tokens=block * int(rng.integers(1, 9)))


@pytest.mark.parametrize("seed", range(12))
def test_any_batches_in_any_stages_deal_each_token_once_an_epoch(seed: int) -> None:
    plan = random_plan(seed)
    walk(plan, num_blocks=7 + 31 * (seed % 3))
    draws = 0  # a stage begins at the draw after the last one of the stage before, whole
    for stage in plan.stages:
        assert plan.rows(stage.start_tokens)[0].tolist() == list(range(draws, draws + stage.rows))
        draws += (stage.end_tokens - stage.start_tokens) // plan.block_length
        assert plan.rows(stage.end_tokens - stage.batch_tokens)[0].max() == draws - 1
    assert draws * plan.block_length == plan.total_tokens


@pytest.mark.parametrize("seed", range(12))
def test_batches_read_together_stay_in_their_stage(seed: int) -> None:
    """Whatever is read in one go is what the plan gives batch by batch."""
    plan = random_plan(seed)
    for limit in (1, 3, 1000):
        position = 0
        while position < plan.total_tokens:
            part = plan.part(position, limit)
            stage = plan.stages[part.stage]
            assert 1 <= part.windows * part.slices <= limit
            for number in range(part.windows * part.slices):
                assert plan.stage_index(position) == part.stage
                draws, slices = plan.rows(position)
                window, j = divmod(number, part.slices)
                assert draws[0] == part.first_draw + window * stage.rows
                assert slices[0] == part.first_slice + j
                position += stage.batch_tokens
        assert position == plan.total_tokens


def test_from_128_to_16384_tokens() -> None:
    """The arithmetic of a long curriculum: lengths double, the batch grows, each stage is rounded to whole windows."""
    lengths = [128 << i for i in range(8)]
    ends = [10**9 * (i + 1) for i in range(8)]
    batches = [2**18, 2**18, 2**18, 2**19, 2**19, 2**20, 2**20, 2**21]
    stages = [StageSpec(*stage) for stage in zip(lengths, ends, batches, strict=True)]
    plan = Plan(stages, block_length=16_384, batch_tokens=2**18)
    assert [stage.slices for stage in plan.stages] == [128, 64, 32, 16, 8, 4, 2, 1]
    assert [stage.rows for stage in plan.stages] == [2048, 1024, 512, 512, 256, 256, 128, 128]
    assert all(stage.end_tokens - end < 128 * 2**18 for stage, end in zip(plan.stages, ends, strict=True))
    for before, stage in pairwise(plan.stages):
        last, _ = plan.rows(before.end_tokens - before.batch_tokens)
        first, slices = plan.rows(stage.start_tokens)
        assert first[0] == last[-1] + 1 == stage.start_tokens // 16_384
        assert not slices.any()


def test_sample_positions_tile_the_training_order() -> None:
    plan = plan_of(*PLANS[1])
    starts = []
    for position in positions(plan):
        draws, slices = plan.rows(position)
        length = plan.stages[plan.stage_index(position)].seq_len
        starts += [range(a, a + length) for a in (draws * 8 + slices * length).tolist()]
    assert sorted(t for r in starts for t in r) == list(range(plan.total_tokens))


def test_a_far_position_costs_what_the_first_costs() -> None:
    far = 10**12
    plan = Plan([StageSpec(512, far), StageSpec(8192, 4 * far)], block_length=8192, batch_tokens=2**20)

    def cost(position: int) -> float:
        best = np.inf
        for _ in range(5):
            order = BlockOrder(10**9 + 7, seed=1)  # fresh: nothing kept from before
            began = time.perf_counter()
            blocks = order.blocks(plan.rows(position)[0])
            best = min(best, time.perf_counter() - began)
            assert len(blocks) == plan.stages[plan.stage_index(position)].rows
        return float(best)

    batch = far // 2**20 * 2**20
    assert cost(batch) < 5 * cost(0) + 0.002
    assert cost(3 * batch) < 0.05
    plan.check_position(batch)


def test_position_lookup() -> None:
    plan = plan_of(*PLANS[1])
    first, _, third = plan.stages
    assert [plan.stage_index(p) for p in (0, first.end_tokens - 1, first.end_tokens, third.start_tokens)] == [
        0,
        0,
        1,
        2,
    ]
    assert plan.stage_index(plan.total_tokens) == 2
    for position in (-1, plan.total_tokens + 1):
        with pytest.raises(ValueError, match="outside the run"):
            plan.stage_index(position)
        with pytest.raises(UserError, match="outside the run"):
            plan.check_position(position)
    with pytest.raises(UserError, match="position 5 is not the edge of a batch of 32 tokens"):
        plan.check_position(5)
    for position in (5, plan.total_tokens):
        with pytest.raises(ValueError, match="no batch begins"):
            plan.rows(position)
    for position in (*positions(plan), plan.total_tokens):
        plan.check_position(position)


@pytest.mark.parametrize(
    ("stages", "block", "batch", "message"),
    [
        ([], 8, 32, "at least one stage"),
        ([(8, 100)], 8, 20, "batch_tokens 20 must be a positive multiple of the block of 8"),
        ([(8, 100)], 8, 0, "batch_tokens 0"),
        ([(8, 100), (4, 200, 20)], 8, 32, "stage 1: batch_tokens 20 must be a positive multiple of the block of 8"),
        ([(8, 100)], 0, 32, "a block must have at least one token"),
        ([(3, 100)], 8, 32, "stage 0: seq_len 3 must divide the block of 8"),
        ([(16, 100)], 8, 32, "stage 0: seq_len 16"),
        ([(0, 100)], 8, 32, "stage 0: seq_len 0"),
        ([(2, 100), (8, 120)], 8, 32, "stage 1 would be empty: until_tokens 120; the stage before it ends at 128"),
        ([(8, 0)], 8, 32, "stage 0 would be empty"),
    ],
)
def test_impossible_plans_are_refused(stages: list[tuple[int, ...]], block: int, batch: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(stages, block, batch)
