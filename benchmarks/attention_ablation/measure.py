"""Time of a training step, all forms interleaved, and the memory of one."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_ablation.tasks import Examples
from benchmarks.attention_ablation.training import TrainStep

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
        weights = {parameter.untyped_storage().data_ptr() for parameter in step.model.parameters()}
        kept: dict[int, Any] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage  # held, so that no later storage gets its address
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = step.loss(batch)
        result = Memory(sum(storage.nbytes() for storage in kept.values()), KEPT)
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
    """Time a training step of every model, each once in a round and in an order drawn anew, so that a slow spell of the
    machine falls on all of them. A first round is not counted. The learning rate is 0: weights stay."""
    order, shuffle = list(steps), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()  # no collection in the middle of a sample
    try:
        for _ in range(rounds + 1):
            shuffle.shuffle(order)
            for name in order:
                began = time.perf_counter()
                steps[name](batch, 0.0)
                seconds[name].append(time.perf_counter() - began)
    finally:
        gc.enable()
    return {
        name: StepTime(median(own[1:]), median(a / b for a, b in zip(own[1:], seconds[baseline][1:], strict=True)))
        for name, own in seconds.items()
    }
