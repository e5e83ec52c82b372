"""One short training run of one form, and its score on the held-out rows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice, pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention_ablation.tasks import Examples, Task
from data_pipeline.batches import IGNORE
from pretrain.config import OptimizerConfig, ScheduleConfig
from pretrain.model.config import ModelConfig
from pretrain.model.initial import ResidualLinear, initial_std
from pretrain.model.transformer import NystromformerLM, build_model
from pretrain.optim.optimizer import build_optimizer
from pretrain.optim.schedule import learning_rate

UNTIMED_STEPS = 3
"""First steps that the time per step leaves out: they allocate."""
CURVE_POINTS = 40
LOGIT_ELEMENTS = 2**25
"""Logits held at a time in evaluation: 128 MiB in float32."""


@dataclass(frozen=True)
class Recipe:
    """How all forms are trained: one optimizer, linear warm-up and decay to zero by tokens."""

    tokens: int
    batch_tokens: int
    seq_len: int
    lr: float
    bf16: bool
    device: str
    warmup_share: float = 0.1
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    z_loss: float = 0.0
    optimizer: str = "adamw"
    """A kind of ``pretrain/optim/kinds``, with that kind's own defaults for what is not named here."""

    @property
    def step_tokens(self) -> int:
        """Tokens of a step: whole rows."""
        return max(1, self.batch_tokens // self.seq_len) * self.seq_len

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return -(-self.tokens // self.step_tokens)

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        total = self.steps * self.step_tokens
        schedule = ScheduleConfig(kind="linear", warmup_tokens=round(self.warmup_share * total), min_lr_ratio=0.0)
        return learning_rate((step + 1) * self.step_tokens, total_tokens=total, peak=self.lr, schedule=schedule)

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 matrix products, if asked for."""
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.bf16)


def initial_model(config: ModelConfig, base: ModelConfig, seed: int) -> NystromformerLM:
    """A form's model before training. Every parameter that the base model has too, in name and shape, starts from the
    base model's values for this seed. Only what it does not have (a convolution of another width) is drawn anew. Maps
    into the residual stream are scaled where the form's ``residual_init`` is another one."""
    torch.manual_seed(seed)
    model = build_model(config)
    torch.manual_seed(seed)
    reference = dict(build_model(base).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in reference and reference[name].shape == parameter.shape:
                parameter.copy_(reference[name])
        for name, module in model.named_modules():
            weight = reference.get(f"{name}.weight")
            if isinstance(module, ResidualLinear) and weight is not None and weight.shape == module.weight.shape:
                module.weight.mul_(initial_std(module, config) / initial_std(module, base))
    return model


class TrainStep:
    """A model with its optimizer."""

    def __init__(self, model: NystromformerLM, recipe: Recipe) -> None:
        self.model, self.recipe = model.to(recipe.device).train(), recipe
        model.z_loss = recipe.z_loss > 0
        decays = {"weight_decay": recipe.weight_decay, "betas": recipe.betas}
        self.optimizer = build_optimizer(model, OptimizerConfig(kind=recipe.optimizer, lr=recipe.lr, **decays))

    def loss(self, batch: Examples) -> Tensor:
        """What is minimised: the mean over the batch's targets, in nats, and the recipe's z-loss."""
        return self._losses(batch)[0]

    def _losses(self, batch: Examples) -> tuple[Tensor, Tensor]:
        """What is minimised, and the cross entropy in it."""
        with self.recipe.autocast():
            out = self.model(batch.input_ids.to(self.recipe.device), batch.labels.to(self.recipe.device))
        targets = out.num_targets.clamp(min=1)
        loss = out.loss_sum / targets
        return (loss if out.z_sum is None else loss + self.recipe.z_loss * out.z_sum / targets), loss

    def __call__(self, batch: Examples, lr: float) -> float:
        """One step of the optimizer; the cross entropy before it."""
        self.optimizer.zero_grad(set_to_none=True)
        minimised, loss = self._losses(batch)
        minimised.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.recipe.device.startswith("cuda"):
            torch.cuda.synchronize(self.recipe.device)
        return float(loss.detach())


@dataclass(frozen=True)
class Training:
    """What a run was like."""

    curve: list[tuple[int, float]]
    """(step, mean training loss since the point before)."""
    mean_loss: float
    """Over all steps, in nats. No row comes twice (but after an epoch of books): lower is learned sooner, which still
    tells forms apart that end up equal."""
    seconds_per_step: float
    """Median without the first steps; says how long it took, not how forms compare: see ``measure.py``."""
    tokens_per_second: float


def train(step: TrainStep, batches: Iterator[Examples]) -> Training:
    """All steps of the recipe. Stops early at a loss that is not finite; the curve then ends with it."""
    recipe = step.recipe
    losses: list[float] = []
    seconds: list[float] = []
    for i, batch in enumerate(islice(batches, recipe.steps)):
        began = time.perf_counter()
        losses.append(step(batch, recipe.lr_at(i)))
        seconds.append(time.perf_counter() - began)
        if not math.isfinite(losses[-1]):
            break
    per_step = median(seconds[min(UNTIMED_STEPS, len(seconds) - 1) :])
    return Training(_curve(losses), float(np.mean(losses)), per_step, recipe.step_tokens / per_step)


def _curve(losses: list[float]) -> list[tuple[int, float]]:
    edges = np.unique(np.linspace(0, len(losses), min(CURVE_POINTS, len(losses)) + 1).astype(int))
    return [(int(high), float(np.mean(losses[low:high]))) for low, high in pairwise(edges)]


@dataclass(frozen=True)
class Score:
    """Means over targets."""

    loss: float
    """Nats."""
    accuracy: float
    """Share whose largest logit is the target's."""
    targets: int


@dataclass(frozen=True)
class Scores:
    """Over all held-out targets, and by bin of each grouping."""

    overall: Score
    groups: dict[str, list[Score]]


@torch.no_grad()
def evaluate(model: NystromformerLM, task: Task, recipe: Recipe) -> Scores:
    """Loss and accuracy of the task's held-out targets, logits in float32."""
    model.eval()
    names = list(task.groupings)
    parts: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    for batch in task.held_out():
        labels = batch.labels
        chosen = labels != IGNORE
        with recipe.autocast():
            states = model(batch.input_ids.to(recipe.device), hidden=True).hidden[chosen.to(recipe.device)]
            nats, right = _predict(model, states, labels[chosen].to(recipe.device))
        bins = [torch.tensor(batch.groups[name])[chosen] for name in names]
        parts.append(torch.stack([nats, right, *(b.double() for b in bins)]).numpy())
    model.train()
    nats_all, right_all, *bins_all = np.concatenate(parts, axis=1)
    groups = {
        name: [_score(nats_all[bins == i], right_all[bins == i]) for i in range(len(task.groupings[name]))]
        for name, bins in zip(names, bins_all, strict=True)
    }
    return Scores(_score(nats_all, right_all), groups)


def _predict(model: NystromformerLM, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    nats, right = [], []
    rows = max(1, LOGIT_ELEMENTS // model.head.decoder.out_features)
    for part, target in zip(states.split(rows), targets.split(rows), strict=True):
        logits = model.head(part).float()
        nats.append(F.cross_entropy(logits, target, reduction="none").double().cpu())
        right.append((logits.argmax(-1) == target).double().cpu())
    return torch.cat(nats), torch.cat(right)


def _score(nats: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> Score:
    if not len(nats):
        return Score(math.nan, math.nan, 0)
    return Score(float(nats.mean()), float(right.mean()), len(nats))
