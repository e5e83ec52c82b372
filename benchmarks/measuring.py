"""Time of calls on a device, and the memory that a forward pass keeps for its backward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def seconds_to(device: torch.device, *stages: Callable[[], object]) -> list[float]:
    """Seconds from the start of the first stage to the end of each, run one after the other.

    On a GPU between events on its stream, after waiting for what was given to it before.
    """
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
        torch.cuda.synchronize(device)
        events[0].record()
        for stage, event in zip(stages, events[1:], strict=True):
            stage()
            event.record()
        torch.cuda.synchronize(device)
        return [events[0].elapsed_time(event) / 1000 for event in events[1:]]
    out = []
    began = time.perf_counter()
    for stage in stages:
        stage()
        out.append(time.perf_counter() - began)
    return out


def kept_bytes(forward: Callable[[], T], given: Iterable[Tensor]) -> tuple[T, int]:
    """(result of ``forward``, bytes of the storages that autograd keeps for the backward pass, each once).

    Storages of ``given`` are not counted: inputs, weights, what layers share.
    """
    known = {x.untyped_storage().data_ptr() for x in given}
    kept: dict[int, Any] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no later storage gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    return result, sum(storage.nbytes() for storage in kept.values())
