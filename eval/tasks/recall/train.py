"""Training on a recall task: AdamW on the questions of fresh rows, from the checkpoint or from random weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data_pipeline.errors import UserError
from eval.tasks.classification.finetune import autocast
from eval.tasks.recall.questions import TRAIN, Kind, generator
from eval.tasks.recall.score import states_at
from pretrain.config import OptimizerConfig
from pretrain.model.transformer import NystromformerLM
from pretrain.optim.optimizer import parameter_groups

CURVE_POINTS = 40


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
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, OptimizerConfig(weight_decay=0.01, betas=(0.9, 0.98))), lr=recipe.lr
    )
    warmup = max(recipe.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (recipe.steps - step) / max(recipe.steps - warmup, 1))
    )
    losses: list[float] = []
    for step in tqdm(range(recipe.steps), desc=title, unit="step", disable=None, leave=False):
        rng = generator(TRAIN, seed, step)
        cell = cells[int(rng.integers(len(cells)))]
        rows = kind.rows(cell, rng, max(1, recipe.batch_tokens // cell.length), training=True)
        with autocast(device, recipe.precision):
            # The head on the answers only: of a causal model's labels the model itself would compute all positions.
            states = states_at(model, rows.inputs, rows.at)
            logits = model.head(states.flatten(0, 1)).float()
        loss = F.cross_entropy(logits, torch.from_numpy(rows.right).to(device).flatten())
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise UserError(f"the loss of training on the task is not finite at step {step + 1}: lower --train-lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        optimizer.step()
        schedule.step()
    model.eval()
    edges = np.unique(np.linspace(0, len(losses), min(CURVE_POINTS, len(losses)) + 1).astype(int)).tolist()
    return [[high, float(np.mean(losses[low:high]))] for low, high in pairwise(edges)]
