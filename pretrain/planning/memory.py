"""The memory that one process needs at its fullest moment, part by part."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pretrain.config import RunConfig, StageConfig
from pretrain.curriculum.plan import build_plan, check_world_size
from pretrain.curriculum.stages import stage_model
from pretrain.model.attention.layout import Layout
from pretrain.model.config import ModelConfig
from pretrain.planning.state import MASTER, Group, StateBytes, Zero, parameter_sizes, state_bytes
from pretrain.planning.trace import Trace, trace_micro_batch

NORM_WIDTH = 8
"""The norm of each gradient is taken in float64, by DeepSpeed and at stage 0 by :class:`StepGuard`."""
TOKEN_BYTES = 16
"""Of an input and its label, int64 both."""
STAGE_0_BUCKET = 500_000_000
"""Elements that DeepSpeed 0.19.8 reduces at a time at stage 0, whatever the configuration says."""
STAGE_3_SUB_GROUP = 1_000_000_000
"""Elements that it updates at a time at stage 3."""
SHORTEST_SHARE = 64
"""Where documents are not known, the shortest one is a row's length divided by this."""
LIBRARIES = 450_000_000
"""Bytes of a process that has imported Python, PyTorch and DeepSpeed and trained next to nothing. Measured: 443 MB
without a GPU. CUDA's libraries add to it."""
HEAP, RETURNED = 1.7, 1.4
"""On a CPU, resident bytes for each one that comes and goes in a step: glibc keeps freed blocks of up to 32 MiB that
nothing else fits, and huge pages are taken whole. Measured over 20 steps: 1.68 and 1.86 for two shapes, and 1.46 for
one where freed blocks are returned (``python -m benchmarks.memory.heap``). Weights and the optimizer's state are
allocated once."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StageMemory:
    """One process in one stage of the curriculum; bytes on its device."""

    seq_len: int
    micro_batch: int
    """Rows at a time; not more than the process has in a step."""
    micro_batches: int
    """In a step."""
    state: StateBytes
    inputs: int
    """Token ids and labels of a step."""
    kept: dict[str, int]
    """Activations at the end of the forward pass, by part of the model."""
    backward: int
    """The fullest moment of forward and backward, everything counted."""
    step: int
    """The fullest moment of the optimizer's step."""

    @property
    def activations(self) -> int:
        """Kept for the backward pass."""
        return sum(self.kept.values())

    @property
    def peak(self) -> int:
        """The fullest moment of all."""
        return max(self.backward, self.step)

    @property
    def transient(self) -> int:
        """What the fullest moment has beyond state, inputs and kept activations: temporaries and buffers."""
        return max(0, self.peak - self.state.total - self.inputs - self.activations)


def resident_bytes(config: RunConfig, stage: StageMemory) -> int:
    """Bytes of memory that a process on CPUs takes from its machine in this stage.

    With ``activation_checkpointing`` the engine has freed blocks returned (:mod:`pretrain.heap`).
    """
    return LIBRARIES + stage.state.lasting + int(_for_each(config) * (stage.peak - stage.state.lasting_on_device))


def allocatable_bytes(config: RunConfig, resident: int, state: StateBytes) -> int:
    """The inverse of :func:`resident_bytes`: the highest peak of a stage for which so many bytes of memory suffice."""
    left = max(0, resident - LIBRARIES - state.lasting)
    return state.lasting_on_device + int(left / _for_each(config)) if left else 0


def _for_each(config: RunConfig) -> float:
    return RETURNED if config.activation_checkpointing else HEAP


