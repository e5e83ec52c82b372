"""The comparison with exact attention: its settings and its registration."""

from __future__ import annotations

from pydantic import Field, field_validator

from eval.task import ModuleTask, Settings, register


class ApproximationSettings(Settings):
    """The held-out text that is looked at, and what is varied."""

    length: int | None = Field(None, ge=2, description="window in tokens; left out: the longest length of the run")
    max_tokens: int = Field(16384, ge=1, description="evaluate so many held-out tokens, spread evenly")
    seed: int = Field(0, ge=0, description="of random choices")
    mask_rate: float = Field(0.15, gt=0, lt=1, description="share of the tokens that are targets (masked models)")
    mask_share: float = Field(0.8, ge=0, le=1, description="of the targets, share replaced by the mask token")
    random_share: float = Field(0.1, ge=0, le=1, description="of the targets, share replaced by a random token")
    float64: bool = Field(False, description="compare attention in float64 in place of float32")
    landmarks: tuple[int, ...] = Field(
        (), description="num_landmarks to try (masked models); left out: 1/4 to 4 times that of the model"
    )
    inverse_steps: tuple[int, ...] = Field((), description="inverse_iterations to try (masked models); left out: none")
    segment_lengths: tuple[int, ...] = Field(
        (), description="segment_length to try (causal models); left out: 1/4 to 4 times that of the model"
    )
    window_sizes: tuple[int, ...] = Field(
        (), description="window_segments to try (causal models); left out: 1 to twice that of the model"
    )

    @field_validator("landmarks", "inverse_steps", "segment_lengths", "window_sizes")
    @classmethod
    def _counts(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if any(value < 1 for value in values):
            raise ValueError(f"values to try must be at least 1, got {' '.join(map(str, values))}")
        return tuple(sorted(set(values)))

    @field_validator("segment_lengths")
    @classmethod
    def _segments(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if 1 in values:
            raise ValueError("a segment has at least 2 tokens")
        return values


@register
class Approximation(ModuleTask):
    """See ``task``."""

    name = "approximation"
    summary = "landmarks against exact attention on the same weights: error by layer and head, loss with either"
    settings = ApproximationSettings
    module = "eval.tasks.approximation.task"
    # What is tried besides; the figures of the model as it was trained do not depend on it.
    immaterial = frozenset({"landmarks", "inverse_steps", "segment_lengths", "window_sizes"})
    order = 60
    heading = "Approximation"
    lead = "How far the approximate attention is from exact softmax attention, by layer and head."
