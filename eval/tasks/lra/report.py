"""What a run of Long Range Arena says: accuracies beside the published ones, curves, records."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eval.results.schema import Estimator, Metric, Outcome, Series, Table
from eval.results.statistics import bootstrap
from eval.tasks.lra import LRASettings, listops
from eval.tasks.lra.examples import Dataset
from eval.tasks.lra.published import (
    DEV_SHARES,
    DIFFERENCES,
    LANDMARKS,
    LISTOPS,
    NETWORK,
    PATHFINDER_FOLDER,
    PUBLISHED,
    SOURCE,
)

BUCKETS = 6
SAMPLES = 8
Runs = dict[str, list[dict[str, Any]]]
"""For each network, what its trainings left (:class:`eval.tasks.lra.train.Trained`), one a seed."""


def outcome(settings: LRASettings, dataset: Dataset, runs: Runs) -> Outcome:
    """All of it. Accuracies are means over the seeds; intervals are over the test split's examples."""
    test = dataset.test
    majority = int(np.bincount(dataset.train.labels).argmax())
    share = float((test.labels == majority).mean())
    predicted = {name: np.array([run["predicted"] for run in trained]) for name, trained in runs.items()}
    right = {name: (classes == test.labels).astype(np.float64) for name, classes in predicted.items()}
    depths = np.array([listops.depth(tokens) for tokens in test.columns[0]]) if dataset.name == "listops" else None
    records = _records(dataset, right, depths)
    estimators = {f"accuracy_{_key(name)}": Estimator(f"correct_{_key(name)}") for name in runs}
    if {"softmax", "nystrom"} <= set(runs):
        for record in records:
            record["nystrom_minus_softmax"] = record["correct_nystrom"] - record["correct_softmax"]
        estimators["nystrom_minus_softmax"] = Estimator("nystrom_minus_softmax")
    metrics = {name: _metric(records, estimator) for name, estimator in estimators.items()}
    rows: list[list[Any]] = []
    for name, trained in runs.items():
        seeds = right[name].mean(1)
        std = float(seeds.std(ddof=1)) if len(seeds) > 1 else None
        metric = metrics[f"accuracy_{_key(name)}"]
        metrics[f"accuracy_{_key(name)}"] = replace(metric, std=std, n=len(seeds), unit="seeds")
        rate = float(np.mean([run["tokens_per_second"] for run in trained]))
        rows.append([name, metric.value, std, metric.low, metric.high, len(seeds), trained[0]["parameters"], rate, ""])
    metrics["majority_accuracy"] = Metric(share, True, n=len(test), unit="test examples")
    rows.append(["majority class", share, None, None, None, None, None, None, ""])
    if not other_data(settings, dataset):
        for name, value in PUBLISHED[dataset.name].accuracy.items():
            rows.append([f"published: {name}", value, None, None, None, None, None, None, SOURCE])
    columns = ["network", "accuracy", "± std", "low", "high", "seeds", "parameters", "tokens/s", "source"]
    tables = [
        Table(f"Long Range Arena, {dataset.name}", columns, rows, _note(settings, dataset)),
        _by_seed(runs, right, settings.seed),
    ]
    series = [*_curves(runs), *_by_buckets("length", "tokens", test.lengths, right)]
    if depths is not None:
        series += _by_value("depth", "operators nested", depths, right)
    return Outcome(metrics, tables, series, [], _samples(dataset, predicted), records, estimators)


