"""Training on a recall task: AdamW on the questions of fresh rows, from the checkpoint or from random weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import UserError
from eval.shared.progress import Progress
from eval.shared.training import autocast, linear_schedule, loss_curve, train_steps
from eval.tasks.recall.questions import TRAIN, Kind, Questions, generator
from eval.tasks.recall.score import states_at
from pretrain.config import OptimizerConfig
from pretrain.model.transformer import NystromformerLM
from pretrain.optim.optimizer import parameter_groups


@dataclass(frozen=True)
class Recipe:
    """Linear warm-up over the first tenth of the steps, then linear decay to zero."""

    steps: int
    batch_tokens: int
    lr: float
    longest: int
    precision: str
    grad_clip: float = 1.0


def default_lr(hidden_size: int) -> float:
    """0.25 / width: 1e-3 at 256."""
    return 0.25 / hidden_size


def train(model: NystromformerLM, kind: Kind, recipe: Recipe, seed: int, title: str) -> list[list[float]]:
    """Train in place; every step has fresh rows of one cell, drawn from those of at most ``recipe.longest`` tokens.

    Returns the curve, (step, mean loss since the point before, in nats per answer). Raises :class:`UserError` where the
    loss is not finite.
    """
    device = next(model.parameters()).device
    cells = [cell for cell in kind.cells if cell.length <= recipe.longest]
    if not cells:
        shortest = min(cell.length for cell in kind.cells)
        raise UserError(f"--train-length {recipe.longest}: the shortest rows have {shortest} tokens")
    torch.manual_seed(seed)  # of dropout
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, OptimizerConfig(weight_decay=0.01, betas=(0.9, 0.98))), lr=recipe.lr
    )
    schedule = linear_schedule(optimizer, recipe.steps)

    def fresh_rows() -> Iterator[Questions]:
        for step in range(recipe.steps):
            rng = generator(TRAIN, seed, step)
            cell = cells[int(rng.integers(len(cells)))]
            yield kind.rows(cell, rng, max(1, recipe.batch_tokens // cell.length), training=True)

    def loss(rows: Questions) -> Iterator[Tensor]:
        with autocast(device, recipe.precision):
            # The head on the answers only: of a causal model's labels the model itself would compute all positions.
            states = states_at(model, rows.inputs, rows.at)
            logits = model.head(states.flatten(0, 1)).float()
        yield F.cross_entropy(logits, torch.from_numpy(rows.right).to(device).flatten())

    losses: list[float] = []
    steps = train_steps(model, optimizer, schedule, fresh_rows(), loss, grad_clip=recipe.grad_clip)
    with Progress(recipe.steps, title, "step") as bar:
        for step, _, found in steps:
            losses.append(float(found))
            if not math.isfinite(losses[-1]):
                raise UserError(f"the loss of training on the task is not finite at step {step}: lower --train-lr")
            bar.update()
    model.eval()
    return loss_curve(losses)
