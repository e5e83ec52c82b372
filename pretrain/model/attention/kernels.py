"""Which device's code to run, where the model has more than one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_assumed: str | None = None


def kernels_for(x: Tensor) -> str:
    """The type of the device whose code suits ``x``: its own, unless another one is assumed."""
    return _assumed or x.device.type


@contextmanager
def assume_device(device_type: str) -> Iterator[None]:
    """Run what would run on such a device: for tensors that have shapes and no values, and so none of their own
    (``pretrain/planning/trace.py``)."""
    global _assumed
    before, _assumed = _assumed, device_type
    try:
        yield
    finally:
        _assumed = before
