"""Time of forward and backward, interleaved, and memory kept in between."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measuring import kept_bytes, seconds_to

MIN_ROUNDS, MAX_ROUNDS = 3, 1000

# Large enough to run at full speed, small enough to take no time: 0.02 TFLOP and 1 TFLOP.
_PEAK_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass
class Case:
    """A function whose forward and backward are timed."""

    name: str
    forward: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    """What ``forward`` is called with."""
    weights: tuple[Tensor, ...] = ()
    """Further tensors that get a gradient."""
    constants: tuple[Tensor, ...] = ()
    """Not counted as kept."""
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    gradients: tuple[Tensor, ...] = ()
    """Of the outputs; left out: drawn at the first backward pass."""

    def outputs(self) -> tuple[Tensor, ...]:
        """The forward pass."""
        out = self.forward(*self.inputs)
        return out if isinstance(out, tuple) else (out,)

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of inputs and weights, which is what is timed. A weight that nothing was computed
        from, as gamma inside the window, gets None."""
        if not self.gradients:
            self.gradients = tuple(torch.randn(x.shape, device=x.device).to(x.dtype) for x in outputs)
        return torch.autograd.grad(outputs, (*self.inputs, *self.weights), self.gradients, allow_unused=True)


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    forward: list[float]
    total: list[float]


def interleave(
    cases: Sequence[Case], device: torch.device, *, rounds: int | None = None, seconds: float = 0.0
) -> dict[str, Times]:
    """Time the cases in rounds: each once in a round, in an order drawn anew. A slow spell of the machine then falls on
    all of them, and no case always follows the same one. ``rounds`` of them, or as many as fit into ``seconds`` (at
    least 3). Cases must have run once before."""
    order, shuffle = list(cases), random.Random(0)
    times = {case.name: Times([], []) for case in cases}
    gc.collect()
    gc.disable()  # no collection in the middle of a sample
    try:
        started, done = time.perf_counter(), 0
        while order and not _enough(done, time.perf_counter() - started, rounds, seconds):
            shuffle.shuffle(order)
            for case in order:
                forward, total = _time(case, device)
                times[case.name].forward.append(forward)
                times[case.name].total.append(total)
            done += 1
    finally:
        gc.enable()
    return times


def _enough(done: int, elapsed: float, rounds: int | None, seconds: float) -> bool:
    if rounds is not None:
        return done >= rounds
    return done >= MAX_ROUNDS or (done >= MIN_ROUNDS and elapsed >= seconds)


def _time(case: Case, device: torch.device) -> tuple[float, float]:
    """Seconds of the forward pass, and of both passes."""
    outputs: tuple[Tensor, ...] = ()

    def forward() -> None:
        nonlocal outputs
        outputs = case.outputs()

    with case.context():
        first, both = seconds_to(device, forward, lambda: case.backward(outputs))
    return first, both


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    kept: int
    """Of the storages that the forward pass keeps for the backward pass, without inputs, weights and what layers
    share."""
    peak: int | None
    """Largest allocation during both above what was there before; GPU only."""


def memory(case: Case, device: torch.device) -> Memory:
    """Run once, and count. Also the warm-up: nothing here is timed."""
    with case.context():
        outputs, count = kept_bytes(case.outputs, (*case.inputs, *case.weights, *case.constants))
        case.backward(outputs)
        if device.type != "cuda":
            return Memory(count, None)
        del outputs
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        case.backward(case.outputs())
        torch.cuda.synchronize(device)
        return Memory(count, torch.cuda.max_memory_allocated(device) - before)


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best of five large square matrix products, after one to warm up."""
    size = _PEAK_SIZE["cuda" if device.type == "cuda" else "cpu"]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(seconds_to(device, lambda: a @ b)[0] for _ in range(6))
    return 2 * size**3 / best
