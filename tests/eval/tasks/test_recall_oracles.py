"""The questions of the recall tasks are well posed: one who reads the row answers all of them, and none without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from suites_case import subject_of

from data_pipeline.shards.shardset import ShardSet
from eval.tasks.recall import CommonWordsSettings, MQARSettings, RecallSettings, VariablesSettings, task
from eval.tasks.recall.common_words import CommonWords
from eval.tasks.recall.questions import Questions, generator
from eval.tasks.recall.spread import Layout, SpreadMQAR, draw_spread
from eval.tasks.recall.variables import Variables, draw, room

SPREAD = MQARSettings(lengths=(48, 90), pairs=(2, 6), symbols=120, spread=0.5, gap=3)
VALUES = MQARSettings(lengths=(80, 100), pairs=(2, 5), symbols=120, spread=0.4, values=3)
VARIABLES = VariablesSettings(lengths=(60, 90), hops=(0, 1, 3, 5), chains=(2, 3), symbols=100)
WORDS = CommonWordsSettings(lengths=(70, 150), ratios=(2, 5), choices=4, symbols=60)
SYMBOLS, MASK = np.random.default_rng(0).permutation(1000)[:200] + 10, 3


class Asked(NamedTuple):
    """One question: the row before the answer's place, the options, and where the question's name stands."""

    row: list[int]
    options: list[int]
    name: int


Oracle = Callable[[Asked], int | None]


def look_up(asked: Asked) -> int | None:
    """The option that follows an earlier occurrence of the name."""
    name = asked.row[asked.name]
    after = [asked.row[i + 1] for i in range(asked.name) if asked.row[i] == name]
    found = [token for token in after if token in asked.options]
    return found[0] if len(found) == 1 else None


def follow(asked: Asked) -> int | None:
    """The value at the beginning of the chain of the name. Assignments begin at even places."""
    assigned = {asked.row[i]: asked.row[i + 1] for i in range(0, asked.name - 1, 2)}
    name = asked.row[asked.name]
    for _ in range(len(assigned) + 1):
        if name in asked.options:
            return name
        if name not in assigned:
            return None
        name = assigned[name]
    return None


def count(asked: Asked) -> int | None:
    """The option that comes most often, which is also the commonest token of the row."""
    counts = Counter(asked.row)
    (best, times), (_, next_times) = counts.most_common(2)
    return best if best in asked.options and times > next_times else None


CASES: dict[str, tuple[RecallSettings, type, Oracle, int]] = {
    "spread": (SPREAD, SpreadMQAR, look_up, 1),
    "values": (VALUES, SpreadMQAR, look_up, 2),
    "variables": (VARIABLES, Variables, follow, 1),
    "words": (WORDS, CommonWords, count, 1),
}


def questions(rows: Questions, inputs: np.ndarray, back: int) -> Iterator[tuple[Asked, int]]:
    """Each question with the right token. ``back``: tokens from the answer's place back to the name."""
    for row, at, options, right in zip(inputs, rows.at, rows.options, rows.right, strict=True):
        for place, some, goal in zip(at, options, right, strict=True):
            end = int(place) + (row[place] != MASK)
            yield Asked(row[:end].tolist(), some.tolist(), end - back), int(goal)


@pytest.mark.parametrize("mask", [None, MASK], ids=["clm", "mlm"])
@pytest.mark.parametrize("name", CASES)
def test_one_who_reads_the_row_answers_and_nobody_without_it(name: str, mask: int | None) -> None:
    settings, make, oracle, back = CASES[name]
    symbols = SYMBOLS[: settings.model_dump()["symbols"]]
    kind = make(settings, symbols, mask)
    assert kind.cells
    for number, cell in enumerate(kind.cells):
        rows = kind.rows(cell, generator(number), 10, training=False)
        assert set(rows.inputs.ravel()) <= {*symbols, *([] if mask is None else [mask])}
        for asked, right in questions(rows, rows.inputs, back):
            assert oracle(asked) == right, cell
        for asked, _ in questions(rows, rows.controls["without"], back):
            assert oracle(asked) is None
            assert not set(asked.row) & set(asked.options)
        assert set(rows.controls) == ({"without", "other"} if name == "words" else {"without"})
        if name == "words":
            for asked, right in questions(rows, rows.controls["other"], back):
                assert oracle(asked) not in (right, None)
        assert rows.answer.shape == rows.at.shape == rows.distance.shape == rows.options.shape[:2]


