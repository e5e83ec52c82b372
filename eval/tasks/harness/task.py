"""Tasks of EleutherAI's evaluation harness (lm-eval) on a causal checkpoint.

The harness makes the prompts and computes the scores; this adds the model (``model``), records that two
models can be paired by, and intervals over the documents.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from eval.results.parts import Parts
from eval.results.schema import Estimator, Metric, Outcome, Table
from eval.results.statistics import bootstrap, estimate
from eval.shared.scoring import LOG2E
from eval.subject import Subject
from eval.tasks.harness import HarnessSettings

VERSION = 2
TABLE = "harness"
# How the harness's own metrics follow from the values of single documents: a number, or a pair of log-likelihood and
# weight. The one that gives the harness's figure is the one that is resampled.
_SCALARS = (Estimator("value", "count"), Estimator("value", "count", scale=-1.0, exponential=True))
_PAIRS = (
    Estimator("value", "count", scale=-1.0, exponential=True),
    Estimator("value", "count", scale=-LOG2E),
    Estimator("value", "count"),
)


def resolve(subject: Subject, settings: HarnessSettings) -> HarnessSettings:
    """The window; raises :class:`UserError` for a masked model, without the harness, and without a task it knows."""
    if not subject.causal:
        raise UserError("harness scores continuations of prompts, which a masked model does not have: it is for clm")
    _require()
    if not settings.tasks:
        raise UserError("harness needs --tasks, names of lm-eval (`lm-eval ls tasks` lists them) or of --include-path")
    length = subject.check_length(settings.length or subject.trained_length, "--length")
    return settings.model_copy(update={"length": length})


def data(subject: Subject, settings: HarnessSettings) -> dict[str, Any]:
    """The tasks, by a hash of their configuration, their documents and those that the examples are drawn from."""
    import lm_eval

    with _quiet():
        tasks = _load(settings)["tasks"]
        digest = hashlib.sha256()
        documents = {}
        for name, task in sorted(tasks.items()):
            facts = [name, task.VERSION, task.dump_config()]
            digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
            docs = list(task.eval_docs)
            documents[name] = len(docs)
            examples = list(task.fewshot_docs() or []) if task.config.num_fewshot else []
            for doc in [*docs, *examples]:
                digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    version = lm_eval.__version__
    return {
        "lm_eval": version,
        "documents": documents,
        "hash": hashlib.sha256(f"{digest.hexdigest()} {version}".encode()).hexdigest(),
    }


def run(subject: Subject, settings: HarnessSettings, parts: Parts) -> Outcome:
    """Scores of every task and group with intervals over the documents."""
    from lm_eval.evaluator import evaluate

    from eval.tasks.harness.model import SubjectLM

    model = SubjectLM(subject, settings.length or 0, parts, settings.seed)
    with _quiet():
        random.seed(settings.seed)
        np.random.seed(settings.seed)  # tasks draw from the global state
        loaded = _load(settings)
        found = evaluate(lm=model, task_dict=loaded, limit=settings.limit, bootstrap_iters=0, log_samples=True)
    assert found is not None  # only processes of another rank get nothing, and the harness knows of one
    return _outcome(found, settings)


def _outcome(found: Any, settings: HarnessSettings) -> Outcome:
    metrics: dict[str, Metric] = {}
    rows: list[list[Any]] = []
    values: dict[str, dict[str, tuple[float, float]]] = {}
    several = len(found["samples"]) > 1
    pooled: dict[str, set[Estimator]] = {}
    for name, results in found["results"].items():
        samples = found["samples"].get(name, [])
        for key, value in results.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = metric if filter_name == "none" else f"{metric} ({filter_name})"
            better = found["higher_is_better"].get(name, {}).get(metric)
            mine = [s for s in samples if s["filter"] == filter_name and metric in s]
            columns = [_column(sample[metric]) for sample in mine]
            figure = Metric(float(value), better, n=len(mine) or None)
            chosen = _estimator([c for c in columns if c is not None], value) if None not in columns else None
            if chosen is not None:
                items = [{"value": c[0], "count": c[1]} for c in columns if c is not None]
                bounds = bootstrap(items, chosen, seed=settings.seed)
                figure = Metric(float(value), better, n=len(items), low=bounds.low, high=bounds.high)
                for sample, item in zip(mine, items, strict=True):
                    values.setdefault(_identity(name, sample), {})[label] = (item["value"], item["count"])
                pooled.setdefault(label, set()).add(chosen)
            metrics[f"{name} {label}" if several or not samples else label] = figure
            rows.append(
                [name, label, figure.value, figure.low, figure.high, len(mine) or None, found["n-shot"].get(name)]
            )
    records = _records(values, sorted(pooled))
    estimators = {
        label: Estimator(label, f"{label} n", next(iter(kinds)).scale, next(iter(kinds)).exponential)
        for label, kinds in pooled.items()
        if len(kinds) == 1
    }
    if several:
        for label, estimator in estimators.items():
            bounds = bootstrap(records, estimator, seed=settings.seed)
            better = next(m.higher_is_better for name, m in metrics.items() if name.endswith(f" {label}"))
            metrics[label] = Metric(bounds.value, better, n=bounds.n, low=bounds.low, high=bounds.high)
    note = "Computed by EleutherAI's lm-eval; intervals resample the documents." + (
        " A metric without a task's name is over the documents of all tasks." if several else ""
    )
    header = ["task", "metric", "value", "low", "high", "documents", "examples in the prompt"]
    samples = [sample for name in found["samples"] for sample in _shown(name, found["samples"][name])]
    return Outcome(metrics, [Table(TABLE, header, rows, note)], samples=samples, records=records, estimators=estimators)


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


def _identity(name: str, sample: dict[str, Any]) -> str:
    content = [name, sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]]
    return name + " " + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32] + f" {sample['doc_id']}"


def _records(values: dict[str, dict[str, tuple[float, float]]], labels: list[str]) -> list[dict[str, Any]]:
    """A record for each document: of every metric its value and weight, 0 and 0 where its task has no such metric."""
    records = []
    for identity, found in values.items():
        task, _, content = identity.partition(" ")
        record: dict[str, Any] = {"id": content.split(" ")[0], "task": task}
        for label in labels:
            record[label], record[f"{label} n"] = found.get(label, (0.0, 0.0))
        records.append(record)
    return records


def _shown(name: str, samples: list[dict[str, Any]], count: int = 2) -> Iterator[dict[str, Any]]:
    """The first documents of a task: what the model was asked and what it was scored on."""
    for sample in samples[:count]:
        yield {
            "kind": "harness",
            "task": name,
            "prompt": str(sample["arguments"][0][0]),
            "target": str(sample["target"]),
            "responses": json.loads(json.dumps(sample["filtered_resps"], default=str)),
        }


def _load(settings: HarnessSettings) -> Any:
    """The harness's tasks, with the examples and the seed that the settings ask for."""
    own = _manager(settings.include_path, False) if settings.include_path else None
    manager = own if own is not None and all(own.match_tasks([name]) for name in settings.tasks) else None
    manager = manager or _manager(settings.include_path, True)
    names: list[str] = []
    for asked in settings.tasks:
        matches = manager.match_tasks([asked])
        if not matches:
            close = difflib.get_close_matches(asked, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists those of lm-eval"
            raise UserError(f"no task '{asked}' of lm-eval or of --include-path: {hint}")
        names += matches
    try:
        loaded = manager.load(list(dict.fromkeys(names)))
    except Exception as error:  # whatever the task's code and the datasets library raise
        raise UserError(f"--tasks {' '.join(settings.tasks)} cannot be loaded: {_line(error)}") from None
    for task in loaded["tasks"].values():
        own = task.config.num_fewshot
        if settings.num_fewshot is not None and own != 0:  # 0 of a task's own means that it allows none
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=settings.seed)
    return loaded


@functools.lru_cache(maxsize=2)
def _manager(include_path: tuple[str, ...], defaults: bool) -> Any:
    """The index of task files; with the thousands of lm-eval's own it takes seconds to make."""
    from lm_eval.tasks import TaskManager

    for folder in include_path:
        if not Path(folder).is_dir():
            raise UserError(f"--include-path {folder} is not a folder")
    try:
        return TaskManager(include_path=list(include_path) or None, include_defaults=defaults)
    except Exception as error:  # a task file at fault
        raise UserError(f"--include-path {' '.join(include_path)}: {_line(error)}") from None


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError("harness needs lm-eval: pip install 'nystrom-pretrain[harness]'") from None


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's remarks on every step."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
