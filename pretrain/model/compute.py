"""In which precision and with which device's code a part of the model computes. Imports no other part of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_assumed: str | None = None


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: for sums, softmaxes and losses of 16-bit models."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def device_type(x: Tensor) -> str:
    """``cpu`` or ``cuda``: the type of the device whose code suits ``x``, its own unless another one is assumed."""
    return _assumed or x.device.type


@contextmanager
def assume_device(device_type: str) -> Iterator[None]:
    """Run the code of such a device within the block.

    For tensors that have shapes and no values, and so no device of their own (``pretrain/planning/trace.py``).
    """
    global _assumed
    before, _assumed = _assumed, device_type
    try:
        yield
    finally:
        _assumed = before
