"""One process of one case: ``python -m benchmarks.memory.worker NAME {allocated,resident}``, its rank from the
environment; prints a JSON line."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import replace
from typing import Any

import psutil
import torch

from benchmarks.memory.cases import CASES, Case
from data_pipeline.batches import IGNORE
from pretrain.distributed.world import World, quiet_libraries, read_rank
from pretrain.engine.training import TrainingEngine
from pretrain.planning.memory import typical_documents

STEPS = 3
"""The optimizer's state is made in the first."""


def main() -> None:
    """Train for some steps and say how much memory that took at its fullest."""
    name, what = sys.argv[1:]
    case = next(case for case in CASES if case.name == name)
    quiet_libraries()
    world = World(read_rank(None))
    if world.device.type == "cuda":
        train(tiny(case), world, 1)  # the libraries' own memory, once
        torch.cuda.reset_peak_memory_stats(world.device)
        train(case, world, STEPS)
        found = torch.cuda.max_memory_allocated(world.device)
    elif what == "resident":
        train(tiny(case), world, 1)  # everything is imported and every library has its own memory
        before = psutil.Process().memory_info().rss
        train(case, world, STEPS - 1)
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            train(case, world, STEPS)
        found = allocated_peak(profile)
    if world.is_first:
        print(json.dumps({"bytes": found}), flush=True)
    world.close()


def tiny(case: Case) -> Case:
    """The same with next to no memory."""
    small = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 100}
    block = {"zero_optimization": {"reduce_bucket_size": 1000}}
    return replace(case, model={**case.model, **small}, rows=1, length=512, more={**case.more, "deepspeed": block})


def train(case: Case, world: World, steps: int) -> None:
    """Steps on random tokens with as many targets as are to be expected."""
    config = case.config()
    engine = TrainingEngine(config, world)
    engine.train()
    generator = torch.Generator().manual_seed(world.rank)
    shape = (case.rows * case.micro_batches, case.length)
    documents = None
    if config.data.packing == "documents":
        documents = document_ids(case)
    for _ in range(steps):
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
    engine.close()


def document_ids(case: Case) -> torch.Tensor:
    """(rows, length) of the documents that are predicted for rows whose documents are not known."""
    layout = typical_documents(case.rows, case.length)
    assert layout.lengths is not None
    ids = torch.repeat_interleave(torch.arange(len(layout.lengths)), torch.from_numpy(layout.lengths))
    return ids.view(case.rows, case.length)


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
