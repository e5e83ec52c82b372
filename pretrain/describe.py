"""A run in plain words before it starts."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from data_pipeline.batches.mixture import TrainingData
from data_pipeline.batches.order import Plan
from data_pipeline.units import count, format_bytes
from pretrain.config import RunConfig
from pretrain.curriculum.stages import describe_changes, stage_model
from pretrain.planning.state import parameter_sizes, state_bytes

if TYPE_CHECKING:
    from pretrain.distributed.world import World


def describe(
    config: RunConfig, plan: Plan, data: TrainingData, parameters: int, world: World, precision: str | None = None
) -> str:
    """Several lines for somebody who has not read the configuration. ``precision``: in words, with why."""
    model = config.model
    kind = {"mlm": "masked", "clm": "causal"}[model.objective]
    memory = state_bytes(parameter_sizes(stage_model(config, 0), config.optimizer), config, world.world_size)
    parts = ", ".join(
        f"{part} {format_bytes(size)}"
        for part, size in (
            ("weights", memory.weights),
            ("gradients", memory.gradients),
            ("optimizer", memory.optimizer),
            ("buffers", memory.buffers),
        )
        if size
    )
    stages = "; ".join(
        f"{count(stage.num_batches, 'step')} of {stage.rows} x {stage.seq_len}, "
        f"{count(stage_config.micro_batch, 'row')} at a time"
        for stage, stage_config in zip(plan.stages, config.curriculum, strict=True)
    )
    return "\n".join(
        [
            f"Run {config.run_dir}: a {kind} {model.attention_label} model of {parameters:,} parameters "
            f"({model.num_layers} layers of {model.hidden_size}, vocabulary {model.vocab_size:,}).",
            *_describe_data(config, plan, data),
            f"Lengths: {stages}.",
            *describe_changes(config),
            *_describe_compilation(config, world),
            f"On {world.world_size} {'GPU' if world.device.type == 'cuda' else 'CPU'} process(es), "
            f"{precision or config.precision}, "
            f"ZeRO stage {config.zero_stage}; each expects {format_bytes(memory.total)} for its state ({parts}); "
            "`nystrom plan` says how much activations take on top.",
        ]
    )


def _describe_compilation(config: RunConfig, world: World) -> list[str]:
    if not config.compile:
        return []
    lengths = count(len({stage.seq_len for stage in config.curriculum}), "length")
    # 130 s on two busy cores and 15 to 60 s on idle ones, for layers that were then no faster (0.63 s a pass for 0.61).
    slow = " On CPUs that takes minutes, and gained nothing where it was tried." if world.device.type == "cpu" else ""
    return [f"compile: true: layers are compiled at the first step of each of {lengths}, at each start anew.{slow}"]


def _describe_data(config: RunConfig, plan: Plan, data: TrainingData) -> list[str]:
    sizes = [size for size, _ in itertools.groupby(stage.batch_tokens for stage in plan.stages)]
    steps = f"{count(plan.num_batches, 'step')} of {', then '.join(f'{size:,}' for size in sizes)}"
    epochs = data.epochs(plan.total_tokens // plan.block_length)
    sources = list(zip(data.names, data.blocks, epochs.values(), strict=True))
    lines: list[str] = []
    if len(sources) == 1:
        _, blocks, times = sources[0]
        lines.append(
            f"Reads {plan.total_tokens:,} tokens, {times:.2f} times the {blocks.shards.num_tokens:,} of "
            f"{blocks.shards.path}, in {steps}."
        )
    else:
        lines.append(f"Reads {plan.total_tokens:,} tokens of {len(sources)} sources in {steps}:")
        stages = [config.stage_weights(i) for i in range(len(plan.stages))]
        for name, blocks, times in sources:
            shares = [f"{weights[name] / sum(weights.values()):.1%}" for weights in stages]
            share = shares[0] if len(set(shares)) == 1 else ", then ".join(shares)
            lines.append(
                f"  {name}: {share} of the tokens; {times:.2f} times the {blocks.shards.num_tokens:,} of "
                f"{blocks.shards.path}."
            )
    if config.data.packing == "documents":
        # Exact: every token is in one place, and what is left of the blocks is padding.
        shares = [
            f"{1 - blocks.shards.num_tokens / (blocks.num_blocks * blocks.block_length):.2%}"
            + (f" of {name}" if len(sources) > 1 else "")
            for name, blocks, _ in sources
        ]
        lines.append(
            "Rows hold whole documents, none of which attends to another; padding "
            f"({', '.join(shares)}) counts as tokens."
        )
    return lines
