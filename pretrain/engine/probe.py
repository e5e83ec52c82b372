"""Does the run fit into memory? Found out before its first step, at the shapes that need most.

A curriculum starts with short rows; without this its last stage may run out of memory days later.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from data_pipeline.batches import IGNORE
from data_pipeline.batches.order import Plan
from data_pipeline.errors import UserError
from pretrain.config import RunConfig
from pretrain.distributed import randomness
from pretrain.distributed.world import World, peak_memory_gib
from pretrain.engine.training import TrainingEngine


@dataclass(frozen=True)
class ProbeResult:
    """What the trial of the longest rows took."""

    shapes: tuple[tuple[int, int], ...]
    """(rows, length) of the micro-batches that were tried."""
    memory_gib: float
    """Peak of the process that needed most; see :func:`pretrain.distributed.world.peak_memory_gib`."""
    seconds: float

    def sentence(self) -> str:
        """For somebody who watches the run start."""
        shapes = " and ".join(f"{rows} x {length}" for rows, length in self.shapes)
        return (
            f"The longest rows ({shapes}) fit: {self.memory_gib:.1f} GiB a process at the peak, {self.seconds:.1f} s."
        )


def run_probe(engine: TrainingEngine, config: RunConfig, plan: Plan, world: World, tokens: int = 0) -> ProbeResult:
    """One forward and backward pass at the shapes that need most of what is to come after ``tokens`` tokens.

    All processes must call it, before their first step. It leaves no trace: the loss is multiplied by 0, so that exact
    zeros are added to the first step's gradients, and the generators are put back. Raises :class:`UserError`, on all
    processes where none of them waits for another (ZeRO stages 0 and 1) and else on those that ran out, if memory does
    not suffice.
    """
    began = time.monotonic()
    stages = _demanding_stages(config, plan, world.world_size, tokens)
    engine.train()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    # The optimizer's moments are made in the first step: their memory must not be given to activations.
    reserved = torch.zeros(engine.missing_state_bytes(), dtype=torch.uint8, device=engine.state_device)
    reserved.fill_(1)  # a page that was never written to is no memory on a CPU
    with randomness.preserved():
        for stage, (rows, length) in stages.items():
            _try_shape(engine, config, world, stage, rows, length)
    del reserved
    engine.take_added_sums()
    peak = max(world.gather(peak_memory_gib(world.device)))
    return ProbeResult(tuple(stages.values()), peak, time.monotonic() - began)


def _demanding_stages(config: RunConfig, plan: Plan, world_size: int, tokens: int) -> dict[int, tuple[int, int]]:
    """(rows, length) of a micro-batch of the longest stage, and of the one with most tokens in it, by stage."""
    shapes = {
        i: (min(config.curriculum[i].micro_batch, stage.rows // world_size), stage.seq_len)
        for i, stage in enumerate(plan.stages)
        if stage.end_tokens > tokens or i == len(plan.stages) - 1
    }
    longest = max(shapes, key=lambda i: (shapes[i][1], shapes[i][0]))
    largest = max(shapes, key=lambda i: (shapes[i][0] * shapes[i][1], i == longest))
    return {i: shapes[i] for i in dict.fromkeys((longest, largest))}


def _try_shape(engine: TrainingEngine, config: RunConfig, world: World, stage: int, rows: int, length: int) -> None:
    # Any tokens do; these take nothing from a generator.
    assert config.model.vocab_size is not None
    position = torch.arange(rows * length, device=world.device)
    input_ids = (position * 7919 % config.model.vocab_size).view(rows, length)
    labels = input_ids.roll(-1, dims=1)
    if config.model.objective == "mlm":
        rate = config.curriculum[stage].masking_rate or config.data.masking.rate
        target = (position * rate).floor() != ((position + 1) * rate).floor()
        labels = torch.where(target.view(rows, length), input_ids, IGNORE)
    error = None
    try:
        engine.backward(input_ids, labels, 0.0)
    except RuntimeError as failure:
        if not _is_out_of_memory(failure):
            raise
        error = _advice(config, stage, rows, length, failure)
        if engine.zero_stage >= 2:
            # Others may wait for this process within their backward pass; they end as soon as it is gone.
            raise UserError(error) from None
    errors = [message for message in world.gather(error) if message]
    if errors:
        raise UserError(errors[0])


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _advice(config: RunConfig, stage: int, rows: int, length: int, error: RuntimeError) -> str:
    remedies = [f"a smaller curriculum.{stage}.micro_batch"] if rows > 1 else []
    if not config.activation_checkpointing:
        remedies.append("activation_checkpointing: true")
    if config.zero_stage < 3:
        remedies.append(f"zero_stage {config.zero_stage + 1}" + (" or more" if config.zero_stage < 2 else ""))
    if not config.offload_optimizer and config.zero_stage:
        remedies.append("offload_optimizer: true")
    remedies.append("more processes" if config.zero_stage else "a smaller model")
    return (
        f"stage {stage} of the curriculum does not fit into memory: {rows} rows of {length} tokens at a time "
        f"(curriculum.{stage}.micro_batch {config.curriculum[stage].micro_batch}). Use {', '.join(remedies)}. "
        f"({str(error).strip().splitlines()[0]})"
    )