def other_data(settings: LRASettings, dataset: Dataset) -> list[str]:
    """In what the data is not that of the published accuracies, as text: what can be counted, not the content."""
    published = PUBLISHED[settings.benchmark]
    found: dict[str, tuple[int | None, int | None]] = {"max_length": (settings.max_length, published.max_length)}
    if settings.benchmark == "listops" and settings.path is None:
        found |= {name: (getattr(settings, name), value) for name, value in LISTOPS.items()}
    found["classes"] = (len(np.unique(dataset.train.labels)), published.classes)
    if _is_folder_of_pathfinder(settings):
        found |= {name: (getattr(settings, name), None) for name in ("train_size", "dev_size", "test_size")}
    else:
        found["train and dev examples"] = (len(dataset.train) + len(dataset.dev), published.learned)
        found["test examples"] = (len(dataset.test), published.test)
        if published.dev is not None:
            found["dev examples"] = (len(dataset.dev), published.dev)
    other = [
        f"{name} {value} (published {'all' if wanted is None else wanted})"
        for name, (value, wanted) in found.items()
        if value != wanted
    ]
    if _is_folder_of_pathfinder(settings) and Path(settings.path or "").absolute().name != PATHFINDER_FOLDER:
        other.append(f"folder {Path(settings.path or '').absolute().name} (published {PATHFINDER_FOLDER})")
    return other


def _is_folder_of_pathfinder(settings: LRASettings) -> bool:
    return settings.benchmark == "pathfinder" and settings.path is not None and not Path(settings.path).is_file()


def deviations(settings: LRASettings) -> list[str]:
    """Settings of the training and the network that are not the published ones, as text."""
    published = PUBLISHED[settings.benchmark]
    expected = {
        name: getattr(published, name) for name in ("steps", "warmup", "validate_every", "batch_size")
    } | NETWORK
    if settings.benchmark in DEV_SHARES:
        expected["dev_share"] = DEV_SHARES[settings.benchmark]
    found = [
        f"{name} {getattr(settings, name):g} (published {value:g})"
        for name, value in expected.items()
        if getattr(settings, name) != value
    ]
    if any("nystrom" in name.split("/") for name in settings.networks) and settings.num_landmarks not in LANDMARKS:
        found.append(f"num_landmarks {settings.num_landmarks} (published {', '.join(map(str, LANDMARKS))})")
    return found


def _note(settings: LRASettings, dataset: Dataset) -> str:
    notes = ["Accuracy: mean over the seeds; low and high: 95% bootstrap interval over the test examples."]
    other = other_data(settings, dataset)
    if other:
        notes.append(f"Not the published data, so no published accuracy stands beside it: {', '.join(other)}.")
    elif settings.path is None:
        notes.append(f"Published accuracies: {SOURCE}.")
    else:
        agrees = "the sizes of its splits and the number of classes agree"
        if _is_folder_of_pathfinder(settings):
            agrees = "its name and the number of classes agree (its images were not counted)"
        notes.append(
            f"Published accuracies: {SOURCE}; they are of the published files. Of {settings.path} {agrees} with those, "
            "the content was not compared."
        )
    other = deviations(settings)
    notes.append("Settings as published." if not other else "Settings not as published: " + ", ".join(other) + ".")
    notes.append("Never as published: " + "; ".join(DIFFERENCES[settings.benchmark]) + ".")
    return " ".join(notes)


def _key(name: str) -> str:
    return name.replace("-", "_").replace("/", "_")


def _metric(records: list[dict[str, Any]], estimator: Estimator) -> Metric:
    interval = bootstrap(records, estimator)
    return Metric(interval.value, True, n=interval.n, low=interval.low, high=interval.high, unit="test examples")


def _records(dataset: Dataset, right: dict[str, np.ndarray], depths: np.ndarray | None) -> list[dict[str, Any]]:
    """One a test example; ``correct_*`` is the share of the seeds that were right."""
    test = dataset.test
    shares = {name: values.mean(0) for name, values in right.items()}
    records: list[dict[str, Any]] = []
    for number, (name, length) in enumerate(zip(test.ids(), test.lengths.tolist(), strict=True)):
        record: dict[str, Any] = {
            "id": name, "label": dataset.classes[int(test.labels[number])], "length": length,
        }  # fmt: skip
        if depths is not None:
            record["depth"] = int(depths[number])
        record |= {f"correct_{_key(network)}": float(share[number]) for network, share in shares.items()}
        records.append(record)
    return records


