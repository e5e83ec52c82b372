"""The rows of the recall tasks ask what they say: one answer, in one other place, at the depth and distance given."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recall_case import Copier, Guesser
from suites_case import subject_of

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.tasks.recall import (
    CommonWordsSettings,
    InductionSettings,
    MQARSettings,
    NeedleSettings,
    RecallSettings,
    VariablesSettings,
    task,
)
from eval.tasks.recall.mqar import POWER, draw, slots
from eval.tasks.recall.questions import Kind, generator
from eval.tasks.recall.score import items
from eval.tasks.recall.vocabulary import Text, words

SETTINGS: dict[str, RecallSettings] = {
    "word in noise": NeedleSettings(
        lengths=(40, 60),
        depths=(0, 40, 100),
        haystack="noise",
        choices=3,
        sentence=" key {key}.",
        question=" key {key}.",
    ),
    "number in text": NeedleSettings(lengths=(160,), depths=(0, 100), haystack="text", key="digits"),
    "passkey": NeedleSettings(lengths=(160, 200), depths=(50, 75), haystack="filler", key="digits", digits=3),
    "mqar": MQARSettings(lengths=(48, 90), pairs=(2, 6), symbols=120),
    "mqar with a gap": MQARSettings(lengths=(90,), pairs=(4,), gap=30, symbols=100),
    "mqar, spread": MQARSettings(lengths=(48, 90), pairs=(2, 6), symbols=120, spread=0.5, gap=3),
    "mqar, several values": MQARSettings(lengths=(80,), pairs=(2, 4), symbols=120, spread=0.4, values=3),
    "variables": VariablesSettings(lengths=(40, 70), hops=(0, 1, 3), chains=(2, 4), symbols=100),
    "common words": CommonWordsSettings(lengths=(64, 150), ratios=(2, 3), choices=4, symbols=60),
    "random tokens": InductionSettings(distances=(12, 40, 100), passage=12, symbols=100),
    "text": InductionSettings(content="text", distances=(12, 50), passage=12),
}


@pytest.fixture(scope="module", params=["clm", "mlm"])
def objective(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def kind_of(settings: RecallSettings, objective: str, causal: Path, masked: Path, shards: ShardSet) -> tuple[Any, Kind]:
    subject = subject_of(causal if objective == "clm" else masked, shards)
    return subject, task.make_kind(subject, task.resolve(subject, settings))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_answer_stands_where_the_distance_says(
    name: str, objective: str, causal: Path, masked: Path, shards: ShardSet
) -> None:
    subject, kind = kind_of(SETTINGS[name], objective, causal, masked, shards)
    seen: set[str] = set()
    for number, cell in enumerate(kind.cells):
        rows = kind.rows(cell, generator(5, number), 20, training=False)
        assert rows.inputs.shape == (20, cell.length)
        place = rows.at + (objective == "clm")  # where the answer belongs
        assert (np.take_along_axis(rows.inputs, place - rows.distance, axis=1) == rows.right).all()
        if objective == "mlm":
            assert (np.take_along_axis(rows.inputs, place, axis=1) == subject.loaded.tokenizer.mask_id).all()
        for options in rows.options.reshape(-1, rows.options.shape[2]):
            assert len(set(options)) == len(options)
        again = kind.rows(cell, generator(5, number), 20, training=False)
        assert rows.ids() == again.ids()
        assert not seen & set(rows.ids())
        seen |= set(rows.ids())
        changed = (rows.inputs != rows.controls["without"]).any(1)
        assert changed.all()
        # The control differs in the answers' source and not where the question is.
        assert (rows.inputs[:, rows.at.min() :] == rows.controls["without"][:, rows.at.min() :]).all()


@pytest.mark.parametrize("name", ["word in noise", "passkey", "number in text"])
def test_a_needle_is_in_the_row_once_and_at_its_depth(
    name: str, objective: str, causal: Path, masked: Path, shards: ShardSet
) -> None:
    settings = SETTINGS[name]
    assert isinstance(settings, NeedleSettings)
    _, kind = kind_of(settings, objective, causal, masked, shards)
    for cell in kind.cells:
        rows = kind.rows(cell, generator(9), 30, training=False)
        question = int(rows.at[0, 0]) + (objective == "clm")
        for row, inputs in enumerate(rows.inputs):
            key = rows.right[row]
            at = question - int(rows.distance[row, 0])
            found = [i for i in range(question) if (inputs[i : i + len(key)] == key).all()]
            assert found == [at]
            for control, text in rows.controls.items():
                assert not any((text[row, i : i + len(key)] == key).all() for i in range(question)), control
            # Only the needle differs from the haystack: from its beginning to its end.
            needle = np.flatnonzero(inputs != rows.controls["other"][row])
            assert at <= needle.min() <= needle.max() < at + len(key)
            if settings.key == "word":  # none of the other options is in the row
                assert np.isin(inputs[:question], rows.options[row]).sum() == 1
        sizes = kind.needle, kind.end
        start = at - len(kind.sentence[0])
        assert start == round((cell.length - sum(sizes)) * cell.facts["depth"] / 100)


def test_a_random_passages_tokens_occur_twice(causal: Path, masked: Path, shards: ShardSet) -> None:
    _, kind = kind_of(SETTINGS["random tokens"], "clm", causal, masked, shards)
    for cell in kind.cells:
        rows = kind.rows(cell, generator(1), 10, training=False)
        for inputs, without in zip(rows.inputs, rows.controls["without"], strict=True):
            passage = inputs[-12:]
            assert len(set(passage)) == 12
            assert np.isin(inputs, passage).sum() == 24
            assert np.isin(without, passage).sum() == 12
            first = cell.length - 12 - int(rows.distance[0, 0])
            other = without[first : first + 12]  # a passage, too: the row is broken in the same places
            assert np.isin(without, other).sum() == len(set(other)) == 12
        assert rows.at.tolist() == [list(range(cell.length - 12, cell.length - 1))] * 10


def test_every_key_of_mqar_is_asked_for_once_behind_the_gap() -> None:
    rows = draw(generator(3), 200, length=64, pairs=5, gap=20, filler=16, half=16)
    for inputs, queries in zip(*rows, strict=True):
        keys, values = inputs[0:10:2], inputs[1:10:2]
        assert len(set(keys)) == len(set(values)) == 5
        assert (inputs[queries] == keys).all()
        assert queries.min() >= 30
        rest = np.delete(inputs, [*range(10), *queries])
        assert rest.max() < 16 <= keys.min() <= keys.max() < 32 <= values.min()


def test_rows_of_mqar_are_those_of_earlier_versions() -> None:
    rows = draw(generator(3), 7, length=64, pairs=5, gap=6, filler=16, half=16)
    found = hashlib.sha256(b"".join(np.ascontiguousarray(part).astype("<i8").tobytes() for part in rows)).hexdigest()
    assert found == "874f8826d9ab9d0356745eaf2a30c9c30bc086f0ea68e998b6d938f86477c34c"
    # What has come since is in no key of a result that does not use it.
    names = set(MQARSettings().as_dict())
    assert not {"spread", "values"} & names
    assert set(MQARSettings(spread=0.5).as_dict()) == names | {"spread"}
    assert set(MQARSettings(spread=0.5, values=2).as_dict()) == names | {"spread", "values"}


def test_mqars_queries_are_drawn_as_by_a_weighted_choice_without_replacement() -> None:
    rows = draw(generator(3), 20_000, length=16, pairs=2, gap=0, filler=16, half=16)
    places = slots(16, 2, 0)
    weights = np.arange(1.0, places + 1) ** (POWER - 1)
    weights /= weights.sum()
    expected = np.zeros(places)
    for i, j in itertools.permutations(range(places), 2):
        expected[[i, j]] += weights[i] * weights[j] / (1 - weights[i])
    assert np.bincount((rows.queries.ravel() - 4) // 2) / 20_000 == pytest.approx(expected, abs=0.02)


def test_text_for_training_is_not_text_that_is_scored(shards: ShardSet) -> None:
    text = Text(shards, 50)
    stream = shards.read(np.array([0]), shards.num_tokens)[0]
    half = shards.num_tokens // 2

    def within(rows: np.ndarray, part: np.ndarray) -> bool:
        windows = {row.tobytes() for row in np.lib.stride_tricks.sliding_window_view(part, 50)}
        return all(row.tobytes() in windows for row in rows)

    assert within(text.windows(generator(0), 40, 50, training=True), stream[:half])
    assert within(text.windows(generator(0), 40, 50, training=False), stream[half:])


NOT_COPIED = ("text", "mqar, several values", "variables", "common words")
"""What takes more than the continuation of the longest match: see test_recall_oracles.py."""


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in NOT_COPIED])
def test_one_who_copies_is_always_right(
    name: str, objective: str, causal: Path, masked: Path, shards: ShardSet
) -> None:
    subject, kind = kind_of(SETTINGS[name], objective, causal, masked, shards)
    copier = Copier(shards.vocab_size, None if objective == "clm" else subject.loaded.tokenizer.mask_id)
    for number, cell in enumerate(kind.cells):
        rows = kind.rows(cell, generator(number), 8, training=False)
        for item, at in zip(items(copier, rows), rows.at, strict=True):
            if name == "random tokens" and at[0] == cell.length - 12:
                continue  # masked: nothing before a passage's first token tells it
            for key in ("right", "exact"):
                assert item[key] == [1] * len(item["distance"]), (key, cell)
            # (A number's later digits can be a repetition of its earlier ones, which the control has too.)
            asked = slice(1) if getattr(SETTINGS[name], "key", "") == "digits" else slice(None)
            assert min(item["gain"][asked]) > 15
            assert min(item["calibrated"][asked]) == 1


@pytest.mark.parametrize(
    "name", ["word in noise", "passkey", "mqar", "mqar, several values", "variables", "common words", "random tokens"]
)
def test_one_who_guesses_is_right_by_chance(name: str, causal: Path, masked: Path, shards: ShardSet) -> None:
    _, kind = kind_of(SETTINGS[name], "clm", causal, masked, shards)
    guesser = Guesser(shards.vocab_size)
    for key in ("right", "calibrated"):
        found: list[float] = []
        chance: list[float] = []
        for number, cell in enumerate(kind.cells):
            for item in items(guesser, kind.rows(cell, generator(number), 400, training=False)):
                found += item[key]
                chance += item["chance"]
        error = float((np.mean(chance) * (1 - np.mean(chance)) / len(found)) ** 0.5)
        assert np.mean(found) == pytest.approx(np.mean(chance), abs=5 * error)


def test_words_are_whole_words_of_the_tokenizer(shards: ShardSet) -> None:
    found = [shards.tokenizer().decode([int(token)]) for token in words(shards.tokenizer())]
    assert {" quiet", " ghost", " violin"} <= set(found)
    assert all(text.startswith(" ") and text[1:].isalpha() and len(text) > 3 for text in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (NeedleSettings(lengths=(40,), haystack="noise", choices=4), "rows of 40 tokens have no room for the needle"),
        (NeedleSettings(lengths=(200,), haystack="noise", choices=200), "--choices 200: the tokenizer has "),
        (NeedleSettings(lengths=(200,), choices=6), "words of one token that are not in it"),
        (NeedleSettings(lengths=(5000,)), "half of them for training: too few for rows of 5000 tokens"),
        (MQARSettings(lengths=(20,), pairs=(6,)), "--lengths 24 or more, fewer --pairs or a smaller --gap"),
        (MQARSettings(lengths=(512,), pairs=(20,), symbols=64), "--symbols 64 are too few for 20 pairs"),
        (MQARSettings(symbols=4000), "--symbols 4000: the tokenizer has 29"),
        (MQARSettings(lengths=(40, 60), pairs=(16, 20), spread=0.5), "rows of 60 tokens have no room for 16 keys with"),
        (MQARSettings(lengths=(512,), pairs=(16,), values=4, spread=0.5, symbols=200), "--symbols 320 or more"),
        (VariablesSettings(lengths=(19,), hops=(4,), chains=(2,)), "2 chains of 4 hops and their questions: --lengths"),
        (
            VariablesSettings(lengths=(512,), hops=(9,), chains=(4,), symbols=64),
            "for 4 chains of 9 hops: --symbols 100",
        ),
        (
            CommonWordsSettings(lengths=(30,), ratios=(8,)),
            "no room for 10 words, one of them 8 times as often: --lengths",
        ),
        (CommonWordsSettings(lengths=(512,), symbols=48), "--symbols 72 or more, or fewer --choices"),
        (InductionSettings(distances=(40,), passage=32, symbols=64), "--symbols 80 or more, or a shorter --passage"),
    ],
)
def test_what_does_not_fit_is_refused(settings: RecallSettings, message: str, causal: Path, shards: ShardSet) -> None:
    def rows() -> None:
        _, kind = kind_of(settings, "clm", causal, causal, shards)
        kind.rows(kind.cells[0], generator(0), 4, training=False)

    with pytest.raises(UserError) as error:
        rows()
    assert message in str(error.value)
