"""The recipe of fine-tuning, the search on the held-out split, and accuracy by labels."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suites_case import subject_of

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.results.parts import Parts
from eval.results.statistics import bootstrap
from eval.shared.training import Best
from eval.suites.load import load_suites
from eval.tasks.classification import MODEL_ROW, SCRATCH_ROW, TFIDF_ROW, ClassifySettings
from eval.tasks.classification import search as searching
from eval.tasks.classification import task as classification
from eval.tasks.classification.budgets import TABLE as LABELS_TABLE
from eval.tasks.classification.budgets import budgets
from eval.tasks.classification.dataset import ClassifyData, nested_order
from eval.tasks.classification.finetune import Classifier, Evaluation, Examples, Fitted, fit
from eval.tasks.classification.jobs import Fits
from eval.tasks.classification.recipe import Recipe, depth_of, parameter_groups
from eval.tasks.classification.search import TABLE, Trial, grid, search
from eval.tasks.regression import RegressSettings
from eval.tasks.regression import task as regression
from eval.tasks.regression.jobs import RegressData, RegressFits

CPU: dict[str, Any] = {"device": torch.device("cpu"), "precision": "fp32"}


def few(count: int = 20, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(10, 200, size=int(n)) for n in rng.integers(4, 30, size=count)]
    return Examples(tokens, rng.integers(0, 2, size=count), 1)


def settings_of(labelled: tuple[Path, Path], **given: Any) -> ClassifySettings:
    train, test = map(str, labelled)
    return ClassifySettings(**({"train": train, "test": test, "max_length": 24, "seeds": 1, "epochs": 1} | given))


def fits_of(subject: Any, settings: ClassifySettings) -> Fits:
    resolved = classification.resolve(subject, settings)
    return Fits(subject, resolved, ClassifyData.read(resolved))


def test_few_texts_are_trained_for_more_epochs_and_looked_at_in_ten_places() -> None:
    left_out, asked = Recipe(), Recipe(epochs=3)
    assert [left_out.total_steps(n) for n in (85, 425, 640, 1000)] == [102, 140, 200, 320]
    assert [left_out.steps_between_looks(n, 15) for n in (85, 425, 640, 1000)] == [11, 14, 20, 32]
    assert [asked.total_steps(n) for n in (85, 1000)] == [9, 96]
    assert asked.steps_between_looks(85, 15) == 3  # every epoch
    assert Recipe(epochs=9, share=1 / 3).total_steps(64) == 6
    assert Recipe(epochs=9, steps=7).total_steps(64) == 7
    assert Recipe(epochs=2, batch_size=8).texts(20) == 40
    assert Recipe(epochs=2, steps=4, batch_size=8).texts(20) == 28


def test_learning_rates_fall_from_layer_to_layer(masked: Path, shards: ShardSet) -> None:
    network = Classifier(subject_of(masked, shards).model, 32, 2, 0.0)
    recipe = Recipe(lr=1e-3, head_lr=5e-3, layer_decay=0.5, weight_decay=0.1)
    groups = parameter_groups(network.backbone, network.head, 2, recipe)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(network.backbone.named_parameters())
    assert len(rates) == len(named) + 2
    for name, parameter in named.items():
        depth = 0 if name.startswith(("norm.", "head.", "layers.1.")) else 1 if name.startswith("layers.0.") else 2
        assert depth_of(name, 2) == depth
        assert rates[id(parameter)] == pytest.approx(1e-3 * 0.5**depth)
        assert decayed[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0)
    assert {name.split(".")[0] for name in named if depth_of(name, 2) == 2} == {"embeddings"}
    assert rates[id(network.head.weight)] == 5e-3
    plain = parameter_groups(network.backbone, network.head, 2, Recipe(lr=1e-3))
    assert [group["lr"] for group in plain] == [1e-3, 1e-3, 5e-3]


def test_frozen_layers_stay_and_layers_computed_again_train_alike(masked: Path, shards: ShardSet) -> None:
    start = subject_of(masked, shards).model
    data = few()
    found = []
    for recipe in (
        Recipe(epochs=1, batch_size=8, lr=1e-3, freeze=1),
        Recipe(epochs=1, batch_size=8, lr=1e-3),
        Recipe(epochs=1, batch_size=8, lr=1e-3, recompute=True),
    ):
        network = Classifier(copy.deepcopy(start), 32, 2, 0.1)
        kept: set[int] = set()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: (kept.add(x.untyped_storage().data_ptr()), x)[1], lambda x: x
        ):
            fit(network, data, np.arange(16), np.arange(16, 20), recipe, seed=0, **CPU)
        found.append((dict(network.backbone.named_parameters()), len(kept)))
    moved = {name for name, p in start.named_parameters() if not torch.equal(p, found[0][0][name])}
    assert not any(name.startswith(("embeddings.", "layers.0.")) for name in moved)
    assert {name for name in moved if name.startswith("layers.1.")}
    assert any(
        name.startswith("embeddings.") for name, p in start.named_parameters() if not torch.equal(p, found[1][0][name])
    )
    for name, parameter in found[1][0].items():
        torch.testing.assert_close(found[2][0][name], parameter, atol=0, rtol=0)
    assert found[2][1] < 0.5 * found[1][1]  # the tensors that wait for the backward pass


def test_the_grid_follows_the_width_and_the_texts(labelled: tuple[Path, Path]) -> None:
    left_out = settings_of(labelled)
    assert [trial.lr for trial in grid(left_out, 192, 500)][::3] == [1e-4, 3.1e-4, 1e-3]
    assert [trial.batch_size for trial in grid(left_out, 192, 500)] == [16, 32, 64] * 3
    assert {trial.batch_size for trial in grid(left_out, 192, 100)} == {16, 32}
    assert {trial.batch_size for trial in grid(left_out, 192, 10)} == {16}
    given = settings_of(labelled, search_lrs=(1e-3, 1e-4, 1e-3), search_batches=(8,))
    assert grid(given, 192, 500) == [Trial(1e-4, 8), Trial(1e-3, 8)]
    for wrong in ({"search_lrs": (0.0,)}, {"search_batches": ()}, {"search_batches": (0,)}, {"labels": (1,)}):
        with pytest.raises(ValueError, match=r"above 0|at least"):
            settings_of(labelled, **wrong)


def test_folds_hold_every_record_out_once(causal: Path, shards: ShardSet, labelled: tuple[Path, Path]) -> None:
    subject = subject_of(causal, shards)
    fits = fits_of(subject, settings_of(labelled))
    examples, folds = fits.folds()
    assert len(folds) == 3
    assert sorted(np.concatenate([dev for _, dev in folds])) == list(range(90))
    for train, dev in folds:
        assert sorted([*train, *dev]) == list(range(90))
        assert abs(examples.labels[dev].mean() - examples.labels.mean()) < 0.06  # by class
    # With more records fewer folds are enough, down to the one split of seed 0; a file for it is one too.
    small = fits.train
    for records, sizes in [(297, [99, 99]), (450, [150]), (990, [330]), (1080, [162])]:
        fits.train = small.take(np.resize(np.arange(90), records))
        found = fits.folds()[1]
        assert [len(dev) for _, dev in found] == sizes
        assert all(len(train) + len(dev) == records for train, dev in found)
    assert len(fits_of(subject, settings_of(labelled, dev=str(labelled[1]))).folds()[1]) == 1


def test_folds_of_scores_are_random(causal: Path, shards: ShardSet, tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps({"text": f"word {i}", "score": i}) + "\n" for i in range(11)))
    subject = subject_of(causal, shards)
    settings = classification.resolve(subject, RegressSettings(train=str(path), test=str(path), max_length=8))
    fits = RegressFits(subject, settings, RegressData.read(settings))
    _, folds = fits.folds()
    assert [len(dev) for _, dev in folds] == [4, 4, 3]
    assert sorted(np.concatenate([dev for _, dev in folds])) == list(range(11))
    assert sorted(fits.order(3)) == list(range(11))
    given = {"search": True, "search_lrs": (1e-4, 1e-3), "search_batches": (4,), "steps": 2, "seeds": 1}
    searched = regression.resolve(subject, settings.model_copy(update={**given, "lr": None, "scratch_seeds": 0}))
    outcome = regression.run(subject, searched, Parts())
    (table,) = [table for table in outcome.tables if table.name == TABLE]
    assert "dev Spearman" in table.columns
    assert [cells[:4] for cells in table.rows] == [[MODEL_ROW, 11, lr, 4] for lr in (1e-4, 1e-3)]
    assert "Chosen by the search on 11 records: fine-tuned, lr 0.00" in outcome.tables[0].note


def test_the_search_takes_what_the_held_out_records_prefer(
    causal: Path, shards: ShardSet, labelled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fits are replaced by their outcome: which setting is best is given, for each row another."""
    best = {MODEL_ROW: Trial(1e-3, 16), SCRATCH_ROW: Trial(1e-2, 8)}
    asked: list[tuple[str, Trial, float]] = []
    row = ""

    def fresh(self: Fits, named: str, seed: int) -> Any:
        nonlocal row
        row = named
        return None

    def fake(network: Any, examples: Any, train: Any, dev: Any, recipe: Recipe, **how: Any) -> Fitted:
        trial = Trial(recipe.lr, recipe.batch_size)
        asked.append((row, trial, recipe.share))
        how["on_batch"](len(train))
        far = abs(math.log10(trial.lr / best[row].lr)) + abs(math.log2(trial.batch_size / best[row].batch_size))
        # As good in figure as the best, so that the loss tells; and better in a single fold's first place.
        curve = [Evaluation(1, 0.5, 1.0), Evaluation(2, 0.9 if far <= 1 else 0.6, 0.1 + far)]
        return Fitted(network, curve[-1], curve)

    monkeypatch.setattr(Fits, "fresh", fresh)
    monkeypatch.setattr(searching, "fit", fake)
    settings = settings_of(labelled, search=True, search_lrs=(1e-4, 1e-3, 1e-2), search_batches=(8, 16), search_keep=2)
    fits = fits_of(subject_of(causal, shards), settings)
    (found,) = search([fits], Parts())
    assert {name: judged.trial for name, judged in found.chosen.items()} == best
    assert (found.records, found.judged_on, found.folds) == (90, 90, 3)
    first = [entry for entry in asked if entry[2] < 1]
    assert len(first) == 2 * 6 * 3  # rows, settings, folds: the same for both rows
    assert {entry[1] for entry in first if entry[0] == MODEL_ROW} == {
        entry[1] for entry in first if entry[0] == SCRATCH_ROW
    }
    whole = {entry[:2] for entry in asked if entry[2] == 1}
    assert len(whole) == 2 * 2
    assert set(best.items()) <= whole
    judged = found.chosen[MODEL_ROW]
    assert (judged.figure, judged.loss, judged.epoch, judged.share) == (0.9, pytest.approx(0.1), 2, 1)
    assert judged.texts == sum(len(train) for train, _ in fits.folds()[1])
    table = searching.search_table([found], "accuracy")
    assert len(table.rows) == 2 * (6 + 2)
    assert [cells[2:4] for cells in table.rows if cells[-1] == "chosen"] == [[1e-3, 16], [1e-2, 8]]
    assert "on 90 of them, in 3 folds; never on the test text. 16 trials" in table.note
    assert searching.said_of(found) == (
        f"Chosen by the search on 90 records: {MODEL_ROW}, lr 0.001, batch 16; {SCRATCH_ROW}, lr 0.01, batch 8."
    )


