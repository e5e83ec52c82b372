"""A running average of the weights."""

from __future__ import annotations

from typing import Any

import torch

AVERAGE = "ema"
"""Name of the average in the optimizer's state, and hence in the files of a checkpoint."""


class WeightAverage:
    """Exponential moving average of the weights (Polyak & Juditsky 1992; Tarvainen & Valpola 2017, eq. 2).

    After each optimizer step every weight p changes its average to ``a <- decay * a + (1 - decay) * p``; the average
    starts from the weights before the first step. It lives in the optimizer's state, beside the moments, as float32
    values of the master weights: so it is partitioned, offloaded, saved and loaded with them by whatever ZeRO stage
    does that, and nothing else has to know of it.

    A step that is skipped does not move it: DeepSpeed does not call the optimizer then, and at stage 0 the dropped
    gradients are None. It works through PyTorch's hooks around ``step`` and not by a class of its own, because ZeRO's
    list of known optimizers is a list of exact types.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self._decay = decay
        self._starts: dict[torch.Tensor, torch.Tensor] = {}
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Not into the state yet: AdamW takes a parameter whose state is not empty for one that it knows.
        self._starts = {p: p.detach().clone() for p in _moving(optimizer) if AVERAGE not in optimizer.state.get(p, {})}

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = _moving(optimizer)
        for p in params:
            if p in self._starts:
                optimizer.state[p][AVERAGE] = self._starts.pop(p)
        self._starts = {}
        if params:
            torch._foreach_lerp_([optimizer.state[p][AVERAGE] for p in params], params, 1 - self._decay)


def forget_average(optimizer: torch.optim.Optimizer) -> None:
    """Drop the average from the state, for a run that goes on without it."""
    for state in optimizer.state.values():
        state.pop(AVERAGE, None)


def _moving(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
