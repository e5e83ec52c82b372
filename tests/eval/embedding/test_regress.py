"""Regression by fine-tuning: scores that can be learned are, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from suites_case import WORDS, subject_of

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.results.parts import Parts
from eval.results.statistics import bootstrap
from eval.suites.load import load_suites
from eval.tasks.classification import MODEL_ROW, SCRATCH_ROW
from eval.tasks.regression import TFIDF_CUT_ROW, TFIDF_ROW, RegressSettings, task
from eval.tasks.regression.jobs import RegressData, ridge, spearman_and_loss, squared_error


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(root: Path) -> tuple[str, str]:
    """Texts whose score is ten times the share of one word, and 100."""
    rng = np.random.default_rng(2)

    def row() -> dict[str, Any]:
        size = int(rng.integers(6, 14))
        own = int(rng.integers(0, size + 1))
        words = [WORDS[0]] * own + rng.choice(WORDS[1:], size - own).tolist()
        return {"text": " ".join(rng.permutation(words)), "score": 100 + 10 * own / size}

    return tuple(write(root / f"{part}.jsonl", [row() for _ in range(n)]) for part, n in (("a", 60), ("b", 30)))  # type: ignore[return-value]


def test_scores_are_learned(files: tuple[str, str], causal: Path, shards: ShardSet, capsys: Any) -> None:
    subject = subject_of(causal, shards)
    settings = task.resolve(
        subject,
        RegressSettings(
            train=files[0], test=files[1], max_length=12, seeds=2, scratch_seeds=1, epochs=3, batch_size=8, lr=3e-3
        ),
    )
    outcome = task.run(subject, settings, Parts())
    said = capsys.readouterr().out
    assert ": epoch 1: Spearman " in said
    metrics, table, records = outcome.metrics, outcome.tables[0], outcome.records
    assert [row[0] for row in table.rows] == [MODEL_ROW, SCRATCH_ROW, TFIDF_ROW, TFIDF_CUT_ROW]
    assert metrics["spearman"].value > 0.8
    assert metrics["pearson"].value > 0.8
    assert metrics["tfidf_spearman"].value > 0.8
    assert metrics["spearman"].n == 2
    low, high = metrics["spearman"].low, metrics["spearman"].high
    assert low is not None
    assert high is not None
    assert low < metrics["spearman"].value < high
    truth = RegressData.read(settings).test.scores
    # Predictions are in the units of the scores: standardised ones would be 10,000 off.
    assert metrics["mean_squared_error"].value < 2 * truth.var()
    assert [record["score"] for record in records] == truth.tolist()
    assert spearmanr([record["predicted"] for record in records], truth)[0] > 0.8
    assert set(outcome.estimators) == {"spearman", "pearson", "gain_over_scratch", "gain_over_tfidf"}
    for name, estimator in outcome.estimators.items():
        assert bootstrap(records, estimator).value == pytest.approx(metrics[name].value)
    gain = metrics["spearman"].value - metrics["tfidf_spearman"].value
    assert metrics["gain_over_tfidf"].value == pytest.approx(gain)
    by_seed = outcome.tables[1]
    assert [row[:2] for row in by_seed.rows] == [[MODEL_ROW, 0], [SCRATCH_ROW, 0], [MODEL_ROW, 1]]
    assert all(row[3] > 0.5 for row in by_seed.rows)
    assert outcome.series[0].x == [1.0, 2.0, 3.0]
    assert "2 seeds: the standard deviation over them says little" in table.note
    json.dumps([table.rows, records, outcome.samples])


def test_the_goal_is_the_squared_error_and_the_choice_is_by_rank() -> None:
    outputs, scores = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0.0, 2.0, 3.0])
    assert float(squared_error(outputs, scores)) == 2.0
    assert spearman_and_loss(outputs, scores) == (pytest.approx(1.0), pytest.approx(2 / 3))
    assert spearman_and_loss(-outputs, scores)[0] == pytest.approx(-1.0)
    assert spearman_and_loss(torch.ones(3, 1), scores)[0] == -1.0  # not defined: no reason to choose it


def test_targets_are_standardised_by_the_training_scores(files: tuple[str, str]) -> None:
    data = RegressData.read(RegressSettings(train=files[0], test=files[1]))
    numbers = data.numbers(data.train)
    assert numbers.dtype == np.float32
    assert (numbers.mean(), numbers.std()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))
    mean, deviation = data.scale
    np.testing.assert_allclose(data.numbers(data.test) * deviation + mean, data.test.scores, rtol=1e-6)
    drawn = RegressData.read(RegressSettings(train=files[0], test=files[1], train_records=10))
    assert len(drawn.train) == 10
    assert drawn.describe()["hash"] != data.describe()["hash"]


def test_ridge_of_pairs_sees_likeness() -> None:
    rng = np.random.default_rng(0)

    def pairs(n: int) -> tuple[list[list[str]], np.ndarray]:
        columns: list[list[str]] = [[], []]
        likeness = []
        for _ in range(n):
            first = rng.choice(WORDS, 5, replace=False)
            kept = int(rng.integers(0, 6))
            others = [word for word in WORDS if word not in first]
            columns[0].append(" ".join(first))
            columns[1].append(" ".join([*first[:kept], *rng.choice(others, 5 - kept, replace=False)]))
            likeness.append(kept)
        return columns, np.array(likeness, dtype=np.float32)

    (train, scores), (test, truth) = pairs(100), pairs(50)
    assert spearmanr(ridge(train, scores, test), truth)[0] > 0.9
    assert ridge([["!"] * 3], np.array([1.0, 2.0, 6.0]), [["?"] * 2]).tolist() == [3.0, 3.0]
    alone = ridge([["a cat", "a dog", "a cat"], ["x y", "z w", "v u"]], np.array([1.0, 2.0, 1.0]), [["a dog"], ["q r"]])
    assert 1.0 < alone[0] < 2.5  # no pair is alike, so likeness tells nothing


def test_a_preset_runs_on_local_pairs(masked: Path, shards: ShardSet, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 12)):
        rows = [
            {"sentence1": WORDS[i % 5], "sentence2": WORDS[int(rng.integers(5))], "label": i % 6} for i in range(count)
        ]
        write(tmp_path / "stsb" / f"{part}.jsonl", rows)
    given = {"local_dir": str(tmp_path), "max_length": 8, "seeds": 1, "scratch_seeds": 0, "steps": 2}
    (suite,) = load_suites(["stsb"], overrides=[(None, key, value) for key, value in given.items()])
    subject = subject_of(masked, shards)
    settings = suite.task.resolve(subject, suite.settings)
    assert settings.train == str(tmp_path / "stsb" / "train.jsonl")
    outcome = suite.task.run(subject, settings, Parts())
    assert outcome.metrics["spearman"].n == 12
    assert "scratch_spearman" not in outcome.metrics
    assert "second text" in outcome.samples[0]
    assert [s.name for s in load_suites(["glue"])][-1] == "stsb"
    assert load_suites(["stsb-cosine"])[0].task.name == "sts"


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ([1, 2, 2], [1, 2, 3], "has 3 records: at least 4 are needed"),
        ([1, 1, 1, 1], [1, 2, 3], "every score is 1.0"),
        ([1, 2, 3, 4], [2, 2, 2], "every score is 2.0"),
        ([1, 2, 3, 4], [2], "1 record with a score"),
        ([1, 2, float("nan"), 4], [1, 2, 3], "line 3: field 'score' holds nan"),
    ],
)
def test_data_that_is_refused(
    train: list[Any], test: list[Any], words: str, causal: Path, shards: ShardSet, tmp_path: Path
) -> None:
    paths = {
        part: write(tmp_path / f"{part}.jsonl", [{"text": f"river {i}", "score": v} for i, v in enumerate(values)])
        for part, values in (("train", train), ("test", test))
    }
    subject = subject_of(causal, shards)
    settings = task.resolve(subject, RegressSettings(**paths, seeds=1, steps=1, scratch_seeds=0))
    with pytest.raises(UserError, match=words):
        task.run(subject, settings, Parts())


def test_classify_points_to_regress(tmp_path: Path, causal: Path, shards: ShardSet) -> None:
    from eval.shared.labelled import read_labelled

    path = write(tmp_path / "a.jsonl", [{"text": "river", "label": 0.5}])
    with pytest.raises(UserError, match=r"not a label \(text or integer; `nystrom eval regress` learns scores\)"):
        read_labelled(path)


def test_settings_without_data_are_refused(causal: Path, shards: ShardSet, export: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="--train FILE --test FILE"):
        task.resolve(subject_of(causal, shards), RegressSettings())
