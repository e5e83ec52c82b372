"""Long Range Arena: the network, its training, and what the suite says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.errors import UserError
from eval import cli
from eval.results.parts import Parts
from eval.results.schema import Outcome, read_result
from eval.results.statistics import estimate
from eval.suites.load import load_suites
from eval.tasks.lra import LRASettings, report, task
from eval.tasks.lra.examples import Dataset, Split
from eval.tasks.lra.network import ArenaClassifier, model_config
from eval.tasks.lra.published import PUBLISHED, SOURCE
from eval.tasks.lra.train import Recipe, endless_batches, predict, train

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "min_symbols": 5, "max_symbols": 24, "max_depth": 3, "max_args": 4, "train_size": 96, "dev_size": 24,
    "test_size": 30, "hidden_size": 16, "ffn_size": 24, "layers": 1, "num_landmarks": 4, "conv_kernel": 3, "steps": 7,
    "warmup": 2, "validate_every": 3, "batch_size": 8, "lr": 3e-3, "precision": "fp32",
}  # fmt: skip


def arena(folder: Path, **changes: Any) -> Outcome:
    settings = task.resolve(None, LRASettings(**(TINY | {"cache_dir": str(folder)} | changes)))
    task.data(None, settings)
    return task.run(None, settings, Parts())


def pairs(count: int, seed: int = 0) -> Split:
    rng = np.random.default_rng(seed)
    columns = tuple([rng.integers(0, 9, int(n)).astype(np.uint8) for n in rng.integers(3, 20, count)] for _ in range(2))
    return Split(columns, np.array([int(a[0] > b[0]) for a, b in zip(*columns, strict=True)]))


def network(sequences: int = 1, attention: str = "nystrom", **changes: Any) -> ArenaClassifier:
    torch.manual_seed(0)
    settings = LRASettings(**(TINY | changes))
    return ArenaClassifier(model_config(settings, attention, 15, 24), 10, settings.ffn_size, sequences)


@pytest.mark.parametrize("attention", ["softmax", "nystrom", "softmax-conv"])
def test_rows_of_a_batch_are_classified_as_if_alone(attention: str) -> None:
    model = network(2, attention).double().eval()
    split = pairs(6)
    inputs, labels = split.collate(np.arange(6))
    with torch.no_grad():
        # pool() gives float32 whatever the weights are; the head is compared in it
        model.head.float()
        together = model(inputs)
        for row in range(6):
            ids = [torch.from_numpy(column[row].astype(np.int64))[None] for column in split.columns]
            first, second = (model.backbone(x, hidden=True).hidden.mean(1).float() for x in ids)
            joined = torch.cat([first, second, first * second, first - second], dim=-1)
            torch.testing.assert_close(together[row], model.head(joined)[0], rtol=1e-5, atol=1e-6)
    assert labels.tolist() == split.labels.tolist()


def test_which_network_has_a_convolution_and_how_many_parameters() -> None:
    d, f, positions, words = 16, 24, 24 + 2, 15
    block = 4 * (d * d + d) + 2 * d * f + d + f + 4 * d
    head = d * f + f + f * 10 + 10
    plain = (words + positions) * d + 2 * d + block + 2 * d + head
    counts = {name: network(attention=name).num_parameters() for name in ("softmax", "nystrom", "softmax-conv")}
    assert counts == {"softmax": plain, "nystrom": plain + 2 * 3, "softmax-conv": plain + 2 * 3}


def test_training_keeps_the_best_weights_and_reaches_every_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Dataset("pairs", pairs(80), pairs(40, 1), pairs(20, 2), 15, ["no", "yes"], "made here")
    recipe = Recipe(12, 3, 2, 8, 3e-3, 0.0, "fp32", 0)
    model = network(2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates: list[tuple[float, float]] = []
    step = torch.optim.AdamW.step

    def watched(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    done = train(model, data, recipe, CPU)
    assert done.step == [2, 4, 6, 8, 10, 12]
    order = sorted(range(6), key=lambda i: (-done.dev_accuracy[i], done.dev_loss[i]))
    assert done.chosen_step == done.step[order[0]]
    logits = predict(model, data.dev, recipe, CPU)
    truth = torch.from_numpy(data.dev.labels)
    assert float((logits.argmax(-1) == truth).float().mean()) == done.dev_accuracy[order[0]]
    assert float(torch.nn.functional.cross_entropy(logits, truth)) == pytest.approx(done.dev_loss[order[0]], rel=1e-6)
    assert done.predicted == predict(model, data.test, recipe, CPU).argmax(-1).tolist()
    unused = [name for name, p in model.named_parameters() if torch.equal(p, before[name]) and "key.bias" not in name]
    assert not unused
    # Up from 1/25 of the peak in warmup - 1 steps, down to nothing in the rest.
    up = np.linspace(3e-3 / 25, 3e-3, 3)
    down = np.linspace(3e-3, 3e-3 / 25e4, 10)
    assert [rate for rate, _ in rates] == pytest.approx([*up, *down[1:]])
    assert [beta for _, beta in rates[:3]] == pytest.approx([0.95, 0.9, 0.85])
    # Ties in accuracy: the lower loss. Of a class that training never shows it rises.
    wrong = Split(pairs(3, 5).columns, np.full(3, 9))
    few = train(network(2), replace(data, dev=wrong), recipe, CPU)
    ties = [i for i in range(6) if few.dev_accuracy[i] == max(few.dev_accuracy)]
    assert ties[-1] != min(ties, key=lambda i: few.dev_loss[i])
    assert few.chosen_step == few.step[min(ties, key=lambda i: few.dev_loss[i])]
    again = train(network(2), data, recipe, CPU)
    assert again.predicted == done.predicted
    assert again.dev_loss == done.dev_loss


def test_predictions_are_in_the_order_of_the_split_and_batches_cover_it() -> None:
    split = pairs(21)
    model = network(2).eval()
    recipe = Recipe(3, 2, 1, 4, 1e-3, 0.0, "fp32", 0)
    logits = predict(model, split, recipe, CPU)
    for index in range(21):
        inputs, _ = split.collate(np.array([index]))
        torch.testing.assert_close(logits[index], model(inputs)[0].detach(), rtol=1e-4, atol=1e-5)
    batches = endless_batches(split, 4, 0)
    for _ in range(2):  # every pass holds every example once
        assert sorted(np.concatenate([next(batches) for _ in range(6)]).tolist()) == list(range(21))


def test_outcome_follows_from_the_records(tmp_path: Path) -> None:
    outcome = arena(tmp_path, seeds=2, networks=("softmax", "nystrom", "softmax-conv"))
    records = outcome.records
    assert len(records) == len({record["id"] for record in records}) == 30
    by_seed = outcome.tables[1].rows
    assert [row[:2] for row in by_seed] == [[n, s] for n in ("softmax", "nystrom", "softmax-conv") for s in (0, 1)]
    for name, row in zip(("softmax", "nystrom", "softmax-conv"), outcome.tables[0].rows, strict=False):
        key = f"accuracy_{name.replace('-', '_')}"
        metric = outcome.metrics[key]
        scores = [line[4] for line in by_seed if line[0] == name]
        assert row[0] == name
        assert metric.value == row[1] == pytest.approx(np.mean(scores))
        assert metric.std == row[2] == pytest.approx(np.std(scores, ddof=1))
        assert estimate(records, outcome.estimators[key]) == metric.value
        assert metric.low is not None
        assert metric.low <= metric.value <= metric.high
        lengths = next(s for s in outcome.series if s.name == f"{name}: by length")
        depths = next(s for s in outcome.series if s.name == f"{name}: by depth")
        shares = {
            depth: [r[key.replace("accuracy", "correct")] for r in records if r["depth"] == depth] for depth in depths.x
        }
        assert depths.y == pytest.approx([np.mean(values) for values in shares.values()])
        assert len(lengths.x) > 2
    difference = outcome.metrics["accuracy_nystrom"].value - outcome.metrics["accuracy_softmax"].value
    assert outcome.metrics["nystrom_minus_softmax"].value == pytest.approx(difference)
    majority = outcome.tables[0].rows[3]
    assert majority[0] == "majority class"
    labels = [record["label"] for record in records]
    assert majority[1] == outcome.metrics["majority_accuracy"].value
    assert majority[1] in {labels.count(label) / 30 for label in labels}
    assert not any("published" in row[0] for row in outcome.tables[0].rows)
    assert "no published accuracy" in outcome.tables[0].note
    curves = [s for s in outcome.series if s.chart == "dev accuracy while training"]
    assert [s.x for s in curves] == [[3.0, 6.0, 7.0]] * 3
    assert curves[0].low is not None
    assert outcome.samples[0]["texts"][0].endswith("]")
    again = arena(tmp_path, seeds=2, networks=("softmax", "nystrom", "softmax-conv"))
    assert again.records == records
    assert again.metrics == outcome.metrics


def test_every_training_has_a_seed_of_its_own_from_the_seed_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, str]] = []
    real = task._train

    def watched(settings: LRASettings, data: Dataset, attention: str, seed: int) -> dict[str, Any]:
        done = real(settings, data, attention, seed)
        trained.append((seed, str(done["dev_loss"])))
        return done

    monkeypatch.setattr(task, "_train", watched)
    first = arena(tmp_path, networks=("softmax",), seed=4, seeds=2)
    assert [row[1] for row in first.tables[1].rows] == [seed for seed, _ in trained] == [4, 5]
    assert len(dict.fromkeys(curve for _, curve in trained)) == 2
    assert [row[1] for row in arena(tmp_path, networks=("softmax",)).tables[1].rows] == [0]


def counted(name: str, classes: int, train: int, dev: int, test: int) -> Dataset:
    """A dataset of so many examples, all with the same sequence."""

    def split(size: int) -> Split:
        return Split(([np.array([10, 1, 2, 14], np.uint8)] * size,), np.arange(size) % classes)

    return Dataset(name, split(train), split(dev), split(test), 15, list(map(str, range(classes))), "made here")


def test_settings_as_published_are_told_from_others() -> None:
    for name in PUBLISHED:
        (suite,) = load_suites([f"lra-{name}"])
        assert isinstance(suite.settings, LRASettings)
        settings = task.resolve(None, suite.settings)
        assert settings.benchmark == name
        assert report.deviations(settings) == []
        left_out = task.resolve(None, LRASettings(benchmark=settings.benchmark, seeds=3))
        assert left_out.as_dict() == {**settings.as_dict(), "train_size": left_out.train_size,
                                      "dev_size": left_out.dev_size, "test_size": left_out.test_size}  # fmt: skip
        shorter = task.resolve(None, suite.settings.model_copy(update={"steps": 200, "warmup": None}))
        assert report.deviations(shorter)[0].startswith("steps 200 (published ")
        other = settings.model_copy(update={"num_landmarks": 16, "dev_share": 0.2})
        # Where there is a published dev split, or the published one is the test split, the share tells nothing.
        share = ["dev_share 0.2 (published 0.1)"] if name in ("image", "pathfinder") else []
        assert report.deviations(other) == [*share, "num_landmarks 16 (published 32, 64, 128, 256)"]
        exact = other.model_copy(update={"networks": ("softmax",)})
        assert report.deviations(exact) == share


SIZES = {
    "listops": (10, 96_000, 2000, 2000), "text": (2, 22_500, 2500, 25_000), "retrieval": (2, 147_086, 18_090, 17_437),
    "image": (10, 45_000, 5000, 10_000), "pathfinder": (2, 160_000, 20_000, 20_000),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_data_has_the_published_sizes_and_classes(name: str, tmp_path: Path) -> None:
    (suite,) = load_suites([f"lra-{name}"])
    files = tmp_path / "images.npz"
    files.touch()
    settings = task.resolve(None, suite.settings.model_copy(update={"path": str(files)}))
    assert isinstance(settings, LRASettings)
    classes, train, dev, test = SIZES[name]
    assert report.other_data(settings, counted(name, classes, train, dev, test)) == []
    moved = report.other_data(settings, counted(name, classes, train - 7, dev + 7, test))
    # Where the dev split is carved, its share is a setting of the training.
    assert moved == ([] if name in ("text", "image", "pathfinder") else [f"dev examples {dev + 7} (published {dev})"])
    assert report.other_data(settings, counted(name, classes, train, dev, test - 1)) == [
        f"test examples {test - 1} (published {test})"
    ]
    assert report.other_data(settings, counted(name, 20, train - 1, dev, test)) == [
        f"classes 20 (published {classes})",
        f"train and dev examples {train + dev - 1} (published {train + dev})",
    ]
    shorter = settings.model_copy(update={"max_length": 100})
    assert report.other_data(shorter, counted(name, classes, train, dev, test))[0].startswith("max_length 100 (publ")


def test_folders_of_pathfinder_are_told_by_their_name(tmp_path: Path) -> None:
    data = counted("pathfinder", 2, 160, 20, 20)
    for folder, other in (
        ("curv_contour_length_14", []),
        ("curv_baseline", ["folder curv_baseline (published curv_contour_length_14)"]),
    ):
        path = tmp_path / folder
        path.mkdir()
        settings = task.resolve(None, LRASettings(benchmark="pathfinder", path=str(path)))
        assert report.other_data(settings, data) == other
    few = settings.model_copy(update={"path": str(tmp_path / "curv_contour_length_14"), "test_size": 20})
    assert report.other_data(few, data) == ["test_size 20 (published all)"]
    assert "its images were not counted" in report._note(few.model_copy(update={"test_size": None}), data)


def test_published_rows_stand_beside_published_data_only() -> None:
    (small,) = load_suites(["listops-small"])
    data = counted("listops", 10, 96_000, 2000, 2000)
    assert isinstance(small.settings, LRASettings)
    assert "min_symbols 20 (published 500)" in report.other_data(task.resolve(None, small.settings), data)
    settings = task.resolve(None, LRASettings())
    trained = {"predicted": [0] * 2000, "step": [1], "chosen_step": 1, "dev_accuracy": [0.5], "train_loss": [1.0],
               "parameters": 1, "tokens_per_second": 1.0}  # fmt: skip
    table = report.outcome(settings, data, {"nystrom": [trained]}).tables[0]
    assert "Trained as published" not in table.note
    assert "Settings as published. Never as published: no dropout on attention weights or inside" in table.note
    assert "batches of like lengths; mean over real tokens" in table.note
    assert f"Published accuracies: {SOURCE}. " in table.note
    rows = table.rows
    assert [row[:2] for row in rows[:2]] == [["nystrom", 0.1], ["majority class", 0.1]]
    assert {row[0]: row[1] for row in rows[2:]} == {
        "published: softmax": 0.3710, "published: Nyströmformer": 0.3715, "published: Linformer": 0.3725,
        "published: Reformer": 0.1905, "published: Performer": 0.1880,
    }  # fmt: skip
    assert {row[-1] for row in rows[2:]} == {"Xiong et al. 2021, arXiv 2102.03902"}
    files = settings.model_copy(update={"path": "basic"})
    note = report.outcome(files, data, {"nystrom": [trained]}).tables[0].note
    assert "Of basic the sizes of its splits and the number of classes agree with those, the content was not" in note
    other = counted("listops", 10, 95_999, 2000, 2000)
    table = report.outcome(files, other, {"nystrom": [trained]}).tables[0]
    assert not any("published" in row[0] for row in table.rows)
    assert "stands beside it: train and dev examples 97999 (published 98000)." in table.note


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--warmup 7 leaves none of --steps 7"):
        arena(tmp_path, warmup=7)
    with pytest.raises(UserError, match=r"--max-length 22 would cut .* up to 23 symbols.*: --max-length 23, or fewer"):
        arena(tmp_path, max_length=22)
    assert task.resolve(None, LRASettings(max_symbols=24, min_symbols=5, max_length=23)).max_length == 23
    with pytest.raises(UserError, match=r"--max-length 2000 would cut .* up to 2999 symbols"):
        task.resolve(None, LRASettings(max_symbols=3000))
    for changes, message in (
        ({"hidden_size": 30, "heads": 4}, "hidden_size 30 is not divisible by heads 4"),
        ({"conv_kernel": 4}, "conv_kernel 4 is even"),
        ({"networks": ("softmax", "softmax")}, "networks names one twice"),
        ({"min_symbols": 9, "max_symbols": 10}, "no number of symbols is above 9 and below 10"),
    ):
        with pytest.raises(ValueError, match=message):
            LRASettings(**changes)
    with pytest.raises(UserError, match="--device nonsense"):
        task.resolve(None, LRASettings(device="nonsense"))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [text for key, value in TINY.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    command = ["lra", "--out", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "a"), "--device", "cpu", *options]
    assert cli.main(command) == 0
    assert "accuracy nystrom" in capsys.readouterr().out
    result = read_result(tmp_path / "out" / "lra.json")
    assert result.gate == "none"
    assert result.model.weights_hash == ""
    assert (result.data["train_examples"], result.data["test_examples"]) == (96, 30)
    assert "cache_dir" not in result.settings
    lines = (tmp_path / "out" / "lra.samples.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["correct_softmax"] in (0.0, 1.0)
    command[4] = str(tmp_path / "b")  # where the data is kept changes no number
    assert cli.main(command) == 0
    assert "already there" in capsys.readouterr().out
    with pytest.raises(UserError, match="--device nonsense"):
        cli.main([*command, "--device", "nonsense"])


def test_a_repeated_example_has_the_id_of_the_first() -> None:
    row = np.array([1, 2], dtype=np.uint8)
    first, second, other = Split(([row, row, row[:1]],), np.zeros(3, dtype=np.int64)).ids()
    assert second == first
    assert other != first


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["softmax", "nystrom"])
def test_it_learns(tmp_path: Path, attention: str) -> None:
    """A single operator on few digits, with landmarks of two or three tokens: clearly above the majority."""
    outcome = arena(
        tmp_path, networks=(attention,), max_depth=2, max_args=8, min_symbols=7, max_symbols=11, train_size=6000,
        dev_size=300, test_size=500, hidden_size=32, ffn_size=64, steps=700, warmup=50, validate_every=100,
        batch_size=64,
    )  # fmt: skip
    metric = outcome.metrics[f"accuracy_{attention}"]
    assert metric.low is not None
    assert metric.low > outcome.metrics["majority_accuracy"].value + 0.15
