"""One process of one case: ``python -m benchmarks.memory.worker NAME WAY STEPS``, its rank from the environment; prints
a JSON line. WAY is ``allocated``, ``resident``, ``kept``, ``returned`` or ``huge``."""

from __future__ import annotations

import json
import operator
import os
import resource
import sys
import time
from dataclasses import replace
from typing import Any

import psutil
import torch

from benchmarks.memory.cases import CASES, Case
from data_pipeline.batches import IGNORE
from pretrain.distributed.world import World, quiet_libraries, read_rank
from pretrain.engine.training import TrainingEngine
from pretrain.heap import VARIABLE, return_freed_blocks
from pretrain.planning.memory import typical_documents


def main() -> None:
    """Train for some steps and say how much memory that took at its fullest."""
    name, what, steps = sys.argv[1:]
    case = next(case for case in CASES if case.name == name)
    quiet_libraries()
    world = World(read_rank(None))
    if world.device.type == "cuda":
        train(tiny(case), world, 1)  # the libraries' own memory, once
        torch.cuda.reset_peak_memory_stats(world.device)
        took = train(case, world, int(steps))
        found = torch.cuda.max_memory_allocated(world.device)
    elif what != "allocated":
        if what in ("kept", "huge"):
            os.environ[VARIABLE] = (
                "131072"  # a run leaves the heap alone then; the C library reads it at its start only
            )
        if what == "returned":
            return_freed_blocks()
        train(tiny(case), world, 1)  # everything is imported and every library has its own memory
        before = psutil.Process().memory_info().rss
        took = train(case, world, int(steps))
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    else:
        torch.distributed.all_reduce = released(torch.distributed.all_reduce)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            took = train(case, world, int(steps))
        found = allocated_peak(profile)
    if world.is_first:
        print(json.dumps({"bytes": found, "processor_seconds": took}), flush=True)
    world.close()


def tiny(case: Case) -> Case:
    """The same with next to no memory."""
    small = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 100}
    block = {"zero_optimization": {"reduce_bucket_size": 1000}}
    return replace(case, model={**case.model, **small}, rows=1, length=512, more={**case.more, "deepspeed": block})


def train(case: Case, world: World, steps: int) -> float:
    """Steps on random tokens with as many targets as are to be expected; processor seconds of the last one."""
    config = case.config()
    engine = TrainingEngine(config, world)
    engine.train()
    generator = torch.Generator().manual_seed(world.rank)
    shape = (case.rows * case.micro_batches, case.length)
    documents = None
    if config.data.packing == "documents":
        documents = document_ids(case)
    began = time.process_time()
    for _ in range(steps):
        began = time.process_time()
        ids = torch.randint(0, config.model.vocab_size or 1, shape, generator=generator)
        labels = ids.clone()
        if config.model.objective == "mlm":
            hidden = round((1 - config.data.masking.rate) * case.rows * case.length)
            for part in labels.split(case.rows):
                part.view(-1)[torch.randperm(part.numel(), generator=generator)[:hidden]] = IGNORE
        ids, labels = ids.to(world.device), labels.to(world.device)
        for some_ids, some_labels in zip(ids.split(case.rows), labels.split(case.rows), strict=True):
            engine.backward(some_ids, some_labels, 1e-4, documents)
        engine.step(1e-4)
    took = time.process_time() - began
    engine.close()
    return took


def document_ids(case: Case) -> torch.Tensor:
    """(rows, length) of the documents that are predicted for rows whose documents are not known."""
    layout = typical_documents(case.rows, case.length)
    assert layout.lengths is not None
    ids = torch.repeat_interleave(torch.arange(len(layout.lengths)), torch.from_numpy(layout.lengths))
    return ids.view(case.rows, case.length)


def released(all_reduce: Any) -> Any:
    """The same, once gloo's own thread has let go of the tensor.

    Where that thread is late, the tensor is freed there, which PyTorch's profiler does not see: the 26 MiB that all
    gradients of ``mlm-fp32-checkpointing`` are reduced in were counted to the end in 1 of 12 runs on one core.
    """
    uses = operator.methodcaller("_use_count")

    def run(tensor: torch.Tensor, *more: Any, **named: Any) -> Any:
        before = uses(tensor)
        work = all_reduce(tensor, *more, **named)
        while work is None and uses(tensor) > before:
            time.sleep(1e-4)
        return work

    return run


def allocated_peak(profile: Any) -> int:
    """The most bytes that PyTorch's CPU allocator had given out since the profile began."""
    events, most = list(profile.profiler.kineto_results.experimental_event_tree()), 0
    while events:
        event = events.pop()
        events.extend(event.children)
        if hasattr(event.extra_fields, "alloc_size"):
            most = max(most, event.extra_fields.total_allocated)
    return most


if __name__ == "__main__":
    main()
