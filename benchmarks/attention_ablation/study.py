"""A study: forms trained alike on one task, and what is finished kept in the file of results."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_ablation.forms import BASELINE, Variant, select
from benchmarks.attention_ablation.measure import interleaved, memory
from benchmarks.attention_ablation.tasks import Task
from benchmarks.attention_ablation.training import Recipe, TrainStep, evaluate, initial_model, train
from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from pretrain.model.config import ModelConfig

SCHEMA = 1
VERSION = 1
"""Raised when the numbers of a run change though its settings do not: then nothing old is taken for done."""

Record = dict[str, Any]


def key(**parts: Any) -> str:
    """sha256 of the parts (plain values).

    Settings of a model and of a recipe that have their defaults are left out. So a setting that a later version adds
    leaves finished results what they are.
    """
    told = {name: _told(name, part) for name, part in parts.items()}
    return hashlib.sha256(json.dumps({"version": VERSION, **told}, sort_keys=True).encode()).hexdigest()


def _told(name: str, part: Any) -> Any:
    if name == "models":
        return {form: _told("model", model) for form, model in part.items()}
    defaults = {"model": _MODEL, "base": _MODEL, "recipe": _RECIPE}.get(name)
    if defaults is None:
        return part
    # As JSON: what is read from a file has lists where settings have tuples.
    return {field: value for field, value in part.items() if json.dumps(value) != defaults.get(field)}


_MODEL = {
    name: json.dumps(field.default) for name, field in ModelConfig.model_fields.items() if not field.is_required()
}
_RECIPE = {field.name: json.dumps(field.default) for field in fields(Recipe) if field.default is not MISSING}


class Results:
    """``runs`` and ``timings`` by key; the file is written anew, as a whole, with each addition."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`UserError` for a file that is there and is not one of these."""
        self.path = path
        self.runs: dict[str, Record] = {}
        self.timings: dict[str, Record] = {}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is not a readable file of results ({error}): delete it or choose another --out"
            ) from None
        if not isinstance(content, dict) or content.get("schema") != SCHEMA or not {"runs", "timings"} <= set(content):
            raise UserError(f"{path} holds no results of this benchmark (schema {SCHEMA}): choose another --out")
        self.runs, self.timings = content["runs"], content["timings"]

    def add_run(self, key: str, record: Record) -> None:
        """Keep a finished run."""
        self.runs[key] = _finite(record)
        self._write()

    def add_timing(self, key: str, record: Record) -> None:
        """Keep a finished timing."""
        self.timings[key] = _finite(record)
        self._write()

    def _write(self) -> None:
        parts = {"runs": self.runs, "timings": self.timings}
        text = ", ".join(f'"{name}": {{\n{_by_line(records)}\n}}' for name, records in parts.items())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, f'{{"schema": {SCHEMA}, {text}}}\n'.encode())


def _by_line(records: dict[str, Record]) -> str:
    """The members of a JSON object, one a line: what a run adds to a kept file is a line of its difference."""
    return ",\n".join(f"{json.dumps(key)}: {json.dumps(record, allow_nan=False)}" for key, record in records.items())


def _finite(value: Any) -> Any:
    """Numbers that are not finite become null: JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


@dataclass(frozen=True)
class Study:
    """Forms, trained alike, on one task."""

    base: ModelConfig
    task: Task
    recipe: Recipe
    variants: list[Variant]
    results: Results
    provenance: dict[str, Any]
    baseline: str = BASELINE
    """Of the times; of a name that :func:`select` knows, or one of the variants."""

    def run(self, variant: Variant, seed: int) -> Record:
        """Train and score a form, unless its result is there."""
        recipe = replace(self.recipe, **variant.training)
        settings = self._settings(recipe) | {"model": variant.config.model_dump(), "seed": seed}
        name = key(kind="run", **settings)
        if name in self.results.runs:
            print(f"{variant.name}, seed {seed}: already there", flush=True)
            return self.results.runs[name]
        began = time.perf_counter()
        step = TrainStep(initial_model(variant.config, self.base, seed), recipe)
        held = memory(step, self.task.measured(seed))
        torch.manual_seed(seed)  # of dropout
        training = train(step, self.task.train_batches(seed))
        scores = evaluate(step.model, self.task, recipe)
        record = settings | {
            "form": variant.name,
            "changes": variant.changes,
            "parameters": step.model.num_parameters(),
            "score": asdict(scores.overall),
            "groups": {grouping: [asdict(part) for part in parts] for grouping, parts in scores.groups.items()},
            "groupings": self.task.groupings,
            "chance": self.task.chance,
            "training": asdict(training),
            "memory": asdict(held),
            "seconds": time.perf_counter() - began,
            "provenance": self.provenance,
        }
        self.results.add_run(name, record)
        print(
            f"{variant.name}, seed {seed}: loss {scores.overall.loss:.4f}, accuracy {scores.overall.accuracy:.1%}, "
            f"{training.tokens_per_second:,.0f} tokens/s, {record['seconds']:.0f} s",
            flush=True,
        )
        return self.results.runs[name]

    def time(self, rounds: int) -> Record:
        """Interleaved steps of all forms and the baseline, unless they are there for the same forms and threads."""
        variants = list(self.variants)
        if all(variant.name != self.baseline for variant in variants):
            variants += select([self.baseline], self.base)
        recipes = {variant.name: replace(self.recipe, **variant.training) for variant in variants}
        settings = self._settings(self.recipe) | {
            "models": {variant.name: variant.config.model_dump() for variant in variants},
            "training": {variant.name: variant.training for variant in variants if variant.training},
            "rounds": rounds,
            "threads": torch.get_num_threads(),
        }
        name = key(kind="timing", **settings)
        if name not in self.results.timings:
            steps = {v.name: TrainStep(initial_model(v.config, self.base, 0), recipes[v.name]) for v in variants}
            times = interleaved(steps, self.task.measured(0), self.baseline, rounds)
            measured = {"forms": {form: asdict(step) for form, step in times.items()}, "provenance": self.provenance}
            self.results.add_timing(name, settings | measured)
        return self.results.timings[name]

    def _settings(self, recipe: Recipe) -> dict[str, Any]:
        """What determines every result of this study. The device's kind and not its number."""
        recipe = replace(recipe, device=torch.device(recipe.device).type)
        return {
            "task": {"name": self.task.name, **self.task.settings},
            "recipe": asdict(recipe),
            "base": self.base.model_dump(),
        }
