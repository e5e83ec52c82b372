"""From the configuration's stages to the plan of the data and the micro-batches of a process."""

from __future__ import annotations

import math

from data_pipeline.batches.mixture import MixturePlan, quotas
from data_pipeline.batches.order import Plan, StageSpec
from data_pipeline.errors import UserError
from pretrain.config import RunConfig


def build_plan(config: RunConfig) -> Plan:
    """The plan of the run: which tokens each global batch holds. Raises :class:`UserError` for impossible stages."""
    return Plan(
        [StageSpec(stage.seq_len, stage.until_tokens, stage.batch_tokens) for stage in config.curriculum],
        block_length=config.block_length,
        batch_tokens=config.batch_tokens,
    )


def build_mixture(config: RunConfig, plan: Plan) -> MixturePlan:
    """Which source each draw of the run takes. Raises :class:`UserError` for weights that cannot be."""
    names = [source.name for source in config.data.sources]
    stages = []
    for i, stage in enumerate(plan.stages):
        weights = config.stage_weights(i)
        stages.append((stage.start_tokens // plan.block_length, quotas([weights[name] for name in names], names)))
    return MixturePlan(stages)


LEAST_VALIDATION, MOST_VALIDATION = 8_192, 131_072
VALIDATION_SHARE = 0.1
"""Of the tokens of a run, those that all its validations may read together. A forward pass costs a third of a step, and
a short stage validates at two lengths: 3 to 7% of the training's time."""


def validation_tokens(config: RunConfig, plan: Plan) -> int:
    """Held-out tokens of one validation where the configuration leaves that open: a multiple of the longest length."""
    every = config.validation.every_tokens
    count = len(plan.stages) + (0 if every is None else plan.total_tokens // every)
    wanted = min(MOST_VALIDATION, max(LEAST_VALIDATION, VALIDATION_SHARE * plan.total_tokens / count))
    return max(1, int(wanted) // plan.block_length) * plan.block_length


def slice_length(plan: Plan) -> int:
    """The longest stretch of a block that no row of the run is cut in: a document within it is whole in every stage."""
    return math.gcd(*(stage.seq_len for stage in plan.stages))


def check_world_size(plan: Plan, world_size: int) -> None:
    """Raise :class:`UserError` unless the rows of every stage's batch can be shared evenly, naming values that do.

    Equal shares matter beyond fairness: ZeRO 2 and 3 communicate in every backward pass, so all processes must make the
    same number of them.
    """
    for i, stage in enumerate(plan.stages):
        if stage.rows % world_size == 0:
            continue
        fits = [n for n in range(1, stage.rows + 1) if all(s.rows % n == 0 for s in plan.stages)]
        near = sorted(fits, key=lambda n: (abs(n - world_size), -n))[:3]
        unit = plan.block_length * world_size
        raise UserError(
            f"stage {i} has {stage.rows} rows of {stage.seq_len} tokens in a batch, which {world_size} processes "
            f"cannot share evenly: use {' or '.join(str(n) for n in sorted(near))} processes, or batch_tokens "
            f"{-(-stage.batch_tokens // unit) * unit} in this stage"
        )


def micro_batches(rows: int, micro_batch: int) -> list[slice]:
    """Slices of a process's ``rows`` rows of at most ``micro_batch`` rows each; the last may be shorter.

    The loss is a sum over targets divided once by the global count, so that unequal slices weigh what they should.
    """
    return [slice(start, min(start + micro_batch, rows)) for start in range(0, rows, micro_batch)]
