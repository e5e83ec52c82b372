"""Long Range Arena (Tay et al. 2021, arXiv 2011.04006): classifying long sequences with networks trained from nothing.

Each network of ``attention`` is trained once for every seed, all else equal, in the setting of the Nyströmformer paper
and its repository, whose accuracies stand beside ours where the data is theirs. Unlike LRA, the pooling divides by the
real length, and no weights are chosen on the test split (LRA's own development split of IMDb is its test split).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.subject import Subject, choose_device, choose_precision
from eval.tasks.lra import LRASettings, report
from eval.tasks.lra.data import load
from eval.tasks.lra.examples import Dataset
from eval.tasks.lra.published import PUBLISHED

VERSION = 3
# What data() has read, for run(), which follows it: 200,000 images are not read twice.
_READ: dict[LRASettings, Dataset] = {}


def resolve(subject: Subject | None, settings: LRASettings) -> LRASettings:
    """The published length, steps and batch where they were left out, and the precision; checks what does not fit."""
    published = PUBLISHED[settings.benchmark]
    filled: dict[str, Any] = {
        name: getattr(settings, name) or getattr(published, name)
        for name in ("max_length", "steps", "warmup", "validate_every", "batch_size")
    }
    if settings.warmup is None:
        filled["warmup"] = max(2, min(published.warmup, filled["steps"] * published.warmup // published.steps))
    if filled["warmup"] >= filled["steps"]:
        raise UserError(f"--warmup {filled['warmup']} leaves none of --steps {filled['steps']} for the decay")
    if settings.benchmark in ("image", "pathfinder") and filled["max_length"] < published.max_length:
        raise UserError(f"--max-length {filled['max_length']} would cut images of {published.max_length} pixels")
    longest = settings.max_symbols - 1
    if settings.benchmark == "listops" and settings.path is None and filled["max_length"] < longest:
        # What is cut off decides the value of what is left.
        raise UserError(
            f"--max-length {filled['max_length']} would cut ListOps expressions of up to {longest} symbols, whose "
            f"values would then be wrong: --max-length {longest}, or fewer --max-symbols"
        )
    device = choose_device(settings.device)
    filled["precision"] = choose_precision(settings.precision, device)
    return settings.model_copy(update=filled)


def data(subject: Subject | None, settings: LRASettings) -> dict[str, Any]:
    """The dataset, read or generated."""
    _READ.clear()
    _READ[settings] = load(settings)
    return _READ[settings].describe()


def run(subject: Subject | None, settings: LRASettings, parts: Parts) -> Outcome:
    """Train every network for every seed and score the test split; each training is a part."""
    dataset = _READ.pop(settings, None) or load(settings)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    runs = [(attention, seed) for attention in settings.networks for seed in seeds]
    values = parts.map([(f"{attention}, seed {seed}", partial(_train, settings, dataset, attention, seed))
                        for attention, seed in runs])  # fmt: skip
    results: dict[str, list[dict[str, Any]]] = {attention: [] for attention in settings.networks}
    for (attention, _), value in zip(runs, values, strict=True):
        results[attention].append(value)
    return report.outcome(settings, dataset, results)


def _train(settings: LRASettings, dataset: Dataset, attention: str, seed: int) -> dict[str, Any]:
    import torch

    from eval.tasks.lra.network import ArenaClassifier, model_config
    from eval.tasks.lra.train import Recipe, train

    assert settings.steps
    assert settings.warmup
    assert settings.validate_every
    assert settings.batch_size
    torch.manual_seed(seed)
    longest = int(np.max([split.lengths.max() for split in dataset.splits().values()]))
    config = model_config(settings, attention, dataset.vocabulary, longest)
    model = ArenaClassifier(config, len(dataset.classes), settings.ffn_size, len(dataset.train.columns))
    recipe = Recipe(
        settings.steps,
        settings.warmup,
        settings.validate_every,
        settings.batch_size,
        settings.lr,
        settings.weight_decay,
        settings.precision,
        seed,
    )
    return train(model, dataset, recipe, choose_device(settings.device), f"{attention}, seed {seed}").plain()
