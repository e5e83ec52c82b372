"""Recall on models: scores equal a naive computation, other forms share the weights, training on the task learns it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suites_case import subject_of

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.results.statistics import estimate
from eval.shared.forms import named_forms, window_tokens, with_attention
from eval.subject import Subject
from eval.suites.load import available, load_suites
from eval.tasks.recall import (
    CommonWordsSettings,
    InductionSettings,
    MQARSettings,
    NeedleSettings,
    RecallSettings,
    VariablesSettings,
    task,
)
from eval.tasks.recall.questions import generator
from eval.tasks.recall.score import answers, items
from pretrain.model import build_model

NEEDLE = NeedleSettings(lengths=(100, 160), depths=(0, 100), haystack="filler", key="digits", digits=2, rows=3)
MQAR = MQARSettings(lengths=(40, 64), pairs=(2, 4), symbols=64, rows=4)
VALUES = MQARSettings(lengths=(48, 64), pairs=(2, 3), symbols=64, rows=4, spread=0.4, values=2)
VARIABLES = VariablesSettings(lengths=(40, 64), hops=(0, 2), chains=(2, 3), symbols=64, rows=3)
WORDS = CommonWordsSettings(lengths=(40, 64), ratios=(2, 4), choices=3, symbols=64, rows=4)
RANDOM = InductionSettings(distances=(8, 16, 48), passage=8, symbols=64, rows=3)


def recall(subject: Subject, settings: RecallSettings, parts: Parts | None = None) -> Outcome:
    return task.run(subject, task.resolve(subject, settings), parts or Parts())


@pytest.mark.parametrize(
    "settings",
    [NEEDLE, MQAR, VALUES, VARIABLES, WORDS, RANDOM],
    ids=["needle", "mqar", "values", "variables", "words", "random"],
)
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_scores_equal_a_naive_float64_computation(
    settings: RecallSettings, objective: str, causal: Path, masked: Path, shards: ShardSet
) -> None:
    subject = subject_of(causal if objective == "clm" else masked, shards)
    kind = task.make_kind(subject, task.resolve(subject, settings))
    rows = kind.rows(kind.cells[-1], generator(3), 4, training=False)
    model = build_model(subject.loaded.model_config).double()
    model.load_state_dict(subject.model.state_dict())
    model.eval()

    def log_p(inputs: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.from_numpy(inputs)).logits.log_softmax(-1)

    with_answer, without = log_p(rows.inputs), log_p(rows.controls["without"])
    for number, item in enumerate(items(subject.model, rows)):
        for place, at in enumerate(rows.at[number]):
            goal = int(rows.options[number, place, rows.answer[number, place]])
            options = rows.options[number, place].tolist()
            here, there = (-float(table[number, at, goal]) for table in (with_answer, without))
            assert item["nats"][place] == pytest.approx(here, rel=1e-4)
            assert item["gain"][place] == pytest.approx(there - here, abs=1e-3)
            ranked = sorted(options, key=lambda token: -float(with_answer[number, at, token]))
            assert item["right"][place] == (ranked[0] == goal)
            pmi = [float(with_answer[number, at, t] - without[number, at, t]) for t in options]
            assert item["calibrated"][place] == (options[int(np.argmax(pmi))] == goal)
            assert item["exact"][place] == (int(with_answer[number, at].argmax()) == goal)


def test_logits_are_the_same_in_any_batch(causal: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(causal, shards)
    kind = task.make_kind(subject, task.resolve(subject, RANDOM))
    rows = kind.rows(kind.cells[0], generator(3), 5, training=False)
    together, _ = answers(subject.model, rows.inputs, rows)
    monkeypatch.setattr("eval.tasks.recall.score.TOKENS", 2 * rows.inputs.shape[1])
    monkeypatch.setattr("eval.tasks.recall.score.LOGIT_BUDGET", 3 * shards.vocab_size)
    apart, _ = answers(subject.model, rows.inputs, rows)
    assert together == pytest.approx(apart, abs=1e-4)


def test_forms_share_the_weights_and_are_exact_within_the_window(causal: Path, shards: ShardSet) -> None:
    subject = subject_of(causal, shards)
    config = subject.loaded.model_config
    known = named_forms(config, ["own", "softmax", "nystrom", "window"])
    assert list(known) == ["own", "softmax", "window"]  # nystrom is its own
    assert window_tokens(config) == window_tokens(known["window"]) == 16
    assert window_tokens(known["softmax"]) is None
    built = {name: with_attention(subject.model, form.model_dump(), fresh=True) for name, form in known.items()}
    ids = torch.from_numpy(generator(0).integers(5, 250, (2, 48)))
    with torch.no_grad():
        own, exact, window = (built[name](ids).logits for name in ("own", "softmax", "window"))
    assert torch.equal(own, subject.model(ids).logits)
    assert torch.allclose(own[:, :16], exact[:, :16], atol=1e-4)  # the window holds everything
    assert torch.allclose(window[:, :16], exact[:, :16], atol=1e-4)
    assert (own[:, 40:] - exact[:, 40:]).abs().max() > 1e-3
    assert (window[:, 40:] - own[:, 40:]).abs().max() > 1e-3


def test_nothing_comes_from_beyond_the_reach_of_a_window(export: Callable[..., Path], shards: ShardSet) -> None:
    path = export("window", objective="clm", attention="window")
    outcome = recall(subject_of(path, shards), RANDOM)
    gain = next(series for series in outcome.series if series.name == "gain, nats, as it is")
    assert gain.x == [8, 16, 48]
    assert abs(gain.y[0]) > 1e-3
    assert gain.y[2] == pytest.approx(0, abs=1e-6)  # two layers of at most 16 tokens


def test_chance_weighs_questions_as_the_accuracy_does(causal: Path, shards: ShardSet) -> None:
    outcome = recall(subject_of(causal, shards), MQAR)  # 2 questions of 2 options, 4 questions of 4
    assert outcome.metrics["chance"].value == pytest.approx(2 / 6)
    chance = next(series for series in outcome.series if series.name == "chance")
    assert min(chance.y) < 2 / 6 < max(chance.y)


def test_other_forms_take_landmarks_parameters_or_leave_them(export: Callable[..., Path], shards: ShardSet) -> None:
    path = export("landmarks", objective="clm", landmark_inverse=True, learn_landmark_query=True)
    subject = subject_of(path, shards)
    window = with_attention(subject.model, {"attention": "window"}, fresh=True)
    assert not any(name.endswith("gamma_logit") for name in window.state_dict())
    with pytest.raises(ValueError, match="gamma_logit"):
        with_attention(window, subject.loaded.model_config.model_dump())
    back = with_attention(window, subject.loaded.model_config.model_dump(), fresh=True)
    assert any(name.endswith("gamma_logit") for name in back.state_dict())


@pytest.mark.parametrize("settings", [NEEDLE, MQAR, RANDOM], ids=["needle", "mqar", "random"])
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_the_outcome_follows_from_its_records(
    settings: RecallSettings, objective: str, causal: Path, masked: Path, shards: ShardSet, tmp_path: Path
) -> None:
    subject = subject_of(causal if objective == "clm" else masked, shards)
    asked = settings.model_copy(update={"attention": ("own", "window"), "train_steps": 2, "seeds": 2, "seed": 3})
    start = "checkpoint" if objective == "clm" else "scratch"
    asked = asked.model_copy(update={"train_batch_tokens": 256, "precision": "fp32", "start": start})
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    outcome = recall(subject, asked, Parts(tmp_path))
    again = recall(subject, asked)
    assert outcome == again  # a function of the settings, whether parts were kept or not
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    cells = len(task.make_kind(subject, task.resolve(subject, asked)).cells)
    assert len(list(tmp_path.iterdir())) == 2 * cells + 2 * 2
    assert len({record["id"] for record in outcome.records}) == len(outcome.records) == cells * settings.rows
    json.dumps([outcome.records, outcome.samples], allow_nan=False)
    for name, estimator in outcome.estimators.items():
        metric = outcome.metrics[name]
        assert metric.value == pytest.approx(estimate(outcome.records, estimator))
        assert metric.low is not None
        assert metric.high is not None
        assert metric.low <= metric.value <= metric.high
    assert {"accuracy", "calibrated", "exact", "gain", "trained_accuracy", "trained_std_over_seeds"} <= set(
        outcome.metrics
    )
    assert ("accuracy_beyond_window" in outcome.metrics) == (objective == "clm")
    table = outcome.tables[0]
    assert [row[0] for row in table.rows] == ["as it is", "window, as it is", "trained", "window, trained", "chance"]
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert [row[:2] for row in outcome.tables[1].rows] == [
        [form, seed] for form in ("own", "window") for seed in (3, 4)
    ]
    for grid in outcome.grids:
        assert np.array(grid.values).shape == (len(grid.y), len(grid.x))
        if "accuracy" in grid.name:
            assert (grid.low, grid.high) == (outcome.metrics["chance"].value, 1.0)
    whole = [grid for grid in outcome.grids if grid.name.endswith("accuracy, as it is")]
    if whole:
        assert np.mean(np.array(whole[0].values, dtype=float), axis=None) == pytest.approx(
            np.mean([record["accuracy"] / record["questions"] for record in outcome.records])
        )
    assert sum(series.reference for series in outcome.series) == 2  # chance, and no gain
    assert all(len(series.x) == len(series.y) for series in outcome.series)
    assert outcome.samples


@pytest.mark.parametrize("settings", [VARIABLES, WORDS, VALUES], ids=["variables", "words", "values"])
def test_heat_maps_are_means_over_the_cells_of_a_place(
    settings: RecallSettings, causal: Path, shards: ShardSet
) -> None:
    asked = settings.model_copy(update={"train_steps": 1, "train_batch_tokens": 128, "precision": "fp32"})
    subject = subject_of(causal, shards)
    outcome = recall(subject, asked)
    axes = task.make_kind(subject, task.resolve(subject, asked)).axes
    assert axes is not None
    assert [grid.name.split(": ")[1] for grid in outcome.grids] == [
        f"{what}, {mode}" for mode in ("as it is", "trained") for what in ("accuracy", "gain, nats")
    ][:3]  # gain needs the controls, which are scored as the model is
    grid = outcome.grids[0]
    for y, row in zip(grid.y, grid.values, strict=True):
        for x, value in zip(grid.x, row, strict=True):
            here = [r for r in outcome.records if (str(r[axes[0]]), str(r[axes[1]])) == (y, x)]
            assert len(here) == settings.rows * (2 if settings is VARIABLES else 1)
            right, questions = sum(r["accuracy"] for r in here), sum(r["questions"] for r in here)
            assert value == pytest.approx(right / questions)


def test_two_models_of_one_tokenizer_are_asked_the_same(
    causal: Path, export: Callable[..., Path], shards: ShardSet
) -> None:
    other = export("other", objective="clm", attention="softmax", num_layers=1)
    ids = [[record["id"] for record in recall(subject_of(path, shards), NEEDLE).records] for path in (causal, other)]
    assert ids[0] == ids[1]


def test_rows_longer_than_the_training_say_so(export: Callable[..., Path], shards: ShardSet, causal: Path) -> None:
    subject = subject_of(causal, shards)
    assert "Rows of 100, 160 tokens are longer than the 64" in recall(subject, NEEDLE).tables[0].note
    path = export("short", objective="clm", positions="learned", max_positions=64)
    with pytest.raises(UserError, match="--lengths 100 is longer than the 64 learned positions"):
        task.resolve(subject_of(path, shards), NEEDLE)
    with pytest.raises(UserError, match="--distances and --passage together, 120 is longer than"):
        task.resolve(subject_of(path, shards), InductionSettings(distances=(100,), passage=20))


def test_left_out_settings_come_from_the_model(causal: Path, shards: ShardSet) -> None:
    subject = subject_of(causal, shards)  # trained on 64 tokens, 32 wide
    needle = task.resolve(subject, NeedleSettings(train_steps=1))
    assert (needle.lengths, needle.train_length, needle.train_lr) == ((16, 32, 64), 64, 0.25 / 32)
    induction = task.resolve(subject, InductionSettings(passage=10))
    assert induction.distances == (10, 20, 40, 54)
    assert task.resolve(subject, induction) == induction
    assert task.resolve(subject, InductionSettings(passage=32)).distances == (32,)
    with pytest.raises(
        UserError, match=r"--passage 33: a row of 64 .* --passage 32 or less, or --distances 33 or more"
    ):
        task.resolve(subject, InductionSettings(passage=33))
    assert task.resolve(subject, InductionSettings(passage=33, distances=(40,))).distances == (40,)


def test_what_plays_no_part_does_not_keep_models_from_being_compared(
    causal: Path, export: Callable[..., Path], shards: ShardSet
) -> None:
    """A wide softmax model beside a narrow one of landmarks; and one of them asked for with other settings."""
    nystrom = subject_of(causal, shards)
    softmax = subject_of(export("wide", objective="clm", attention="softmax", hidden_size=64), shards)
    asked = MQAR.model_copy(update={"attention": ("own", "softmax", "window")})
    with_training = asked.model_copy(update={"seeds": 3, "start": "scratch", "train_lr": 1e-3, "precision": "bf16"})
    first, second = task.resolve(nystrom, asked), task.resolve(softmax, with_training)
    assert first.as_dict() == second.as_dict()
    assert first.attention == ("own", "softmax", "window")
    assert first.train_lr is first.train_length is None
    assert task.resolve(nystrom, first) == first
    rows = [[row[0] for row in recall(subject, asked).tables[0].rows] for subject in (nystrom, softmax)]
    assert rows == [
        ["as it is", "softmax, as it is", "window, as it is", "chance"],
        ["as it is", "window, as it is", "chance"],  # its own form is not run twice
    ]
    alone = MQAR.model_copy(update={"attention": ("own", "softmax")})
    assert "Forms other than" not in recall(softmax, alone).tables[0].note
    trained = [task.resolve(s, with_training.model_copy(update={"train_steps": 1})) for s in (nystrom, softmax)]
    assert trained[0].as_dict() == trained[1].as_dict()
    assert (trained[0].seeds, trained[0].train_lr, trained[0].train_length) == (3, 1e-3, 64)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (NeedleSettings, {"depths": (50, 101)}, "depths: 101 is not between 0 and 100 percent"),
        (NeedleSettings, {"sentence": "no place"}, "sentence: 'no place' must have {key} in it, once"),
        (NeedleSettings, {"question": "{key} first"}, "question: '{key} first' must have {key} in it, once, and words"),
        (NeedleSettings, {"lengths": (64, 64)}, "lengths: 64 64 has one twice"),
        (MQARSettings, {"pairs": (1,)}, "pairs: at least 2"),
        (MQARSettings, {"values": 2}, "values: 2 of a key need the pairs spread, for example spread 0.5"),
        (MQARSettings, {"spread": 1.0}, "less than 1"),
        (VariablesSettings, {"hops": (-1, 2)}, "hops: -1 is negative"),
        (VariablesSettings, {"chains": (1, 4)}, "chains: at least 2"),
        (CommonWordsSettings, {"ratios": (1, 2)}, "ratios: 1 is less than 2"),
        (InductionSettings, {"distances": (16, 32), "passage": 20}, "distances: 16 is shorter than the passage of 20"),
    ],
)
def test_wrong_settings_are_refused(cls: type[RecallSettings], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="validation error") as error:
        cls(**values)
    assert message in str(error.value)


def test_training_on_rows_that_are_not_there_is_refused(causal: Path, shards: ShardSet) -> None:
    with pytest.raises(UserError, match="--train-length 50: the shortest rows have 100 tokens"):
        task.resolve(subject_of(causal, shards), NEEDLE.model_copy(update={"train_steps": 1, "train_length": 50}))


def test_text_needs_held_out_shards(causal: Path) -> None:
    subject = Subject(subject_of(causal, None).loaded)
    with pytest.raises(UserError, match="say where some are with --data SHARDS"):
        task.data(subject, task.resolve(subject, NeedleSettings(lengths=(160,))))
    assert "hash" in task.data(subject, task.resolve(subject, NEEDLE))


def test_the_projects_suites_are_valid() -> None:
    first = ("needle", "passkey", "mqar", "induction", "variables", "common")
    ours = [path.stem for path in available() if path.stem.split("-")[0] in first]
    suites = load_suites([*ours, "repeats"])
    assert {suite.task.name for suite in suites} == {"needle", "mqar", "induction", "variables", "common-words"}
    assert all(suite.description for suite in suites)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mqar", "passkey"])
def test_training_on_the_task_learns_it(name: str, export: Callable[..., Path], shards: ShardSet) -> None:
    path = export(f"learner-{name}", objective="clm", attention="softmax", hidden_size=64, init_std=0.1)
    subject = subject_of(path, shards)
    settings: RecallSettings = MQARSettings(lengths=(24,), pairs=(4,), symbols=32, rows=64)
    if name == "passkey":
        settings = NeedleSettings(
            lengths=(32,), depths=(0, 50, 100), haystack="noise", key="digits", digits=1, rows=32,
            sentence=" key {key}", question=" key {key}",
        )  # fmt: skip
    # Associative recall is found all at once, after about 200 steps from these weights.
    steps: dict[str, Any] = {
        "train_steps": 400 if name == "mqar" else 150,
        "train_batch_tokens": 1024,
        "train_lr": 3e-3,
    }
    steps |= {"precision": "fp32", "start": "scratch"}
    outcome = recall(subject, settings.model_copy(update=steps))
    chance = outcome.metrics["chance"].value
    assert (outcome.metrics["accuracy"].low or 0) < chance + 0.1  # untrained weights know nothing
    assert (outcome.metrics["trained_accuracy"].low or 0) > 2 * chance
    assert outcome.metrics["trained_accuracy"].value > 0.8
