"""How the memory of tensors comes from the system and goes back to it, on CPUs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

MMAP_THRESHOLD = 4 << 20
"""Bytes from which a block is returned to the system as soon as it is freed.

By default glibc raises this to 32 MiB, and smaller holes stay resident unless what comes next fits them. Causal, 4
layers of 384, fp32, 4 rows of 1,024 tokens, ``activation_checkpointing``: 0.70 GiB over the libraries by default, 0.41
with this, where 0.32 are in use (``python -m benchmarks.memory.heap``). A step takes 3.7 s and 4.5 s of processor time
then: returned pages have to be cleared anew. 1 MiB gives the same as 4; 8 MiB holds on to half of what 32 does.
"""
_M_MMAP_THRESHOLD = -3
VARIABLE = "MALLOC_MMAP_THRESHOLD_"


def return_freed_blocks() -> bool:
    """Have glibc return freed blocks of :data:`MMAP_THRESHOLD` bytes and more; returns whether it will.

    Nothing is done where the environment says ``MALLOC_MMAP_THRESHOLD_``, or where the C library has no such setting.
    """
    if VARIABLE in os.environ or sys.platform != "linux":
        return False
    with contextlib.suppress(AttributeError, OSError):
        return ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD) == 1
    return False


HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""PyTorch's own switch: tensors of 2 MiB and more ask Linux for pages of 2 MiB in place of 4 KiB."""


def use_huge_pages() -> None:
    """Have PyTorch ask for huge pages, unless the environment says otherwise. It reads this at its first tensor.

    glibc maps blocks above 32 MiB anew each time, and the logits of a step are such blocks. Linux clears them page by
    page as they are touched: 262,000 faults in a step of configs/imdb-clm.yaml, a quarter of its time, and 17,000 with
    huge pages. Many distributions give these to programs that ask for them (``madvise``). ``python -m
    benchmarks.memory.heap`` compares time and memory; docs/training.md has the numbers.
    """
    os.environ.setdefault(HUGE_PAGES, "1")