def plan_memory(config: RunConfig, processes: int, *, on_gpu: bool = True) -> list[StageMemory]:
    """The memory of each stage of the run on each of ``processes``.

    ``config.model.vocab_size`` must be set. on_gpu: of the code that runs on GPUs; False for a run on CPUs. Raises
    :class:`UserError` for a batch that the processes cannot share.
    """
    plan = build_plan(config)
    check_world_size(plan, processes)
    groups = parameter_sizes(stage_model(config, 0), config.optimizer)
    state = state_bytes(groups, config, processes)
    zero = Zero.of(config, processes)
    return [
        _stage_memory(config, index, stage, planned.rows // processes, groups, state, zero, on_gpu)
        for index, (stage, planned) in enumerate(zip(config.curriculum, plan.stages, strict=True))
    ]


def _stage_memory(
    config: RunConfig,
    index: int,
    stage: StageConfig,
    rows: int,
    groups: Sequence[Group],
    state: StateBytes,
    zero: Zero,
    on_gpu: bool,
) -> StageMemory:
    micro_batch = min(stage.micro_batch, rows)
    trace = trace_stage(config, index, micro_batch, on_gpu=on_gpu)
    inputs = rows * stage.seq_len * TOKEN_BYTES
    fixed = state.total - state.gradients + inputs
    accumulated = rows > micro_batch
    return StageMemory(
        seq_len=stage.seq_len,
        micro_batch=micro_batch,
        micro_batches=-(-rows // micro_batch),
        state=state,
        inputs=inputs,
        kept=trace.kept,
        backward=fixed + _backward_peak(trace, groups, zero, accumulated) + _carried(zero, groups, on_gpu),
        step=fixed + _step_peak(groups, zero, state) + _carried(zero, groups, on_gpu),
    )


def target_share(config: RunConfig, stage: StageConfig) -> float:
    """Of the tokens of a masked model, how many are targets."""
    return stage.masking_rate or config.data.masking.rate


def trace_stage(config: RunConfig, index: int, micro_batch: int, *, on_gpu: bool) -> Trace:
    """The trace of a micro-batch of this many rows in one stage of the curriculum."""
    stage = config.curriculum[index]
    tokens = micro_batch * stage.seq_len
    masked = config.model.objective == "mlm"
    return _traced(
        stage_model(config, index),
        micro_batch,
        stage.seq_len,
        round(tokens * target_share(config, stage)) if masked else tokens,
        config.precision,
        on_gpu,
        config.activation_checkpointing,
        config.data.packing == "documents",
        config.z_loss > 0,
        config.document_loss > 0,
    )


@functools.lru_cache(maxsize=256)
def _traced(
    model: ModelConfig,
    rows: int,
    length: int,
    targets: int,
    precision: str,
    on_gpu: bool,
    checkpointing: bool,
    packed: bool,
    z_loss: bool,
    document_loss: bool,
) -> Trace:
    layout = typical_documents(rows, length) if packed else Layout.full(rows, length)
    return trace_micro_batch(
        model,
        layout,
        targets=targets,
        dtype=DTYPES[precision],
        on_gpu=on_gpu,
        checkpointing=checkpointing,
        z_loss=z_loss,
        document_loss=document_loss,
    )


def typical_documents(rows: int, length: int) -> Layout:
    """Rows full of documents whose lengths are spread evenly over octaves, from 1/64 of the row to all of it; the same
    on every call."""
    generator = np.random.default_rng(0)
    lowest = np.log(max(length / SHORTEST_SHARE, 1))
    ids = np.empty((rows, length), dtype=np.int64)
    for row in ids:
        start = number = 0
        while start < length:
            size = max(1, int(np.exp(generator.uniform(lowest, np.log(length)))))
            row[start : start + size] = number
            start, number = start + size, number + 1
    return Layout.from_documents(torch.from_numpy(ids))


def _backward_peak(trace: Trace, groups: Sequence[Group], zero: Zero, accumulated: bool) -> int:
    """Activations, gradients and DeepSpeed's buffers together, at the worst moment of a backward pass.

    accumulated: there are gradients of an earlier micro-batch already.
    """
    everything = sum(group.numel for group in groups)
    own = sum(zero.partition(group) for group in groups)
    separate = zero.accumulated_width != zero.width
    done = waiting = 0
    cut = [zero.stage == 3 and not zero.is_persistent(gradient.numel) for gradient in trace.gradients]
    gathered = sum(gradient.numel for gradient, is_cut in zip(trace.gradients, cut, strict=True) if is_cut)
    if zero.processes == 1:
        gathered = 0  # the partition is the whole
    peak = 0
    for gradient, is_cut in zip(trace.gradients, cut, strict=True):
        live = gradient.live
        if zero.stage <= 1:
            live += zero.accumulated_width * (everything if accumulated else done)
        if zero.stage in (1, 2) and (done or (zero.stage == 1 and accumulated)):
            live += zero.bucket * (zero.accumulated_width if zero.stage == 1 else zero.width)
        if zero.stage >= 2:
            if waiting + gradient.numel > zero.bucket:
                # The full bucket is laid out again to be reduced, and converted.
                converted = zero.reduced_width if zero.reduced_width != zero.width else 0
                live += waiting * (zero.reduced_width if zero.stage == 3 else zero.width + converted)
                waiting = 0
            waiting += gradient.numel
        if zero.stage == 2:
            reduced = done > zero.bucket
            live += zero.accumulated_width * own * (int(accumulated) + int(reduced and not (separate and accumulated)))
        if zero.stage == 3:
            live += zero.accumulated_width * own
            # Weights stay gathered from the forward pass if they are used again soon, counted in elements.
            live += zero.width * min(gathered, zero.max_reuse_distance // 2)
            if is_cut and gathered:
                gathered -= gradient.numel
        done += gradient.numel
        peak = max(peak, live)
    return peak


def _step_peak(groups: Sequence[Group], zero: Zero, state: StateBytes) -> int:
    """Gradients and what the optimizer's step makes of them."""
    largest = NORM_WIDTH * max(-(-numel // zero.processes) for group in groups for numel in group.numels)
    everything = sum(group.numel for group in groups)
    partitions = [zero.partition(group) for group in groups]
    separate = zero.accumulated_width != zero.width
    if zero.stage == 0:
        whole = NORM_WIDTH * max(numel for group in groups for numel in group.numels)
        return state.gradients + max(whole, zero.width * min(everything, STAGE_0_BUCKET))
    if zero.stage == 1:
        bucket = zero.accumulated_width * zero.bucket
        return state.gradients + bucket + zero.accumulated_width * sum(partitions)
    flat = MASTER * max(partitions)
    if zero.stage == 2:
        return state.gradients + (largest if separate else max(largest, flat))
    return state.gradients + max(largest, MASTER * min(max(partitions), STAGE_3_SUB_GROUP))


def _carried(zero: Zero, groups: Sequence[Group], on_gpu: bool) -> int:
    """On CPUs gloo's last reduce-scatter holds on to a copy of what it was given."""
    if on_gpu or zero.stage < 3 or zero.processes == 1:
        return 0
    return zero.reduced_width * min(zero.bucket, sum(group.numel for group in groups))
