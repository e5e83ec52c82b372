"""From what the harness found to a result: intervals over the documents, chance and ties, a record of each document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from eval.results.schema import Estimator, Metric, Outcome, Table
from eval.results.statistics import bootstrap, estimate
from eval.shared.scoring import LOG2E
from eval.tasks.harness import TABLE, HarnessSettings
from eval.tasks.harness.documents import Sample, chance, choices_of, facts, identity, shown

# How the harness's own metrics follow from the values of single documents: a number, or a pair of log-likelihood and
# weight. The one that gives the harness's figure is the one that is resampled.
_SCALARS = (Estimator("value", "count"), Estimator("value", "count", scale=-1.0, exponential=True))
_PAIRS = (
    Estimator("value", "count", scale=-1.0, exponential=True),
    Estimator("value", "count", scale=-LOG2E),
    Estimator("value", "count"),
)


@dataclass
class _Found:
    """What is collected task by task. ``records``: by task and document."""

    seed: int
    several: bool
    metrics: dict[str, Metric] = field(default_factory=dict)
    estimators: dict[str, Estimator] = field(default_factory=dict)
    rows: list[list[Any]] = field(default_factory=list)
    records: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def name(self, task: str, label: str) -> str:
        """A metric is called by its task too where there are several."""
        return f"{task} {label}" if self.several else label

    def add(self, task: str, label: str, metric: Metric, shots: Any, guessing: float | None) -> None:
        """A metric, and its row of the table."""
        self.metrics[self.name(task, label)] = metric
        self.rows.append([task, label, metric.value, metric.low, metric.high, guessing, metric.n, shots])

    def measured(self, value: float, better: bool | None, estimator: Estimator) -> Metric:
        """A figure of the harness with the interval over the documents that its estimator counts."""
        bounds = bootstrap(list(self.records.values()), estimator, seed=self.seed)
        return Metric(value, better, n=bounds.n, low=bounds.low, high=bounds.high, unit="documents")


def outcome(found: Any, settings: HarnessSettings) -> Outcome:
    """The result of what lm-eval's ``evaluate`` returned, with its samples.

    There is no figure over unlike tasks: only what a group of lm-eval's defines is over several.
    """
    so_far = _Found(settings.seed, several=len(found["samples"]) > 1)
    for task, samples in found["samples"].items():
        _task(so_far, task, samples, found)
    for group in found["results"]:
        if group not in found["samples"]:
            _group(so_far, group, found)
    note = "Computed by EleutherAI's lm-eval; intervals resample the documents. Chance: each choice guessed."
    header = ["task", "metric", "value", "low", "high", "chance", "documents", "examples in the prompt"]
    return Outcome(
        so_far.metrics,
        [Table(TABLE, header, so_far.rows, " ".join([note, *so_far.notes]))],
        samples=[sample for task in found["samples"] for sample in shown(task, found["samples"][task])],
        records=list(so_far.records.values()),
        estimators=so_far.estimators,
    )


def _task(so_far: _Found, task: str, samples: list[Sample], found: Any) -> None:
    """The metrics of one task, and the records of its documents."""
    for sample in samples:
        record = {"id": identity(task, sample), "task": task, **facts(sample)}
        so_far.records.setdefault((task, sample["doc_id"]), record)
    guessing: float | None = None
    for key, value in found["results"].get(task, {}).items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = metric if filter_name == "none" else f"{metric} ({filter_name})"
        better = found["higher_is_better"].get(task, {}).get(metric)
        mine = [sample for sample in samples if sample["filter"] == filter_name and metric in sample]
        figure = Metric(float(value), better, n=len(mine) or None, unit="documents")
        columns = [_column(sample[metric]) for sample in mine]
        known = [column for column in columns if column is not None]
        chosen = _estimator(known, value) if len(known) == len(columns) else None
        if chosen is not None:
            for sample, column in zip(mine, known, strict=True):
                so_far.records[task, sample["doc_id"]] |= dict(zip((label, f"{label} n"), column, strict=True))
            estimator = replace(chosen, numerator=label, denominator=f"{label} n", tasks=(task,))
            so_far.estimators[so_far.name(task, label)] = estimator
            figure = so_far.measured(float(value), better, estimator)
        level = chance(mine, metric)
        guessing = level if level is not None else guessing
        so_far.add(task, label, figure, found["n-shot"].get(task), level)
    _choices(so_far, task, samples, guessing)


def _choices(so_far: _Found, task: str, samples: list[Sample], guessing: float | None) -> None:
    """Chance, and how many documents have several likeliest choices."""
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]  # each document once
    choices = [item for item in map(choices_of, first) if item is not None]
    if guessing is not None:
        so_far.metrics[so_far.name(task, "chance")] = Metric(guessing, None, n=len(first), unit="documents")
    if not choices:
        return
    tied = [item for item in choices if item.tied]
    share = len(tied) / len(choices)
    so_far.metrics[so_far.name(task, "ties")] = Metric(share, None, n=len(choices), unit="documents")
    if tied:
        right = sum(item.right is not None and item.chosen in item.right for item in tied)
        so_far.notes.append(
            f"{task}: {len(tied)} of {len(choices)} documents ({share:.1%}) have several likeliest choices. The first "
            f"of them is taken, as lm-eval does, and is right in {right}."
        )


def _group(so_far: _Found, group: str, found: Any) -> None:
    """What lm-eval says of a group; with an interval where it is over all documents of the group's tasks alike."""
    tasks = tuple(_members(group, found["group_subtasks"], found["samples"]))
    for key, value in found["results"][group].items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = metric if filter_name == "none" else f"{metric} ({filter_name})"
        better = found["higher_is_better"].get(group, {}).get(metric)
        figure = Metric(float(value), better)
        parts = [so_far.estimators.get(so_far.name(task, label)) for task in tasks]
        if parts and parts[0] is not None:
            whole = replace(parts[0], tasks=tasks)
            alike = all(part is not None and replace(part, tasks=tasks) == whole for part in parts)
            if alike and math.isclose(estimate(list(so_far.records.values()), whole), value, rel_tol=1e-9):
                so_far.estimators[f"{group} {label}"] = whole
                figure = so_far.measured(float(value), better, whole)
        so_far.metrics[f"{group} {label}"] = figure
        shots = found["n-shot"].get(group)
        so_far.rows.append([group, label, figure.value, figure.low, figure.high, None, figure.n, shots])


def _members(group: str, children: dict[str, Sequence[str]], tasks: dict[str, Any]) -> list[str]:
    """The tasks of a group and of the groups in it."""
    found: list[str] = []
    for child in children.get(group, []):
        found += [child] if child in tasks else _members(child, children, tasks)
    return list(dict.fromkeys(found))


def _column(value: Any) -> tuple[float, float] | None:
    """A document's value as numerator and denominator, None for what is neither a number nor a pair."""
    if isinstance(value, bool | int | float | np.number):
        return float(value), 1.0
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(x, int | float) for x in value):
        return float(value[0]), float(value[1])
    return None


def _estimator(columns: list[tuple[float, float]], value: float) -> Estimator | None:
    """The way in which the documents' values give the harness's, None where there is none (F1, BLEU)."""
    items = [{"value": top, "count": bottom} for top, bottom in columns]
    if not items or not math.isfinite(value):
        return None
    candidates = _SCALARS if all(bottom == 1.0 for _, bottom in columns) else _PAIRS
    return next((c for c in candidates if math.isclose(estimate(items, c), value, rel_tol=1e-9, abs_tol=1e-12)), None)
