"""Time of several functions in turn, and the most memory that one holds."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.planning.trace import LiveBytes


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        """Of at least one value."""
        q1, median, q3 = np.quantile(np.asarray(sample, dtype=np.float64), [0.25, 0.5, 0.75])
        return cls(float(median), float(q1), float(q3))

    @classmethod
    def of_ratios(cls, own: Sequence[float], other: Sequence[float]) -> Spread:
        """Of the ratios within each round: a slow spell of the machine falls on both."""
        return cls.of([a / b for a, b in zip(own, other, strict=True)])


def interleave(
    cases: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of each case in each round, everything that was given to the device waited for.

    A round runs each case once, in an order drawn anew, so that a slow spell of the machine falls on all of them and no
    case always follows the same one. Cases must have run once before.
    """
    order, shuffle = list(cases), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # no collection in the middle of a sample
    try:
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                _wait(device)
                began = time.perf_counter()
                cases[name]()
                _wait(device)
                seconds[name].append(time.perf_counter() - began)
    finally:
        if collecting:
            gc.enable()
    return seconds


def peak_memory(work: Callable[[], object], device: torch.device, given: Sequence[Tensor]) -> int:
    """Bytes that ``work`` holds at its fullest, beyond the weights and inputs ``given``.

    On a GPU by ``torch.cuda.max_memory_allocated``. On a CPU by counting every tensor from its making to its end; what
    kernels take for themselves is not a tensor and not counted. Forward and backward passes of both kinds of models
    came to the same as the events of PyTorch's CPU allocator (torch.profiler), within 1e-5.
    """
    if device.type != "cuda":
        with LiveBytes() as live:
            live.ignore(list(given))
            work()
        return live.take_peak()
    work()  # libraries' workspaces, once
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
