"""The classification suite as a whole, on a separable set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suites_case import WORDS, subject_of

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.results.parts import Job, Parts
from eval.results.schema import Metric, Outcome
from eval.results.statistics import bootstrap, estimate
from eval.shared.labelled import Labelled
from eval.shared.training import length_batches
from eval.subject import Subject
from eval.suites.load import load_suites
from eval.tasks.classification import MAJORITY_ROW, MODEL_ROW, SCRATCH_ROW, TFIDF_CUT_ROW, TFIDF_ROW, ClassifySettings
from eval.tasks.classification import task as classification
from eval.tasks.classification.dataset import ClassifyData
from eval.tasks.classification.jobs import majority, tfidf
from eval.tasks.classification.metrics import Predictions
from eval.tasks.classification.outcome import Scored, estimators_of, few_seeds, records_of, verdict
from pretrain.checkpoint.load import unique_weights, weights_hash


def classify(subject: Subject, settings: ClassifySettings, parts: Parts | None = None) -> Outcome:
    return classification.run(subject, classification.resolve(subject, settings), parts or Parts())


class Scattered(Parts):
    """Runs the jobs as other processes might: in another order, and with another random state before each."""

    def map(self, jobs: Sequence[Job]) -> list[Any]:
        found = {}
        for number, job in enumerate(reversed(jobs)):
            torch.manual_seed(1000 + number)
            np.random.seed(number)
            found[job[0]] = super().map([job])[0]
        return [found[name] for name, _ in jobs]


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_classification_of_a_separable_set(
    kind: str, labelled: tuple[Path, Path], request: pytest.FixtureRequest, shards: ShardSet, capsys: Any
) -> None:
    subject = subject_of(request.getfixturevalue(kind), shards)
    before = weights_hash(unique_weights(subject.model))
    train, test = map(str, labelled)
    settings = ClassifySettings(
        train=train, test=test, max_length=24, seeds=2, scratch_seeds=1, epochs=5, batch_size=8, lr=3e-3,
        pooling="last" if kind == "causal" else "mean",
    )  # fmt: skip
    data = ClassifyData.read(settings)
    outcome = classify(subject, settings)
    lines = capsys.readouterr().out.splitlines()
    begun = [line for line in lines if " texts, at most 5 epochs, the best chosen on " in line]
    assert [line.split(":")[0] for line in begun] == [
        f"{MODEL_ROW}, seed 0",
        f"{SCRATCH_ROW}, seed 0",
        f"{MODEL_ROW}, seed 1",
    ]
    assert [line.partition("; ")[2] for line in begun] == ["2 fits to follow", "1 fit to follow", ""]
    looks = [line for line in lines if ": epoch " in line]
    assert [line.split(": ")[1] for line in looks] == [f"epoch {n}" for n in (1, 2, 3, 4, 5)] * 3
    assert re.search(
        r": epoch 2: accuracy 0\.\d{3}, loss \d\.\d{3}, about \d+ \w+ left, about \d+ \w+ for all fits$", looks[1]
    )
    assert not any("warning" in line for line in lines)
    assert weights_hash(unique_weights(subject.model)) == before  # the other suites must see the checkpoint
    metrics, records = outcome.metrics, outcome.records
    share = max(np.mean(data.numbers(data.test) == c) for c in (0, 1))
    assert metrics["majority_accuracy"].value == pytest.approx(share)
    assert metrics["majority_mcc"].value == 0.0
    assert metrics["tfidf_accuracy"].value > share
    assert metrics["accuracy"].value > share + (0.1 if kind == "causal" else 0.15)
    assert metrics["accuracy"].n == 2
    assert metrics["accuracy"].std is not None
    assert metrics["share_of_texts_cut"].value > 0.1
    table, seeds, lengths, calibration, classes = outcome.tables
    assert [row[0] for row in table.rows] == [MODEL_ROW, SCRATCH_ROW, TFIDF_ROW, TFIDF_CUT_ROW, MAJORITY_ROW]
    assert table.columns[:7] == ["predictor", "accuracy", "± std", "macro F1", "± std", "MCC", "± std"]
    assert table.rows[0][-1] == 2
    assert "are longer than the 24 tokens read. 2 seeds: the standard deviation over them says little." in table.note
    assert [row[:2] for row in seeds.rows] == [[MODEL_ROW, 0], [SCRATCH_ROW, 0], [MODEL_ROW, 1]]
    assert np.mean([row[4] for row in seeds.rows if row[0] == MODEL_ROW]) == pytest.approx(metrics["accuracy"].value)

    # The records give the metrics back, with the intervals.
    assert len({record["id"] for record in records}) == len(data.test) == len(records)
    for name, estimator in outcome.estimators.items():
        interval = bootstrap(records, estimator)
        assert interval.value == pytest.approx(metrics[name].value)
        assert (interval.low, interval.high) == (metrics[name].low, metrics[name].high)
    assert set(outcome.estimators) == {"accuracy", "brier", "gain_over_scratch", "gain_over_tfidf"}
    gain = metrics["accuracy"].value - metrics["scratch_accuracy"].value
    assert metrics["gain_over_scratch"].value == pytest.approx(gain)
    for record, label, text in zip(records, data.test.labels, data.test.texts, strict=True):
        assert record["label"] == label
        assert record["correct"] == np.mean([record[f"predicted_{seed}"] == label for seed in (0, 1)])
        assert record["tokens"] == len(subject.loaded.tokenizer.encode(text))
    assert 0 <= metrics["ece"].value <= 1
    assert metrics["accuracy"].low <= metrics["accuracy"].value <= metrics["accuracy"].high  # type: ignore[operator]

    # Buckets of lengths and of confidence hold every item once.
    assert sum(row[1] for row in lengths.rows) == len(records)
    assert sum(row[1] * row[2] for row in lengths.rows) / len(records) == pytest.approx(metrics["accuracy"].value)
    assert sum(row[1] for row in calibration.rows) == 2 * len(records)
    # Of each class what was found of it and what was said to be it; all of the confusion matrix' rows add up to one.
    assert [row[:2] for row in classes.rows] == [[name, data.test.labels.count(name)] for name in ("0", "1")]
    assert np.mean([row[4] for row in classes.rows]) == pytest.approx(metrics["macro_f1"].value)
    (matrix,) = outcome.grids
    shares = np.array(matrix.values)
    np.testing.assert_allclose(shares.sum(1), 1)
    assert shares.diagonal().tolist() == pytest.approx([row[3] for row in classes.rows])  # recall
    assert matrix.y == [f"{name} ({data.test.labels.count(name)})" for name in ("0", "1")]
    assert metrics["share_of_texts_trained_on"].value == 0
    charts = {series.chart or series.name for series in outcome.series}
    assert {"accuracy by length", "reliability", "dev accuracy by epoch", "test items by length"} == charts
    wrong = outcome.samples
    assert all(sample["label"] != sample["predicted"] for sample in wrong)
    json.dumps([table.rows for table in outcome.tables])  # plain values

    if kind == "masked":
        assert classify(subject, settings, Scattered()) == outcome  # whoever computes the parts


def test_pairs_dev_file_and_f1_of_a_class(
    causal: Path, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    paths = {}
    for part, count in {"train": 40, "dev": 12, "test": 20}.items():
        paths[part] = tmp_path / f"{part}.jsonl"
        with paths[part].open("w") as file:
            for _ in range(count):
                same = rng.random() < 0.5
                word = WORDS[rng.integers(2, 8)]
                record = {"one": word, "two": word if same else WORDS[0], "same": "yes" if same else "no"}
                file.write(json.dumps(record) + "\n")
    subject = subject_of(causal, shards)
    named = {part: str(path) for part, path in paths.items()}
    settings = ClassifySettings(
        **named, text_field="one", text_b_field="two", label_field="same", positive_label=("yes",), max_length=8,
        seeds=1, scratch_seeds=0, steps=4, dev_records=5,
    )  # fmt: skip
    held: list[int] = []
    original = classification.Fits.split

    def split(self: Any, seed: int) -> Any:
        found = original(self, seed)
        held.extend(len(part) for part in found[1:])
        assert found[0].labels[found[2]].tolist() == [
            ["no", "yes"].index(self.data.dev.labels[i]) for i in found[2] - len(self.data.train)
        ]
        return found

    monkeypatch.setattr(classification.Fits, "split", split)
    outcome = classify(subject, settings)
    assert outcome.tables[0].note.endswith(" 1 seed: how far another one would be off is not known.")
    assert held == [40, 5]  # all of the training file, and a draw of the other
    assert outcome.metrics["tfidf_f1"].value > 0.95  # the second text alone tells
    assert "f1" in outcome.metrics
    assert "gain_over_scratch" not in outcome.estimators
    assert "F1" in outcome.tables[0].columns


def test_rejections(causal: Path, export: Callable[..., Path], shards: ShardSet, labelled: tuple[Path, Path]) -> None:
    train, test = map(str, labelled)
    subject = subject_of(causal, shards)
    plain = ClassifySettings(train=train, test=test)
    for changes, words in [
        ({"pooling": "cls"}, "in a causal model has seen nothing but itself"),
        ({"text_b_field": "b", "max_length": 2}, "too short for pairs"),
        ({"train": None}, "--train FILE --test FILE"),
        ({"max_length": 1}, "at least 2 tokens"),
    ]:
        with pytest.raises(UserError, match=words):
            classification.resolve(subject, plain.model_copy(update=changes))
    short = subject_of(export("short", objective="mlm", positions="learned", max_positions=64), shards)
    with pytest.raises(UserError, match="64 learned positions"):
        classification.resolve(short, plain.model_copy(update={"max_length": 65}))
    assert classification.resolve(short, plain.model_copy(update={"pooling": "cls"})).max_length == 64
    with pytest.raises(UserError, match="no such class"):
        classification.data(subject, plain.model_copy(update={"positive_label": ("x",)}))


def test_baselines() -> None:
    labels = np.array([0, 0, 1, 2, 0])
    found = majority(labels, 3, 4)
    assert found.classes.tolist() == [0] * 4
    np.testing.assert_allclose(found.probabilities, [[0.6, 0.2, 0.2]] * 4)
    without_words = tfidf([["!"] * 5], labels, [["?"] * 4])
    assert without_words.classes.tolist() == found.classes.tolist()
    words = [["cat dog"] * 20 + ["tree"] * 20]
    sure = tfidf(words, np.repeat([0, 1], 20), [["tree", "dog"]])
    assert sure.classes.tolist() == [1, 0]
    np.testing.assert_allclose(sure.probabilities.sum(1), 1.0)


def test_the_verdict_follows_the_intervals() -> None:
    def gain(low: float, high: float) -> Metric:
        return Metric((low + high) / 2, True, n=10, low=low, high=high)

    text = verdict({"gain_over_tfidf": gain(-0.3, -0.1), "gain_over_scratch": gain(0.1, 0.3)})
    assert text.startswith(f"{TFIDF_ROW} is better than the fine-tuned model, whose accuracy is 0.200 below")
    assert "The fine-tuned model is better than the same network from scratch: its accuracy is 0.200 above" in text
    assert "cannot be told apart" in verdict({"gain_over_tfidf": gain(-0.1, 0.2)})
    assert verdict({}) == ""


def test_few_seeds_are_spoken_of() -> None:
    assert [bool(few_seeds(seeds)) for seeds in (1, 2, 3, 5)] == [True, True, False, False]


def test_length_batches_hold_every_example_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=203)
    indices = np.arange(203)
    found = list(length_batches(lengths, indices, 8, np.random.default_rng(1)))
    assert sorted(np.concatenate(found)) == list(range(203))
    spread = np.mean([np.ptp(lengths[b]) for b in found])
    assert spread < 0.4 * np.mean([np.ptp(lengths[i : i + 8]) for i in range(0, 203, 8)])


def test_texts_that_were_trained_on_are_told_apart() -> None:
    """Small letters and white space do not make another text, the label does not either; of pairs both count."""
    train = Labelled(["A river ", "stone", "lamp"], ["x", "y", "y"], "train", "", ["1", "2", "3"])
    dev = Labelled(["cloud"], ["x"], "dev", "", ["4"])
    test = Labelled(["a  RIVER", "stone", "cloud", "paper"], ["y", "y", "x", "x"], "test", "", ["1", "3", "4", "1"])
    assert ClassifyData(train, test, ["x", "y"], dev).seen().tolist() == [True, False, True, False]
    assert ClassifyData(train, test, ["x", "y"]).seen().tolist() == [True, False, False, False]
    seen = np.array([True, False, True, False])
    truth, guess = np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0])
    rows = {MODEL_ROW: [Predictions(guess, np.eye(2)[guess])]}
    records = records_of(Scored(truth, rows, ["x", "y"]), list("abcd"), np.ones(4), seen)
    estimators = estimators_of(records)
    assert estimate(records, estimators["accuracy"]) == 0.75
    assert estimate(records, estimators["accuracy_unseen"]) == 0.5


def test_a_preset_runs_on_local_files(causal: Path, shards: ShardSet, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mrpc").mkdir()
    for part in ("train", "test"):
        with (tmp_path / "mrpc" / f"{part}.jsonl").open("w") as file:
            for i in range(20):
                record = {"sentence1": WORDS[i % 5], "sentence2": WORDS[i % 2], "label": i % 2}
                file.write(json.dumps(record) + "\n")
    given = {"local_dir": str(tmp_path), "max_length": 8, "seeds": 1, "scratch_seeds": 0, "steps": 2}
    suite = load_suites(["mrpc"], overrides=[(None, key, value) for key, value in given.items()])[0]
    assert isinstance(suite.settings, ClassifySettings)
    outcome = classify(subject_of(causal, shards), suite.settings)
    said = "20 of 20 test texts (100.0%) stand in "
    assert f"warning: {said}" in capsys.readouterr().out
    assert said in outcome.tables[0].note
    assert outcome.metrics["share_of_texts_trained_on"].value == 1
    assert "accuracy_unseen" not in outcome.metrics
    assert outcome.metrics["tfidf_f1"].value == 1.0
    assert 0 <= outcome.metrics["f1"].value <= 1