@pytest.mark.parametrize(
    ("margin", "seen", "kept"),
    [
        (0.0, [(0.8, 0.5), (0.8, 0.4), (0.79, 0.1), (0.8, math.nan)], 1),
        (0.05, [(0.80, 0.5), (0.84, 0.6), (0.81, 0.4), (0.78, 0.1)], 2),  # 0.84 is no better, 0.78 too low
        (0.05, [(0.80, 0.5), (0.90, 0.9), (0.91, 0.8)], 2),  # the first is too low as soon as 0.90 is seen
        (0.05, [(0.80, math.nan), (0.80, 0.9), (0.82, math.nan)], 1),
    ],
)
def test_of_accuracies_that_cannot_be_told_apart_the_lowest_loss_is_kept(
    margin: float, seen: list[tuple[float, float]], kept: int
) -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    best = Best(network)
    for place, (accuracy, loss) in enumerate(seen):
        network.weight.data.fill_(place)
        best.keep(accuracy, loss, margin)
    best.restore()
    assert float(network.weight.detach()) == kept


def test_the_search_prefers_the_lower_loss_within_a_standard_error(
    causal: Path, shards: ShardSet, labelled: tuple[Path, Path]
) -> None:
    fits = fits_of(subject_of(causal, shards), settings_of(labelled))  # 90 records are judged: 0.042 at 0.8
    found = [(0.75, 0.1), (0.8, 0.5), (0.77, 0.4), (0.79, math.nan), (0.7, 0.2), (0.75, 0.05)]
    assert searching.best_first(found, fits) == [2, 1, 3, 5, 0, 4]


