"""Small trainings of evaluation tasks: the loop, its learning rate, batches of like lengths, the choice of weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError

Batch = TypeVar("Batch")
CURVE_POINTS = 40


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Mixed precision by autocast: weights and optimizer stay float32, matrix products run in bf16."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def linear_schedule(
    optimizer: torch.optim.Optimizer, steps: int, share: float = 0.1
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over the first ``share`` of the steps, then linear decay to zero."""
    warmup = max(int(share * steps), 1)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
    )


def train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batches: Iterable[Batch],
    losses: Callable[[Batch], Iterable[Tensor]],
    *,
    grad_clip: float | None = None,
) -> Iterator[tuple[int, Batch, Tensor]]:
    """Train while it is iterated: after each step its number from 1, its batch and its loss, a scalar on the device.

    ``losses``: the shares of a batch's loss, which add up to it. Each is propagated back before the next is computed,
    so that one alone is in memory. ``grad_clip``: largest norm of the gradient, None for any. Between two steps the
    caller may evaluate the model, which is set back to training, or stop.
    """
    for step, batch in enumerate(batches, 1):
        model.train()
        optimizer.zero_grad(set_to_none=True)
        total: Tensor | None = None
        for loss in losses(batch):
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        schedule.step()
        assert total is not None
        yield step, batch, total


class Best:
    """The weights that did best on the development split: the highest accuracy, of equal ones the lowest loss.

    Equal is what is at most ``margin`` below the highest.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: tuple[float, float] | None = None
        self._highest = -math.inf
        self._weights: dict[str, Tensor] = {}

    def keep(self, accuracy: float, loss: float, margin: float = 0.0) -> bool:
        """Keep a copy of the present weights if they are the best so far; returns whether they are."""
        self._highest = max(self._highest, accuracy)
        enough = self._highest - margin
        if self._kept is not None and self._kept[0] >= enough:
            lower = loss < self._kept[1] or (math.isnan(self._kept[1]) and not math.isnan(loss))
            if not (lower and accuracy >= enough):
                return False
        self._kept, self._weights = (accuracy, loss), copy.deepcopy(self._model.state_dict())
        return True

    def restore(self) -> None:
        """Give the model its best weights back."""
        self._model.load_state_dict(self._weights)


def accuracy_and_loss(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of the rows of ``logits`` (n, classes) whose largest is at ``labels`` (n,); cross-entropy in nats."""
    right = logits.argmax(-1) == labels
    return float(right.float().mean()), float(nn.functional.cross_entropy(logits, labels))


def loss_curve(losses: Sequence[float]) -> list[list[float]]:
    """(step, mean loss since the point before) at up to ``CURVE_POINTS`` places."""
    edges = np.unique(np.linspace(0, len(losses), min(CURVE_POINTS, len(losses)) + 1).astype(int)).tolist()
    return [[high, float(np.mean(losses[low:high]))] for low, high in pairwise(edges)]


def length_batches(
    lengths: np.ndarray, indices: np.ndarray, size: int, rng: np.random.Generator | None
) -> Iterator[np.ndarray]:
    """Batches of like lengths. With ``rng``: shuffled, sorted within pools of eight batches, batches shuffled."""
    if rng is None:
        order = indices[np.argsort(lengths[indices], kind="stable")]
        yield from (order[i : i + size] for i in range(0, len(order), size))
        return
    order = rng.permutation(indices)
    pools = [order[i : i + 8 * size] for i in range(0, len(order), 8 * size)]
    order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    for i in rng.permutation(len(batches)):
        yield batches[i]


def epochs(lengths: np.ndarray, indices: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of like lengths without end, each pass over ``indices`` in an order of its own."""
    while True:
        yield from length_batches(lengths, indices, size, rng)


def micro_batches(lengths: np.ndarray, indices: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """``indices`` by falling length, in parts of which rows x longest is at most ``tokens`` (one row at the least)."""
    order = indices[np.argsort(-lengths[indices], kind="stable")]
    start = 0
    while start < len(order):
        rows = max(1, tokens // int(lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


def carve(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into (rest, held out) by class, ``share`` of each held out but never a class's last example.

    Raises :class:`UserError` where nothing can be held out.
    """
    rng = np.random.default_rng(seed)
    held: list[np.ndarray] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held.append(members[: min(max(round(share * len(members)), 1), len(members) - 1)])
    out = np.sort(np.concatenate(held))
    if not len(out):
        raise UserError("every label has a single training record: none can be held out to choose the epoch on")
    return np.setdiff1d(np.arange(len(labels)), out), out
