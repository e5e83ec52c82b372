"""Everything that is known of a run before it starts, as one value."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import UserError
from pretrain.config import RunConfig
from pretrain.curriculum.plan import build_plan
from pretrain.curriculum.stages import stage_model
from pretrain.model.config import ModelConfig
from pretrain.model.flops import all_attention_flops_per_token, forward_flops_per_token
from pretrain.planning.fit import Change, MemoryBudget, changes_that_fit, largest_micro_batch, peak
from pretrain.planning.memory import (
    LIBRARIES,
    StageMemory,
    plan_memory,
    resident_bytes,
    target_share,
)
from pretrain.planning.state import Zero, parameter_sizes, state_bytes
from pretrain.precision import resolve_for_plan
from pretrain.sources import open_sources

FLOAT32 = 4
TRAINING = 3
"""Arithmetic of forward and backward over that of the forward pass; recomputation does not count as useful."""


@dataclass(frozen=True)
class Question:
    """What is asked about a configuration."""

    gpus: int
    gpu_memory: float | None = None
    """GiB of one GPU; None: not asked whether the run fits."""
    margin: float = 0.1
    """Share of it that stays free, for what PyTorch does not allocate (CUDA, NCCL) and for fragmentation."""
    mfu: float = 0.3
    peak_flops: float | None = None
    price: float | None = None
    """Of a GPU for an hour."""
    processes_per_node: int = 8
    on_gpu: bool = True
    search: bool = True
    """Also look for the largest micro-batches and for changes that fit."""


@dataclass(frozen=True)
class StageTime:
    """One stage of the curriculum."""

    seq_len: int
    steps: int
    tokens: int
    forward_flops: float
    """For each token; training takes :data:`TRAINING` times that."""
    attention_share: float
    """Of the attention proper, without its projections, in it."""
    tokens_per_second: float | None
    """Of all GPUs together; None without a peak."""

    @property
    def seconds(self) -> float | None:
        """Of the stage; None without a peak."""
        return None if self.tokens_per_second is None else self.tokens / self.tokens_per_second


@dataclass(frozen=True)
class Estimate:
    """The answer; bytes, seconds, FLOPs."""

    config: RunConfig
    """With the precision settled."""
    precision: str
    """In words, with why if it was ``auto``."""
    question: Question
    parameters: dict[str, int]
    """By part of the model."""
    memory: list[StageMemory]
    other_peaks: list[int]
    """Of each stage, with activation_checkpointing the other way."""
    time: list[StageTime]
    host_bytes: int
    """Of one process, at the start or while it trains with an offloaded optimizer, whichever is more. On CPUs
    everything is there: what it takes at its fullest."""
    checkpoint_bytes: int
    data: dict[str, Any] | None
    """Epochs by source, and tokens; None if the shards are not there."""
    limit: int | None = None
    """Bytes that PyTorch may allocate."""
    largest: list[int] = field(default_factory=list)
    """The most rows at a time that fit, for each stage."""
    changes: list[Change] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        """All of them."""
        return sum(self.parameters.values())

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return sum(stage.tokens for stage in self.time)

    @property
    def training_flops(self) -> float:
        """Of the whole run."""
        return sum(TRAINING * stage.forward_flops * stage.tokens for stage in self.time)

    @property
    def seconds(self) -> float | None:
        """Of the whole run; None without a peak."""
        each = [stage.seconds for stage in self.time]
        return None if None in each else sum(s for s in each if s is not None)

    @property
    def gpu_hours(self) -> float | None:
        """Hours times GPUs."""
        return None if self.seconds is None else self.seconds * self.question.gpus / 3600

    @property
    def fits(self) -> bool | None:
        """None if it was not asked."""
        return None if self.limit is None else peak(self.memory) <= self.limit


def estimate(config: RunConfig, question: Question) -> Estimate:
    """Answer the question. Raises :class:`UserError` if ``model.vocab_size`` is not set, and for a batch that so many
    GPUs cannot share."""
    if config.model.vocab_size is None:
        raise UserError("the size of the vocabulary is not known")
    precision = resolve_for_plan(config, question.on_gpu)
    config = precision.config
    memory = plan_memory(config, question.gpus, on_gpu=question.on_gpu)
    parameters = parameters_by_part(stage_model(config, 0))
    total = sum(parameters.values())
    limit: int | None = None
    largest: list[int] = []
    changes: list[Change] = []
    if question.gpu_memory is not None:
        budget = MemoryBudget(question.gpus, int(question.gpu_memory * 2**30 * (1 - question.margin)), question.on_gpu)
        limit = budget.limit(config, memory[0].state)
        if question.search:
            largest = [largest_micro_batch(config, stage, budget) for stage in range(len(memory))]
            changes = changes_that_fit(config, budget) if peak(memory) > limit else []
    state = memory[0].state
    host = LIBRARIES + max(FLOAT32 * total, state.host_optimizer)
    if not question.on_gpu:
        host = max(host, *(resident_bytes(config, stage) for stage in memory))
    other = config.model_copy(update={"activation_checkpointing": not config.activation_checkpointing})
    return Estimate(
        config=config,
        precision=precision.text,
        question=question,
        parameters=parameters,
        memory=memory,
        other_peaks=[stage.peak for stage in plan_memory(other, question.gpus, on_gpu=question.on_gpu)],
        time=plan_time(config, question.gpus, mfu=question.mfu, peak_flops=question.peak_flops),
        host_bytes=host,
        checkpoint_bytes=checkpoint_bytes(config, total, question.gpus),
        data=_data(config),
        limit=limit,
        largest=largest,
        changes=changes,
    )


def plan_time(config: RunConfig, processes: int, *, mfu: float, peak_flops: float | None) -> list[StageTime]:
    """Each stage of the run at a share ``mfu`` of ``peak_flops`` (FLOP/s of one GPU).

    With ``activation_checkpointing`` layers are computed once more in the backward pass, which takes time and is no
    progress: a quarter of the speed is taken off.
    """
    out = []
    plan = build_plan(config)
    slowdown = (TRAINING + 1) / TRAINING if config.activation_checkpointing else 1.0
    for stage, planned in zip(config.curriculum, plan.stages, strict=True):
        share = target_share(config, stage) if config.model.objective == "mlm" else None
        forward = forward_flops_per_token(config.model, stage.seq_len, share)
        attention = all_attention_flops_per_token(config.model, stage.seq_len)
        speed = None if peak_flops is None else processes * mfu * peak_flops / (TRAINING * forward * slowdown)
        tokens = planned.end_tokens - planned.start_tokens
        out.append(StageTime(stage.seq_len, planned.num_batches, tokens, forward, attention / forward, speed))
    return out


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Embeddings, attention, feed-forward, norms, head; a head that shares the embeddings' matrix has the rest only."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pretrain.model.transformer import build_model

    counts: Counter[str] = Counter()
    with FakeTensorMode():
        for name, parameter in build_model(model).named_parameters():
            counts[_part_of(name)] += parameter.numel()
    return {part: counts[part] for part in ("embeddings", "attention", "feed-forward", "norms", "head")}


def _part_of(name: str) -> str:
    if "norm" in name:
        return "norms"
    for start, part in (("embeddings.", "embeddings"), ("head.", "head")):
        if name.startswith(start):
            return part
    return "attention" if ".attention." in name else "feed-forward"


def checkpoint_bytes(config: RunConfig, parameters: int, processes: int) -> int:
    """Of one checkpoint on disk, all processes' files together: weights as they are trained with, and the state."""
    groups = parameter_sizes(stage_model(config, 0), config.optimizer)
    zero = Zero.of(config, processes)
    state = state_bytes(groups, config.model_copy(update={"offload_optimizer": False}), processes)
    states = state.optimizer * (processes if zero.stage else 1)
    if zero.stage == 3 and zero.width == FLOAT32:
        states += FLOAT32 * parameters  # the weights are the master copy
    return states + (zero.width * parameters if zero.stage < 3 else 0)


def _data(config: RunConfig) -> dict[str, Any] | None:
    plan = build_plan(config)
    try:
        data = open_sources(config, plan)
    except UserError:
        return None
    epochs = data.epochs(plan.total_tokens // plan.block_length)
    tokens = sum(blocks.shards.num_tokens for blocks in data.blocks)
    return {"tokens": tokens, "epochs": epochs}
