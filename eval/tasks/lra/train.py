"""Training a classifier from random weights for a number of steps; the weights are chosen on the dev split.

As published (LRA/code/run_tasks.py of the Nyströmformer repository): AdamW with epsilon 1e-6, one cycle of the learning
rate, linear up and down, with beta1 going the other way. The dev split is looked at every so many steps, and the best
weights are scored on the test split, once. Not as published: batches are of like lengths, which saves padding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.shared.progress import Progress
from eval.shared.training import Best, accuracy_and_loss, autocast, epochs, length_batches, train_steps
from eval.tasks.lra.examples import Dataset, Split
from eval.tasks.lra.network import ArenaClassifier


@dataclass(frozen=True)
class Recipe:
    """Steps, and the optimizer's settings."""

    steps: int
    warmup: int
    validate_every: int
    batch_size: int
    lr: float
    weight_decay: float
    precision: str
    seed: int


@dataclass(frozen=True)
class Trained:
    """What a training leaves: the curve at the looks at the dev split, and the test split's classes as predicted.

    ``train_loss`` is the mean since the look before. ``tokens_per_second``: real tokens of training steps, looks at the
    dev split left out.
    """

    step: list[int]
    train_loss: list[float]
    dev_accuracy: list[float]
    dev_loss: list[float]
    chosen_step: int
    predicted: list[int]
    parameters: int
    tokens_per_second: float

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def train(model: ArenaClassifier, data: Dataset, recipe: Recipe, device: torch.device, name: str = "") -> Trained:
    """Train ``model`` (changed) and score the test split with the weights that were best on the dev split.

    The order of the batches and the dropout follow from the recipe's seed.
    """
    torch.manual_seed(recipe.seed)
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.lr,
        total_steps=recipe.steps,
        pct_start=recipe.warmup / recipe.steps,
        anneal_strategy="linear",
    )

    def losses(indices: np.ndarray) -> Iterator[Tensor]:
        inputs, labels = data.train.collate(indices)
        with autocast(device, recipe.precision):
            logits = model([(ids.to(device), lengths) for ids, lengths in inputs])
        yield nn.functional.cross_entropy(logits.float(), labels.to(device))

    curve: list[tuple[int, float, float, float]] = []
    best, chosen = Best(model), 0
    since: list[Tensor] = []
    tokens, seconds, started = 0, 0.0, time.perf_counter()
    batches = islice(endless_batches(data.train, recipe.batch_size, recipe.seed), recipe.steps)
    truth = torch.from_numpy(data.dev.labels)
    with Progress(recipe.steps, name or "train", "step") as bar:
        for step, indices, loss in train_steps(model, optimizer, schedule, batches, losses):
            since.append(loss)
            tokens += data.train.tokens(indices)
            bar.update()
            if step % recipe.validate_every and step != recipe.steps:
                continue
            mean_loss = float(torch.stack(since).mean())  # also waits for the device, before the clock is read
            seconds += time.perf_counter() - started
            accuracy, dev_loss = accuracy_and_loss(predict(model, data.dev, recipe, device), truth)
            curve.append((step, mean_loss, accuracy, dev_loss))
            bar.remark(f"loss {mean_loss:.3f}, dev accuracy {accuracy:.3f}")
            if best.keep(accuracy, dev_loss):
                chosen = step
            since = []
            started = time.perf_counter()
    best.restore()
    predicted = predict(model, data.test, recipe, device).argmax(-1).tolist()
    steps, train_loss, dev_accuracy, dev_losses = (list(column) for column in zip(*curve, strict=True))
    return Trained(
        steps, train_loss, dev_accuracy, dev_losses, chosen, predicted, model.num_parameters(), tokens / seconds
    )


def endless_batches(split: Split, size: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of batches, pass after pass over the split, each in an order of its own."""
    return epochs(split.lengths, np.arange(len(split)), size, np.random.default_rng(seed))


@torch.inference_mode()
def predict(model: ArenaClassifier, split: Split, recipe: Recipe, device: torch.device) -> Tensor:
    """Logits (n, classes) in float32 on the CPU, in the order of the split."""
    model.eval()
    order = list(length_batches(split.lengths, np.arange(len(split)), recipe.batch_size, None))
    parts = []
    for indices in order:
        inputs, _ = split.collate(indices)
        with autocast(device, recipe.precision):
            parts.append(model([(ids.to(device), lengths) for ids, lengths in inputs]).float())
    logits = torch.cat(parts).cpu()
    back = torch.empty(len(split), dtype=torch.int64)
    back[torch.from_numpy(np.concatenate(order))] = torch.arange(len(split))
    return logits[back]
