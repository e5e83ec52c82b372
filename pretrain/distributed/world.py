"""This process among the others: rank, device, threads, process group, and the few collectives of the control plane."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from data_pipeline.errors import UserError
from data_pipeline.processes import available_cores
from pretrain.distributed.rendezvous import rendezvous
from pretrain.distributed.signals import StopFlag
from pretrain.distributed.watchdog import Watchdog, group_timeout
from pretrain.heap import use_huge_pages

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """Where this process stands: ``rank`` of ``world_size``, ``local_rank`` of ``local_size`` on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes for all."""
        return self.rank == 0


def read_rank(local_rank: int | None = None) -> Rank:
    """Read RANK, WORLD_SIZE, LOCAL_RANK (and the machine's share, LOCAL_SIZE or LOCAL_WORLD_SIZE) from the environment.

    Without them this is a single process. ``local_rank`` is what DeepSpeed's launcher passes on the command line.
    Raises :class:`UserError` if they are incomplete or contradict each other.
    """
    env = os.environ
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return Rank()
    try:
        rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        local = int(env.get("LOCAL_RANK", -1 if local_rank is None else local_rank))
        local_size = int(env.get("LOCAL_SIZE") or env.get("LOCAL_WORLD_SIZE") or (world_size if local == rank else 1))
    except KeyError as error:
        raise UserError(f"the environment has one of RANK and WORLD_SIZE but not {error}: set both, or none") from None
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE, LOCAL_RANK must be whole numbers: {error}") from None
    if not 0 <= rank < world_size:
        raise UserError(f"RANK {rank} does not fit WORLD_SIZE {world_size}")
    if local < 0:
        raise UserError(
            "RANK and WORLD_SIZE are set but LOCAL_RANK is not: start through `nystrom launch`, deepspeed or torchrun"
        )
    if world_size > 1:
        if not (env.get("MASTER_ADDR") and env.get("MASTER_PORT")):
            raise UserError("WORLD_SIZE is above 1 but MASTER_ADDR or MASTER_PORT is not set")
        port = env["MASTER_PORT"]
        if not (port.isdecimal() and 0 < int(port) < 1 << 16):
            raise UserError(f"MASTER_PORT is {port!r}: it must be the number of a port, 1 to 65535")
    return Rank(rank, world_size, local, local_size)


def quiet_libraries() -> None:
    """Keep DeepSpeed's and torch's notes for developers out of a user's terminal; errors still come through."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


class World:
    """The process group and the device of this process; every collective of the control plane goes through it."""

    def __init__(
        self,
        rank: Rank,
        stall_seconds: float = 1800.0,
        stop: StopFlag | None = None,
        *,
        rendezvous_seconds: float | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        """Choose the device and threads and join the process group: NCCL on GPUs, gloo on CPUs.

        From here on a watchdog ends this process when the run stands still for ``stall_seconds``. The others are waited
        for as long to come, or ``rendezvous_seconds``. Then ``facts`` must be the same on all (see :func:`rendezvous`).

        Threads: cores of this process's machine divided by the processes on it, unless OMP_NUM_THREADS says otherwise.
        PyTorch's default, all cores for every process, has them fight: two threads where one core was free took 2 to 5
        times as long as one thread for a small model.
        """
        import torch
        import torch.distributed as dist

        use_huge_pages()
        self.rank, self.world_size, self.local_rank = rank.rank, rank.world_size, rank.local_rank
        self.is_first = rank.is_first
        if not os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(max(1, available_cores() // rank.local_size))
        if torch.cuda.is_available():
            if rank.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"process {rank.local_rank} of this machine has no GPU of its own: there are "
                    f"{torch.cuda.device_count()}; start at most that many processes"
                )
            self.device = torch.device("cuda", rank.local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        # DeepSpeed reads these even for one process, where its alternative is to look for MPI.
        for name, value in {
            "RANK": 0,
            "WORLD_SIZE": 1,
            "LOCAL_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 0,
        }.items():
            os.environ.setdefault(name, str(value))
        self.timeout = group_timeout(stall_seconds)
        self.watchdog = Watchdog(rank.rank, rank.world_size, stall_seconds, stop, local_rank=rank.local_rank)
        if rank.world_size == 1:
            # A store in memory: no port to find, none to collide with.
            store: dist.Store = dist.HashStore()
            self.watchdog.start(None)
        else:
            hello = self.watchdog.record()
            patience = stall_seconds if rendezvous_seconds is None else rendezvous_seconds
            store = rendezvous(rank.rank, rank.world_size, patience, self.timeout, hello, stop, facts)
            self.watchdog.start(store)
        dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.world_size, timeout=self.timeout)
        # Counts, flags and small objects do not belong on the GPU: there they would wait for its queue.
        self._group = dist.new_group(backend="gloo", timeout=self.timeout) if backend != "gloo" else None

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all processes, in float64 (exact for counts up to 2^53; a NaN stays one)."""
        if self.world_size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        return tensor.tolist()

    def broadcast(self, value: T) -> T:
        """The first process's value, on every process."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        box: list[Any] = [value if self.is_first else None]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, on every process."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum([0.0])

    def close(self) -> None:
        """Leave the process group."""
        import torch.distributed as dist

        self.watchdog.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def run_on_first(world: World, decide: Any) -> Any:
    """Run ``decide()`` on the first process only; everybody gets its result, or its :class:`UserError`."""
    result: Any = None
    error: str | None = None
    if world.is_first:
        try:
            result = decide()
        except UserError as failure:
            error = str(failure)
    result, error = world.broadcast((result, error))
    if error is not None:
        raise UserError(error)
    return result


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated by PyTorch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