@pytest.mark.parametrize("values", [1, 3])
def test_pairs_are_anywhere_in_the_first_part_and_queries_in_the_rest(values: int) -> None:
    layout = Layout(length=90, pairs=4, values=values, spread=0.5, gap=6)
    rows = draw_spread(generator(1), 400, layout, filler=16, half=30)
    assert (layout.span, layout.marks) == (44, 3 if values == 3 else 0)
    for inputs, wanted, places, queries in zip(*rows, strict=True):
        keys = inputs[places]
        assert (keys == keys[:, :1]).all()  # all places of a key
        assert len(set(keys[:, 0])) == 4
        assert 16 <= keys.min() <= keys.max() < 46
        assert (inputs[places + 1] == wanted).all()
        assert len(set(wanted.ravel())) == wanted.size
        kinds = (wanted - 46) // (30 // values)
        assert (kinds == np.arange(values)).all()
        assert not (places % 2).any()
        assert places.max() < 44
        assert queries.min() - (values > 1) >= 50
        named = queries - (values > 1)
        assert (inputs[named] == keys).all()
        if values > 1:
            assert (inputs[queries] == 76 + np.arange(values)).all()
        used = {*places.ravel(), *(places + 1).ravel(), *queries.ravel(), *named.ravel()}
        assert len(used) == wanted.size * (4 if values > 1 else 3)
        assert inputs[[i for i in range(90) if i not in used]].max() < 16
    for found, slots in ((rows.places // 2, 22), ((rows.queries - 50) // layout.step, layout.slots)):
        share = np.bincount(found.ravel(), minlength=slots) / found.size
        assert share == pytest.approx(np.full(slots, 1 / slots), abs=5 * (1 / slots / found.size) ** 0.5)


@pytest.mark.parametrize("every", [False, True])
def test_chains_stand_in_their_order_among_each_other(every: bool) -> None:
    chains, hops, size = 3, 2, 3
    rows = draw(generator(2), 300, length=60, chains=chains, hops=hops, filler=8, half=20, every=every)
    asked = chains * (size if every else 1)
    first_chain: Counter[int] = Counter()
    for inputs, values, places, queries in zip(*rows, strict=True):
        assert (np.diff(places, axis=1) > 0).all()
        assert places.max() < 60 - 2 * asked
        assert not (places % 2).any()
        names, said = inputs[places], inputs[places + 1]
        assert (said[:, 0] == values).all()
        assert (said[:, 1:] == names[:, :-1]).all()
        assert len(set(names.ravel())) == chains * size
        assert 8 <= names.min() <= names.max() < 28 <= values.min()
        assert sorted(queries.ravel()) == list(range(60 - 2 * asked, 60, 2))
        assert (inputs[queries] == (names if every else names[:, -1:])).all()
        order = places.ravel().argsort() // size
        first_chain[int(order[0])] += 1
        assert (
            inputs[[i for i in range(60) if i not in {*places.ravel(), *(places + 1).ravel(), *queries.ravel()}]].max()
            < 8
        )
    assert all(70 < times < 130 for times in first_chain.values())
    least = room(chains, hops, every=every)
    draw(generator(2), 2, length=least, chains=chains, hops=hops, filler=8, half=20, every=every)


@pytest.mark.parametrize("mask", [None, MASK])
def test_the_commonest_word_comes_as_often_as_the_ratio_says(mask: int | None) -> None:
    kind = CommonWords(WORDS, SYMBOLS[:60], mask)
    for cell in kind.cells:
        rows = kind.rows(cell, generator(4), 20, training=False)
        ratio, end = cell.facts["ratio"], 1 if mask is None else 2
        times = (cell.length - end) // 2 // (3 + ratio)
        for row, options, answer, distance in zip(rows.inputs, rows.options, rows.answer, rows.distance, strict=True):
            counts = Counter(row.tolist())
            assert [counts[token] for token in options[0]] == [
                times * (ratio if place == answer[0] else 1) for place in range(4)
            ]
            others = [n for token, n in counts.items() if token not in {*options[0], SYMBOLS[0], MASK}]
            assert max(others) <= times
            assert max(others) - min(others) <= 1
            assert counts[int(SYMBOLS[0])] == 1
            assert row[-end] == SYMBOLS[0]
            right = options[0, answer[0]]
            assert list(row).index(right) == cell.length - (mask is not None) - distance[0]
    answers = kind.rows(kind.cells[0], generator(5), 800, training=False).answer
    assert np.bincount(answers.ravel()) / 800 == pytest.approx(np.full(4, 0.25), abs=0.08)


def test_a_mark_names_one_kind_of_value() -> None:
    kind = SpreadMQAR(VALUES, SYMBOLS[:120], None)
    by_mark: dict[int, set[int]] = {}
    for number in range(20):
        rows = kind.rows(kind.cells[-1], generator(number), 10, training=False)
        marks = np.take_along_axis(rows.inputs, rows.at, axis=1)
        for mark, options in zip(marks.ravel(), rows.options.reshape(-1, rows.options.shape[2]), strict=True):
            by_mark.setdefault(int(mark), set()).update(options.tolist())
    assert len(by_mark) == 3
    assert sum(map(len, by_mark.values())) == len(set.union(*by_mark.values()))


def test_cells_without_room_are_left_out(causal: Path, shards: ShardSet) -> None:
    subject = subject_of(causal, shards)  # trained on 64 tokens
    found = {}
    for settings in (
        MQARSettings(pairs=(4, 16, 32), spread=0.5, symbols=250),
        VariablesSettings(chains=(2, 8), hops=(0, 4), symbols=250),
        CommonWordsSettings(ratios=(2, 20), symbols=250),
    ):
        kind = task.make_kind(subject, task.resolve(subject, settings))
        found[type(settings)] = [tuple(cell.facts.values()) for cell in kind.cells]
    assert found[MQARSettings] == [(4, 16), (4, 32), (4, 64), (16, 64)]
    assert found[VariablesSettings] == [
        (0, 2, 16), (0, 2, 32), (0, 2, 64), (0, 8, 32), (0, 8, 64), (4, 2, 32), (4, 2, 64)
    ]  # fmt: skip
    assert found[CommonWordsSettings] == [(2, 32), (2, 64), (20, 64)]
