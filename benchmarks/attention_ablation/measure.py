"""Time of a training step, all forms interleaved, and the memory of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from benchmarks.attention_ablation.tasks import Examples
from benchmarks.attention_ablation.training import TrainStep
from benchmarks.measuring import kept_bytes
from eval.tasks.efficiency.measure import interleave

KEPT = "tensors kept for the backward pass"
PEAK = "largest allocation in forward and backward, weights and gradients included"


@dataclass(frozen=True)
class Memory:
    """``kind`` says of what: :data:`KEPT` or :data:`PEAK`."""

    bytes: int
    kind: str


def memory(step: TrainStep, batch: Examples) -> Memory:
    """Of one forward and backward pass; the gradients are dropped.

    On a CPU the storages that autograd keeps, each once and without the weights' own (what the process holds would
    depend on the allocator and on what ran before); on a GPU the allocator's peak.
    """
    device = torch.device(step.recipe.device)
    if device.type == "cuda":
        step.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step.loss(batch).backward()
        torch.cuda.synchronize(device)
        result = Memory(torch.cuda.max_memory_allocated(device), PEAK)
    else:
        loss, kept = kept_bytes(lambda: step.loss(batch), step.model.parameters())
        result = Memory(kept, KEPT)
        loss.backward()
    step.optimizer.zero_grad(set_to_none=True)
    return result


@dataclass(frozen=True)
class StepTime:
    """Medians over rounds."""

    seconds: float
    ratio: float
    """To the baseline's step of the same round."""


def interleaved(steps: Mapping[str, TrainStep], batch: Examples, baseline: str, rounds: int) -> dict[str, StepTime]:
    """Time a training step of every model in turns; a first round is not counted.

    The learning rate is 0: weights stay as they are.
    """
    cases = {name: partial(step, batch, 0.0) for name, step in steps.items()}
    device = torch.device(steps[baseline].recipe.device)
    seconds = {name: own[1:] for name, own in interleave(cases, device, rounds + 1).items()}
    return {
        name: StepTime(median(own), median(a / b for a, b in zip(own, seconds[baseline], strict=True)))
        for name, own in seconds.items()
    }
