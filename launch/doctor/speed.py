"""How fast devices multiply matrices and folders take and give bytes; each measurement ends after a few seconds."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.processes import available_cores

if TYPE_CHECKING:
    import torch

CPU_SIDE, QUICK_CPU_SIDE, SLOW_SIDE = 1536, 768, 256
"""Sides of a CPU's matrices. Where one of :data:`SLOW_SIDE` shows that a larger one would take too long it is kept."""
GPU_SIDE, QUICK_GPU_SIDE = 8192, 4096
REPETITIONS = 7
MATRIX_SECONDS, QUICK_MATRIX_SECONDS = 1.5, 0.3
"""For the repetitions of one precision on one device."""
WRITE_BYTES, QUICK_WRITE_BYTES = 128 << 20, 16 << 20
WRITE_SECONDS = 3.0
CHUNK = 4 << 20
MOST_FILES = 1000
"""Of a folder, among which the largest one is looked for."""


def matrix_speeds(devices: list[int] | None, quick: bool) -> list[dict[str, Any]]:
    """FLOP/s of products of square matrices: of the GPUs of these numbers, or of the CPU's allowed cores (None).

    Of a GPU the median of some repetitions, of a CPU the fastest.
    Each: ``device`` as a word, ``kind`` its model, ``speeds`` by precision: fp32, tf32 (GPUs), bf16, fp16 (GPUs).
    """
    import torch

    if devices is None:
        from pretrain.machine import cpu_name

        torch.set_num_threads(available_cores())
        cores = available_cores()
        kind = f"{cpu_name()}, {cores} cores"
        return [{"device": "cpu", "kind": kind, "speeds": _speeds(torch.device("cpu"), ("fp32", "bf16"), quick)}]
    out = []
    for number in devices:
        device = torch.device("cuda", number)
        speeds = _speeds(device, ("fp32", "tf32", "bf16", "fp16"), quick)
        out.append({"device": f"gpu {number}", "kind": torch.cuda.get_device_name(device), "speeds": speeds})
    return out


def _speeds(device: torch.device, precisions: tuple[str, ...], quick: bool) -> dict[str, float]:
    return {name: _speed(device, name, quick) for name in precisions}


def _speed(device: torch.device, precision: str, quick: bool) -> float:
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    seconds = QUICK_MATRIX_SECONDS if quick else MATRIX_SECONDS
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        with torch.inference_mode():
            if device.type == "cuda":
                side = QUICK_GPU_SIDE if quick else GPU_SIDE
            else:
                side = _cpu_side(dtype, QUICK_CPU_SIDE if quick else CPU_SIDE, seconds)
            times = _products(device, dtype, side, REPETITIONS, seconds)
            # Threads that wait for each other on a busy CPU take 20 times as long; the load is a finding of its own.
            return 2 * side**3 / (statistics.median(times) if device.type == "cuda" else min(times))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _cpu_side(dtype: torch.dtype, wanted: int, seconds: float) -> int:
    """``wanted``, or :data:`SLOW_SIDE` where three products of that side would take longer than ``seconds``."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small products on several threads wait for each other more than they compute
    try:
        taken = min(_products(torch.device("cpu"), dtype, SLOW_SIDE, 3, seconds))
    finally:
        torch.set_num_threads(threads)
    return wanted if 3 * taken * (wanted / SLOW_SIDE) ** 3 / threads < seconds else SLOW_SIDE


def _products(device: torch.device, dtype: torch.dtype, side: int, repetitions: int, seconds: float) -> list[float]:
    """Seconds of each product, after one that warms up; at least one."""
    import torch

    # Ordinary values: a GPU multiplies zeros with less power, and so faster than anything real.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    wait: Callable[[], object] = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    times: list[float] = []
    end = time.monotonic() + seconds
    for _ in range(repetitions + 1):
        wait()
        began = time.perf_counter()
        torch.mm(a, b)
        wait()
        times.append(time.perf_counter() - began)
        if time.monotonic() > end:
            break
    return times[1:] or times


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def write_speed(folder: Path, quick: bool) -> dict[str, Any]:
    """Write a file that has no name any more and have the disk take it (fsync): ``speed`` in bytes/s, or ``error``.

    Written is in ``folder``, or in the nearest above it that exists (``path``). ``sync`` is how long the last fsync
    took, in seconds.
    """
    path = existing(folder)
    out: dict[str, Any] = {"path": str(path)}
    block, size, written = os.urandom(CHUNK), QUICK_WRITE_BYTES if quick else WRITE_BYTES, 0
    file = path / f".nystrom-doctor-{os.uname().nodename}-{os.getpid()}-{time.time_ns()}"
    try:
        with file.open("xb", buffering=0) as stream:
            with contextlib.suppress(OSError):  # SMB refuses it
                file.unlink()  # it lives while it is open, so nothing stays of it however this process ends
            began = time.monotonic()
            while written < size and time.monotonic() - began < WRITE_SECONDS:
                written += stream.write(block)
            syncing = time.monotonic()
            os.fsync(stream.fileno())
            out |= {"speed": written / (time.monotonic() - began), "sync": time.monotonic() - syncing}
    except OSError as error:
        out["error"] = error.strerror or str(error)
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    return out


def read_speed(folder: Path, quick: bool) -> dict[str, Any]:
    """Read the largest file of ``folder``, past what the system has in memory of it: ``speed`` or ``error``."""
    out: dict[str, Any] = {"path": str(folder)}
    size, got = QUICK_WRITE_BYTES if quick else WRITE_BYTES, 0
    try:
        files = list(itertools.islice((path for path in folder.rglob("*") if path.is_file()), MOST_FILES))
        file = max(files, key=lambda path: path.stat().st_size, default=None)
        if file is None:
            return {**out, "error": "there is no file in it"}
        with file.open("rb", buffering=0) as stream:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.monotonic()
            while got < size and time.monotonic() - began < WRITE_SECONDS and (part := stream.read(CHUNK)):
                got += len(part)
            out["speed"] = got / max(time.monotonic() - began, 1e-9)
    except OSError as error:
        out["error"] = error.strerror or str(error)
    return out
