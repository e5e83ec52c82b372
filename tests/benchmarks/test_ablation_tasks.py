"""The rows of the ablation's tasks: against loops, and as functions of the seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.attention_ablation.books import last_occurrence
from benchmarks.attention_ablation.mqar import FILLER, MultiQueryRecall
from benchmarks.attention_ablation.mqar_spread import SpreadRecall
from benchmarks.attention_ablation.passkey import DIGITS, FIRST_DIGIT, LONG_ROWS, MARKER, MASK, Passkey
from benchmarks.attention_ablation.tasks import DistanceBins, Shape, Task, generator
from benchmarks.attention_ablation.variables import VariableTracking
from data_pipeline.batches import IGNORE
from eval.tasks.recall.spread import Layout

SHAPE = Shape(seq_len=32, batch_tokens=128, held_out_tokens=256)


def recall(pairs: int = 3, gap: int = 9, shape: Shape = SHAPE) -> MultiQueryRecall:
    return MultiQueryRecall(shape, vocab_size=48, pairs=pairs, gap=gap, window=8)


# --- tasks


def test_every_query_finds_its_value_among_the_pairs() -> None:
    task = recall(pairs=5, gap=20, shape=Shape(64, 256, 256))
    rows = task.rows(generator(7), 200)
    pairs, first = task.pairs, 2 * task.pairs + task.gap
    for inputs, labels, distance in zip(*rows, strict=True):
        keys, values = inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= FILLER
        assert keys.max() < FILLER + task.half <= values.min()
        queries = np.flatnonzero(labels != IGNORE)
        assert queries.min() >= first
        assert set(inputs[queries]) == set(keys)  # each key once
        for at in queries:
            pair = int(np.flatnonzero(keys == inputs[at])[0])
            assert labels[at] == values[pair]
            assert distance[at] == at - 2 * pair
        filler = np.ones(64, dtype=bool)
        filler[: 2 * pairs] = filler[queries] = False
        assert inputs[filler].max() < FILLER
        assert not distance[labels == IGNORE].any()
    # The power law: the places of queries are mostly early ones, and all of them are used.
    slot = (np.nonzero(rows.labels != IGNORE)[1] - first) // 2
    assert np.median(slot) < 0.75 * np.median(np.arange(task.slots))
    assert set(slot) == set(range(task.slots))


def test_queries_are_drawn_as_by_numpys_weighted_choice_without_replacement() -> None:
    task = recall(pairs=2, gap=0, shape=Shape(16, 16, 16))
    rows = task.rows(generator(3), 20_000)
    slots = ((np.nonzero(rows.labels != IGNORE)[1] - 4) // 2).reshape(-1, 2)
    weights = np.arange(1.0, task.slots + 1) ** (0.01 - 1)
    weights /= weights.sum()
    expected = np.zeros(task.slots)  # probability that a place is among the two drawn
    for i, j in itertools.permutations(range(task.slots), 2):
        expected[[i, j]] += weights[i] * weights[j] / (1 - weights[i])
    assert np.bincount(slots.reshape(-1), minlength=task.slots) / 20_000 == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("values", [1, 2])
def test_every_query_finds_its_value_among_spread_pairs(values: int) -> None:
    task = SpreadRecall(Shape(64, 256, 64 * 50), 48, pairs=(4,), values=values, spread=0.5, gap=6, window=4)
    step, first_value = (1, FILLER + task.half) if values == 1 else (2, FILLER + task.half)
    for inputs, labels, distance in zip(*task.rows(generator(7), Layout(64, 4, values, 0.5, 6), 100), strict=True):
        queries = np.flatnonzero(labels != IGNORE)
        assert len(queries) == 4 * values
        assert queries.min() - (step - 1) >= 38
        for at in queries:
            key = inputs[at - step + 1]
            value_of = {int(inputs[i + 1]): i for i in range(0, 32, 2) if inputs[i] == key}
            assert len(value_of) == values
            place = value_of[int(labels[at])]
            assert distance[at] == at - place
            if values > 1:  # the mark names the kind: half of the values each
                kind = (labels[at] - first_value) // (task.half // values)
                assert inputs[at] == FILLER + 2 * task.half + kind
        assert not distance[labels == IGNORE].any()
    far = task.far
    assert far is None  # rows of 16 windows
    for batch in task.held_out():
        targets = (batch.labels != IGNORE).numpy()
        assert set(batch.groups["distance in windows"][targets]) <= {2, 3, 4}  # 2-4 to 8-16 windows
    wide = SpreadRecall(Shape(256, 256, 256), 48, pairs=(4,), values=values, spread=0.5, gap=6, window=4)
    assert wide.far is not None
    assert wide.groupings["distance in windows"][wide.far.bins[0]] == "16-32"


def test_rows_of_several_numbers_of_pairs_behind_short_ones() -> None:
    shape = Shape(64, 256, 64 * 20)
    task = SpreadRecall(
        shape, 48, (2, 4, 8), values=1, spread=0.4, gap=6, window=4, lead_in=(16, 32), lead_in_tokens=500
    )
    assert task.settings["pairs"] == [2, 4, 8]
    lengths, numbers = [], set()
    for batch in itertools.islice(task.train_batches(0), 40):
        lengths.append(batch.input_ids.shape[1])
        assert batch.input_ids.numel() == 256
        targets = (batch.labels != IGNORE).sum(1).tolist()
        assert set(targets) <= {16: {2, 4}, 32: {4, 8}, 64: {2, 4, 8}}[lengths[-1]]
        numbers |= {(lengths[-1], number) for number in targets}
    assert lengths == [16] * 2 + [32] * 2 + [64] * 36  # 500 tokens are reached with the second batch
    assert len(numbers) == 7
    assert torch.equal(task.measured(0).input_ids, task.measured(0).input_ids)
    assert task.measured(0).input_ids.shape == (4, 64)
    found = {0: 0, 1: 0, 2: 0}
    for batch in task.held_out():
        for labels, number in zip(batch.labels, batch.groups["pairs"], strict=True):
            assert (labels != IGNORE).sum() == (2, 4, 8)[number[0]]
            found[int(number[0])] += 1
    assert found == {0: 6, 1: 6, 2: 6}
    assert task.far is not None
    assert (task.far.grouping, task.far.bins) == ("pairs", (2,))


def test_short_rows_of_variables_have_fewer_chains_and_hops() -> None:
    task = VariableTracking(
        Shape(128, 256, 256), 80, chains=4, hops=2, window=4, lead_in=(16, 32, 64), lead_in_tokens=256
    )
    found = []
    for batch in itertools.islice(task.train_batches(0), 4):
        number = set((batch.labels != IGNORE).sum(1).tolist())
        found.append((batch.input_ids.shape[1], *number))
    assert found == [(16, 2), (32, 2 * 2), (64, 4 * 3), (128, 4 * 3)]  # chains * (hops + 1)
    assert task.settings["lead_in"] == [16, 32, 64]


def test_the_key_is_asked_for_in_longer_rows_than_those_of_training() -> None:
    task = Passkey(SHAPE, "clm", vocab_size=48, digits=2, window=8, test_lengths=(32, 256))
    assert next(task.train_batches(0)).input_ids.shape == (4, 32)
    assert task.settings["test_seq_lens"] == [32, 256]
    assert task.groupings["tokens of the row"] == ("32", "256")
    assert task.groupings["distance in windows"][-1] == "16-32"
    rows = {32: 0, 256: 0}
    for batch in task.held_out():
        length = batch.input_ids.shape[1]
        assert batch.input_ids.numel() <= 256  # a row, or a batch's tokens
        assert set(batch.groups["tokens of the row"].ravel()) == {(32, 256).index(length)}
        assert np.flatnonzero(batch.labels[0] != IGNORE).tolist() == [length - 2, length - 1]
        rows[length] += len(batch.labels)
    assert rows == {32: LONG_ROWS, 256: LONG_ROWS}


def test_every_variable_is_asked_for_and_its_hops_counted() -> None:
    task = VariableTracking(Shape(64, 256, 64 * 20), 80, chains=3, hops=2, window=4)
    for inputs, labels, distance, hops in zip(*task.rows(generator(7), 100), strict=True):
        queries = np.flatnonzero(labels != IGNORE)
        assert list(queries) == list(range(64 - 18, 64, 2))
        assigned = {int(inputs[i]): (i, int(inputs[i + 1])) for i in range(0, 46, 2) if inputs[i] >= FILLER}
        assert len(assigned) == 9
        for at in queries:
            place, said = assigned[int(inputs[at])]
            assert distance[at] == at - place
            steps = 0
            while said in assigned:
                said, steps = assigned[said][1], steps + 1
            assert (said, steps) == (labels[at], hops[at])
        assert np.bincount(hops[queries]).tolist() == [3, 3, 3]
        assert not hops[labels == IGNORE].any()
    for batch in task.held_out():
        targets = (batch.labels != IGNORE).numpy()
        assert np.bincount(batch.groups["hops"][targets]).tolist() == [3 * len(targets)] * 3
    assert task.far is not None
    assert (task.far.grouping, task.far.bins) == ("hops", (2,))


def test_rows_of_mqar_are_keyed_as_before() -> None:
    assert set(recall().settings) == {"vocab_size", "pairs", "gap", "window", "held_out_tokens"}


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_the_key_stands_behind_the_first_marker(objective: Any) -> None:
    task = Passkey(SHAPE, objective, vocab_size=48, digits=3, window=8)
    rows = task.rows(generator(1), 300, 32)
    question = 29 if objective == "clm" else 28
    for inputs, labels, start in zip(*rows, strict=True):
        assert list(np.flatnonzero(inputs == MARKER)) == [start, question]
        targets = np.flatnonzero(labels != IGNORE)
        key = inputs[start + 1 : start + 4]
        assert list(labels[targets]) == list(key)
        assert [(token - FIRST_DIGIT) // DIGITS for token in key] == [0, 1, 2]
        if objective == "clm":  # targets are the next tokens
            assert list(targets) == [29, 30, 31]
            assert list(inputs[30:]) == list(key[:2])
        else:  # nothing of the key is left at the end
            assert list(targets) == [29, 30, 31]
            assert set(inputs[29:]) == {MASK}
    assert set(rows.start) == set(range(question - 3))  # every depth that leaves room


def test_passkey_bins_are_the_distance_and_the_depth() -> None:
    task = Passkey(Shape(64, 256, 64 * 200), "clm", vocab_size=48, digits=2, window=8)
    labels = task.groupings["distance in windows"]
    assert task.far is not None
    far = [labels[i] for i in task.far.bins]
    assert (labels, far) == (("0-1", "1-2", "2-4", "4-8"), ["4-8"])
    for batch in task.held_out():
        starts = (batch.input_ids == MARKER).int().argmax(1).numpy()
        targets = (batch.labels != IGNORE).numpy()
        for row, start in enumerate(starts):
            distance = set(batch.groups["distance in windows"][row][targets[row]])
            depth = set(batch.groups["depth"][row][targets[row]])
            low, high = (int(edge) for edge in labels[distance.pop()].split("-"))
            assert 8 * low <= 62 - start < 8 * high
            assert depth == {5 * start // task.places(64)}
            assert not distance


def test_distance_bins() -> None:
    bins = DistanceBins(window=10, longest=45)
    assert bins.labels == ("0-1", "1-2", "2-4", "4-8")
    assert bins(np.array([0, 9, 10, 19, 20, 39, 40, 45])).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert bins.beyond(2) == (2, 3)
    bins = DistanceBins(window=10, longest=200, factor=4)
    assert bins.labels == ("0-1", "1-4", "4-16", "16-64")
    assert bins(np.array([0, 9, 10, 39, 40, 159, 160, 200])).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_last_occurrence_is_found_as_by_a_loop() -> None:
    text = np.random.default_rng(0).integers(0, 9, (20, 41))
    inputs, labels = text[:, :-1].copy(), text[:, 1:].copy()
    labels[3] = IGNORE
    found = last_occurrence(inputs, labels)
    for row in range(20):
        for at in range(40):
            before = [at + 1 - i for i in range(at + 1) if inputs[row, i] == text[row, at + 1]]
            if row != 3:
                assert found[row, at] == min(before, default=0)


@pytest.mark.parametrize(
    "make",
    [
        recall,
        lambda: Passkey(SHAPE, "mlm", vocab_size=48, digits=2, window=8),
        lambda: SpreadRecall(SHAPE, 48, pairs=(3,), values=1, spread=0.5, gap=2, window=8),
        lambda: VariableTracking(SHAPE, 48, chains=2, hops=2, window=8),
    ],
)
def test_rows_are_a_function_of_the_seed(make: Callable[[], Task]) -> None:
    def rows(task: Task, seed: int) -> torch.Tensor:
        return torch.cat([batch.input_ids for batch in itertools.islice(task.train_batches(seed), 4)])

    held_out = [torch.cat([batch.input_ids for batch in make().held_out()]) for _ in range(2)]
    assert torch.equal(rows(make(), 3), rows(make(), 3))
    assert torch.equal(*held_out)
    assert held_out[0].shape == (8, 32)
    every = torch.cat([rows(make(), 0), rows(make(), 1), held_out[0]])
    assert len(every.unique(dim=0)) == len(every)
