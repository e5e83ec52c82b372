"""The measurement of time and memory: its settings and its registration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from eval.task import ModuleTask, Settings, register


class EfficiencySettings(Settings):
    """What runs, and how often."""

    lengths: tuple[int, ...] = Field(
        (), description="tokens of a sequence; left out: 512 to 4096, on a GPU 1024 to 32768, as far as the model reads"
    )
    sequences: int = Field(1, ge=1, description="sequences at a time")
    rounds: int = Field(5, ge=1, description="timed runs of each form, all forms in turn")
    backward: bool = Field(False, description="time forward and backward passes of training, too")
    decode_tokens: int = Field(
        16, ge=0, description="tokens decoded in each round (causal models); 0 leaves decoding out"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="of weights; auto: bf16 where it is fast")
    seed: int = Field(0, ge=0, description="of random choices")

    @field_validator("lengths")
    @classmethod
    def _lengths(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if any(value < 2 for value in values):
            raise ValueError(f"sequences have at least 2 tokens, got {' '.join(map(str, values))}")
        return tuple(sorted(set(values)))


@register
class Efficiency(ModuleTask):
    """See ``task``."""

    name = "efficiency"
    summary = "tokens per second and memory by length, beside exact attention in the same model"
    settings = EfficiencySettings
    module = "eval.tasks.efficiency.task"
    held_out = False
    any_objective = timings = True
    # None for masked models: the figures of decoding are absent then, the others are the same.
    immaterial = frozenset({"decode_tokens"})
    order = 70
    heading, lead = "Efficiency", "Time and memory by length, beside exact attention."
