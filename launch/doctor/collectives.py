"""All-reduce by size, and pairs, through the backend that training takes: NCCL on GPUs, else gloo."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

MOST = 20
"""Repetitions of a size, after one that warms up."""
PAIR_BYTES = 64 << 20
PAIR_REPETITIONS = 5


class Group:
    """A process group of the meeting's members, on this process's GPU or CPU."""

    def __init__(
        self, store: dist.Store, index: int, size: int, local_rank: int, interface: str | None, seconds: float
    ) -> None:
        """Join; ``interface`` is for gloo and NCCL where the environment names none."""
        import torch
        import torch.distributed as dist

        self.index, self.size = index, size
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        if interface:
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, interface)
        self.backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            self.backend,
            store=dist.PrefixStore("doctor's group", store),
            rank=index,
            world_size=size,
            timeout=timedelta(seconds=seconds),
        )

    def all_reduce(self, sizes: Sequence[int], budget: float) -> list[dict[str, Any]]:
        """``bytes``, ``seconds`` (median) and ``bus`` (bytes/s) of each size; must be called alike on all.

        Ends before a size that would take longer than ``budget`` seconds, by what the one before took. The bus speed is
        2 (n - 1) / n times bytes over seconds, which n processes share alike whatever their number (nccl-tests).
        """
        import torch

        out: list[dict[str, Any]] = []
        for size in sorted(sizes):
            if out and size / out[-1]["bytes"] * out[-1]["seconds"] > budget and size > 1 << 20:
                break
            tensor = torch.zeros(max(1, size // 4), dtype=torch.float32, device=self.device)
            self._reduce(tensor)
            # All must agree how often: the slowest one's time decides.
            first = self._largest(self._reduce(tensor))
            times = [self._reduce(tensor) for _ in range(max(1, min(MOST, int(budget / max(first, 1e-6)))))]
            seconds = self._largest(statistics.median(times))
            out.append({"bytes": size, "seconds": seconds, "bus": 2 * (self.size - 1) / self.size * size / seconds})
        return out

    def _reduce(self, tensor: torch.Tensor) -> float:
        import torch.distributed as dist

        self._wait()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        self._wait()
        return time.perf_counter() - began

    def _largest(self, seconds: float) -> float:
        import torch
        import torch.distributed as dist

        value = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return float(value.item())

    def pairs(self, rounds: Sequence[Sequence[Sequence[int]]]) -> list[dict[str, Any]]:
        """Bytes/s that each two processes exchange there and back, of the pairs whose first process this is."""
        import torch
        import torch.distributed as dist

        tensor = torch.zeros(PAIR_BYTES // 4, dtype=torch.float32, device=self.device)
        out = []
        for pairs in rounds:
            for a, b in pairs:
                if self.index not in (a, b):
                    continue
                times = []
                for _ in range(PAIR_REPETITIONS + 1):
                    self._wait()
                    began = time.perf_counter()
                    for source, target in ((a, b), (b, a)):
                        if self.index == source:
                            dist.send(tensor, target)
                        else:
                            dist.recv(tensor, source)
                    self._wait()
                    times.append(time.perf_counter() - began)
                if self.index == a:
                    out.append({"a": a, "b": b, "speed": 2 * PAIR_BYTES / statistics.median(times[1:])})
        return out

    def _wait(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leave the group."""
        import torch.distributed as dist

        dist.destroy_process_group()
