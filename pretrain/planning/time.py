"""How long a run takes and what it costs, from its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config import RunConfig
from pretrain.curriculum.plan import build_plan
from pretrain.model.flops import attention_flops_per_token, forward_flops_per_token
from pretrain.planning.memory import target_share

TRAINING = 3
"""Arithmetic of forward and backward over that of the forward pass; recomputation does not count as useful."""


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
        attention = config.model.num_layers * attention_flops_per_token(config.model, stage.seq_len)
        speed = None if peak_flops is None else processes * mfu * peak_flops / (TRAINING * forward * slowdown)
        tokens = planned.end_tokens - planned.start_tokens
        out.append(StageTime(stage.seq_len, planned.num_batches, tokens, forward, attention / forward, speed))
    return out