def _by_seed(runs: Runs, right: dict[str, np.ndarray], first: int) -> Table:
    rows: list[list[Any]] = []
    for name, trained in runs.items():
        for number, run in enumerate(trained):
            chosen, accuracy = run["step"].index(run["chosen_step"]), float(right[name][number].mean())
            rows.append([name, first + number, run["chosen_step"], run["dev_accuracy"][chosen], accuracy])
    return Table(
        "by seed",
        ["network", "seed", "step chosen", "dev accuracy", "test accuracy"],
        rows,
        "The step is chosen on the dev split; the test split is scored once.",
    )


def _curves(runs: Runs) -> list[Series]:
    """Mean over the seeds, with the band from the least to the greatest."""
    series: list[Series] = []
    for key, chart, label in (
        ("dev_accuracy", "dev accuracy while training", "accuracy"),
        ("train_loss", "training loss", "cross entropy, nats"),
    ):
        for name, trained in runs.items():
            y = np.array([run[key] for run in trained])
            low, high = (y.min(0).tolist(), y.max(0).tolist()) if len(trained) > 1 else (None, None)
            x = [float(step) for step in trained[0]["step"]]
            series.append(
                Series(
                    f"{name}: {key.replace('_', ' ')}", x, y.mean(0).tolist(), "step", label, chart, low, high, "linear"
                )
            )
    return series


def _by_buckets(what: str, unit: str, values: np.ndarray, right: dict[str, np.ndarray]) -> list[Series]:
    """Accuracy in buckets of equally many examples; x is the mean of the bucket. Nothing where all are alike."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, BUCKETS + 1)))
    if len(edges) < 2:
        return []
    edges[-1] += 1
    groups = [(values >= low) & (values < high) for low, high in pairwise(edges)]
    return _accuracies(what, unit, [(float(values[group].mean()), group) for group in groups if group.any()], right)


def _by_value(what: str, unit: str, values: np.ndarray, right: dict[str, np.ndarray]) -> list[Series]:
    return _accuracies(what, unit, [(float(value), values == value) for value in np.unique(values)], right)


def _accuracies(
    what: str, unit: str, groups: list[tuple[float, np.ndarray]], right: dict[str, np.ndarray]
) -> list[Series]:
    """A curve for each network, with the band of 95% over the examples (normal approximation)."""
    series: list[Series] = []
    for name, values in right.items():
        shares = values.mean(0)
        y = np.array([shares[group].mean() for _, group in groups])
        half = 1.96 * np.array([shares[group].std() / np.sqrt(group.sum()) for _, group in groups])
        low, high = np.clip(y - half, 0, 1).tolist(), np.clip(y + half, 0, 1).tolist()
        x = [place for place, _ in groups]
        series.append(
            Series(f"{name}: by {what}", x, y.tolist(), f"{what}, {unit}", "accuracy", f"accuracy by {what}",
                   low, high, "linear")
        )  # fmt: skip
    return series


def _samples(dataset: Dataset, predicted: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The shortest few of the test split, to be looked at: what is right, and what the first seed of each says."""
    if dataset.name in ("image", "pathfinder"):
        return []
    test, classes = dataset.test, dataset.classes
    samples: list[dict[str, Any]] = []
    for index in np.argsort(test.lengths, kind="stable")[:SAMPLES].tolist():
        shown = [_text(dataset.name, column[index]) for column in test.columns]
        answers = {name: classes[int(choices[0][index])] for name, choices in predicted.items()}
        samples.append(
            {"kind": "classified", "texts": shown, "label": classes[int(test.labels[index])], "predicted": answers}
        )
    return samples


def _text(name: str, tokens: np.ndarray) -> str:
    return listops.text(tokens) if name == "listops" else tokens.tobytes().decode("utf-8", "replace")
