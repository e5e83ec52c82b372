"""The jobs of a recall task: each form of attention on each cell, as it is and after training on the task."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from eval.results.parts import Job, Parts
from eval.shared.forms import OWN, named_forms, with_attention
from eval.subject import Subject
from eval.tasks.recall import RecallSettings
from eval.tasks.recall.questions import HELD_OUT, Cell, Kind, Questions, generator
from eval.tasks.recall.score import items, sample
from eval.tasks.recall.train import Recipe, train
from pretrain.model.config import ModelConfig
from pretrain.model.transformer import build_model

AS_IS, TRAINED = "as it is", "trained"
SAMPLES = 6


@dataclass(frozen=True)
class Variant:
    """A form of attention, as it is or trained."""

    mode: str
    form: str

    @property
    def name(self) -> str:
        return self.mode if self.form == OWN else f"{self.form}, {self.mode}"


@dataclass(frozen=True)
class Study:
    """What was found. Items of all variants are of the same rows, in the same order."""

    items: dict[Variant, list[list[dict[str, Any]]]]
    """For each cell the items of its rows; see :func:`eval.tasks.recall.score.items`. Those of trained variants
    are means over the seeds."""
    by_seed: dict[str, dict[int, float]]
    """Form -> seed -> mean over the rows of its trained model, of ``right``, or of ``exact`` without options."""
    curves: dict[str, list[list[float]]]
    """Form -> (step, loss in nats per answer) of training with the first seed."""
    samples: list[dict[str, Any]]


def held_out(kind: Kind, number: int, settings: RecallSettings) -> Questions:
    """The rows of a cell that are scored, the same for every variant and model with this tokenizer."""
    return kind.rows(kind.cells[number], generator(HELD_OUT, settings.seed, number), settings.rows, training=False)


def study(subject: Subject, settings: RecallSettings, kind: Kind, parts: Parts) -> Study:
    """Score every form on every cell, then (with ``train_steps``) train every form for every seed and score it."""
    known = named_forms(subject.loaded.model_config, settings.attention)
    models: dict[str, Any] = {}
    decode = subject.loaded.tokenizer.decode

    def model(form: str) -> Any:
        if form not in models:
            models[form] = subject.model
            if form != OWN:
                models[form] = with_attention(subject.model, {"attention": known[form].attention}, fresh=True)
        return models[form]

    def look(form: str, number: int, cell: Cell) -> dict[str, Any]:
        questions = held_out(kind, number, settings)
        shown = form == OWN and number in _spread(len(kind.cells))
        return {
            "items": items(model(form), questions),
            "sample": sample(model(form), questions, decode, cell.name) if shown else None,
        }

    def learn(form: str, seed: int) -> dict[str, Any]:
        return _trained(subject, settings, kind, known[form], model(form), seed)

    jobs: list[Job] = [
        (f"{form}, {cell.name}", partial(look, form, number, cell))
        for form in known
        for number, cell in enumerate(kind.cells)
    ]
    trained: list[tuple[str, int]] = []
    if settings.train_steps:
        trained = [(form, seed) for form in known for seed in range(settings.seed, settings.seed + settings.seeds)]
        jobs += [(f"{form}, {TRAINED}, seed {seed}", partial(learn, form, seed)) for form, seed in trained]
    values = iter(parts.map(jobs))
    found: dict[Variant, list[list[dict[str, Any]]]] = {}
    samples = []
    for form in known:
        looks = [next(values) for _ in kind.cells]
        found[Variant(AS_IS, form)] = [value["items"] for value in looks]
        samples += [value["sample"] for value in looks if value["sample"]]
    runs = [(form, seed, next(values)) for form, seed in trained]
    by_seed: dict[str, dict[int, float]] = {}
    curves: dict[str, list[list[float]]] = {}
    for form in known if trained else ():
        own = {seed: value for name, seed, value in runs if name == form}
        found[Variant(TRAINED, form)] = _mean_items([value["items"] for value in own.values()])
        by_seed[form] = {seed: _mean_right(value["items"]) for seed, value in own.items()}
        curves[form] = own[settings.seed]["curve"]
    return Study(found, by_seed, curves, samples)


def _trained(
    subject: Subject, settings: RecallSettings, kind: Kind, config: ModelConfig, weights: Any, seed: int
) -> dict[str, Any]:
    assert settings.train_lr is not None
    assert settings.train_length is not None
    if settings.start == "scratch":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_model(config).to(subject.device)
    else:
        network = copy.deepcopy(weights)
    recipe = Recipe(
        steps=settings.train_steps,
        batch_tokens=settings.train_batch_tokens,
        lr=settings.train_lr,
        longest=settings.train_length,
        precision=settings.precision,
    )
    curve = train(network, kind, recipe, seed, f"{config.attention_label}, seed {seed}")
    scored = [items(network, held_out(kind, n, settings), controls=False) for n in range(len(kind.cells))]
    return {"curve": curve, "items": scored}


def _mean_items(runs: list[list[list[dict[str, Any]]]]) -> list[list[dict[str, Any]]]:
    """Items of several trained models, averaged value by value."""
    return [[_mean_item(same) for same in zip(*cell, strict=True)] for cell in zip(*runs, strict=True)]


def _mean_item(same: Sequence[dict[str, Any]]) -> dict[str, Any]:
    means = {key: np.mean([item[key] for item in same], axis=0).tolist() for key in same[0] if key != "id"}
    return {"id": same[0]["id"], **means}


def _mean_right(cells: list[list[dict[str, Any]]]) -> float:
    key = "right" if "right" in cells[0][0] else "exact"
    return float(np.mean([np.mean(item[key]) for cell in cells for item in cell]))


def _spread(count: int) -> set[int]:
    """Numbers of the cells that show a sample."""
    return {int(i) for i in np.linspace(0, count - 1, min(SAMPLES, count))}
