"""Time of forward and backward, interleaved, and memory kept in between."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    """Time the cases in rounds: each once in a round, in an order drawn anew, so that a slow spell of the machine falls
    on all of them and no case always follows the same one. ``rounds`` of them, or as many as fit into ``seconds`` (at
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
    """Seconds of the forward pass and of both; on a GPU between events on its stream, after waiting for it."""
    with case.context():
        if device.type == "cuda":
            start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            torch.cuda.synchronize(device)
            start.record()
            outputs = case.outputs()
            middle.record()
            case.backward(outputs)
            end.record()
            torch.cuda.synchronize(device)
            return start.elapsed_time(middle) / 1000, start.elapsed_time(end) / 1000
        began = time.perf_counter()
        outputs = case.outputs()
        between = time.perf_counter()
        case.backward(outputs)
        return between - began, time.perf_counter() - began


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
    given = {x.untyped_storage().data_ptr() for x in (*case.inputs, *case.weights, *case.constants)}
    kept: dict[int, Any] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage  # held, so that no later storage gets its address
        return x

    with case.context():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs = case.outputs()
        count = sum(storage.nbytes() for storage in kept.values())
        case.backward(outputs)
        if device.type != "cuda":
            return Memory(count, None)
        kept.clear()
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
    case = Case("matmul", lambda: a @ b, ())
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            case.outputs()
            end.record()
            torch.cuda.synchronize(device)
            best = min(best, start.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            case.outputs()
            best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