def test_smaller_draws_are_part_of_larger_ones() -> None:
    numbers = np.array([0] * 60 + [1] * 30 + [2] * 3)
    order = nested_order(numbers, 0)
    assert sorted(order) == list(range(93))
    for count in range(6, 94):
        counts = np.bincount(numbers[order[:count]], minlength=3)
        assert counts.min() >= 2
        assert abs(counts[0] - 2 * counts[1]) <= 4
    assert order[:10].tolist() != nested_order(numbers, 1)[:10].tolist()


def test_accuracy_by_labels_with_a_search(
    masked: Path, shards: ShardSet, labelled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    settings = settings_of(
        labelled, labels=(40, 12), seeds=2, search=True, search_lrs=(1e-5, 3e-3), search_batches=(8,), search_records=12
    )
    drawn: dict[tuple[str, int], list[list[str]]] = {}
    for method in ("network", "words"):
        original = getattr(Fits, method)

        def spied(self: Fits, *given: Any, original: Any = original) -> Any:
            name = given[0] if given else TFIDF_ROW
            drawn.setdefault((name, len(self.data.train)), []).append(self.data.train.texts)
            return original(self, *given)

        monkeypatch.setattr(Fits, method, spied)
    subject = subject_of(masked, shards)
    resolved = classification.resolve(subject, settings)
    assert resolved.labels == (12, 40)
    outcome = classification.run(subject, resolved, Parts())
    for count in (12, 40):
        assert drawn[MODEL_ROW, count] == drawn[SCRATCH_ROW, count] == drawn[TFIDF_ROW, count]
        assert drawn[MODEL_ROW, count][0] != drawn[MODEL_ROW, count][1]  # each seed has a draw of its own
    for small, large in zip(drawn[MODEL_ROW, 12], drawn[MODEL_ROW, 40], strict=True):
        assert set(small) <= set(large)

    tables = {table.name: table for table in outcome.tables}
    curve, metrics = tables[LABELS_TABLE], outcome.metrics
    assert [row[0] for row in curve.rows] == [12, 40]
    assert curve.columns[:7] == ["labels", MODEL_ROW, "± std", SCRATCH_ROW, "± std", TFIDF_ROW, "± std"]
    assert curve.columns[7:] == ["gain over scratch", "low", "high", "gain over TF-IDF", "low", "high"]
    assert (
        curve.rows[1][1] == pytest.approx(metrics["accuracy"].value) == pytest.approx(metrics["accuracy_at_40"].value)
    )
    assert metrics["accuracy_at_12"].unit == "seeds"
    for name in ("gain_over_scratch", "gain_over_tfidf"):
        assert metrics[f"{name}_at_40"].value == pytest.approx(metrics[name].value)
    gain = metrics["accuracy_at_12"].value - metrics["tfidf_accuracy_at_12"].value
    assert metrics["gain_over_tfidf_at_12"].value == pytest.approx(gain)
    for name in ("accuracy_at_12", "gain_over_tfidf_at_12"):  # the records give them back
        interval = bootstrap(outcome.records, outcome.estimators[name])
        assert (interval.value, interval.low, interval.high) == pytest.approx(
            (metrics[name].value, metrics[name].low, metrics[name].high)
        )
    drawn_curves = [series for series in outcome.series if series.chart == LABELS_TABLE]
    assert [series.x for series in drawn_curves] == [[12.0, 40.0]] * 3
    assert [series.reference for series in drawn_curves] == [False, True, True]

    # Both budgets have the search on 12 records, which runs once.
    assert len(tables[TABLE].rows) == 2 * 2
    assert {row[1] for row in tables[TABLE].rows} == {12}
    assert "With 40 labels; fewer are in the table accuracy by labels." in tables["classification"].note
    assert "Chosen by the search on 12 records" in tables["classification"].note
    said = capsys.readouterr().out
    assert "search on 12 records, fine-tuned, lr 0.003, batch 8: accuracy" in said
    assert "12 labels, draw 1, same network from scratch, seed 1: " in said
    json.dumps([outcome.tables[1].rows, outcome.records])


def test_what_cannot_be_asked_for_together(causal: Path, shards: ShardSet, labelled: tuple[Path, Path]) -> None:
    subject = subject_of(causal, shards)
    for given, words in [
        ({"search": True, "lr": 1e-3}, "leave out --lr, or say --search-lrs 0.001"),
        ({"freeze": 3}, "more than the 2 layers"),
        ({"labels": (12,), "train_records": 20}, "leave out --train-records"),
    ]:
        with pytest.raises(UserError, match=words):
            classification.resolve(subject, settings_of(labelled, **given))
    for labels, words in [((12, 200), "--labels 200 is more than the 90 records"), ((3, 12), "--labels 3 is too few")]:
        resolved = classification.resolve(subject, settings_of(labelled, labels=labels))
        with pytest.raises(UserError, match=words):
            classification.run(subject, resolved, Parts())


def test_all_labels_are_one_draw(causal: Path, shards: ShardSet, labelled: tuple[Path, Path]) -> None:
    fits = fits_of(subject_of(causal, shards), settings_of(labelled, labels=(20, 90), seeds=2))
    small, whole = budgets(fits, fits.settings)
    names = [name for _, _, (name, _) in small.jobs()]
    assert len(set(names)) == len(names) == 2 * (2 + 2)  # two networks and two TF-IDF for each draw
    assert names[-1].startswith("20 labels, draw 1, TF-IDF")
    assert [name for _, _, (name, _) in whole.jobs()] == [
        *(f"90 labels, {row}, seed {seed}" for seed in (0, 1) for row in (MODEL_ROW, SCRATCH_ROW)),
        f"90 labels, {TFIDF_ROW}",
        f"90 labels, {TFIDF_ROW}, the same tokens",
    ]
    assert whole.fits[0].data.train.texts == fits.data.train.texts


def test_options_of_the_command_line(labelled: tuple[Path, Path]) -> None:
    given = {"search": True, "search_lrs": [1e-4, 1e-3], "labels": [500, 100], "layer_decay": 0.8, "freeze": 2}
    suite = load_suites(["classify"], overrides=[(None, key, value) for key, value in given.items()])[0]
    assert isinstance(suite.settings, ClassifySettings)
    assert (suite.settings.search_lrs, suite.settings.labels) == ((1e-4, 1e-3), (100, 500))
