"""What a run writes while it trains: checkpoints, held-out loss, metrics, and the callbacks that it runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from data_pipeline.configuration import Strict

DEFAULT_MINUTES = 30.0
"""Between two checkpoints of a run whose configuration says nothing about it."""


class CheckpointConfig(Strict):
    """When a checkpoint is committed and how many stay."""

    every_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens between two checkpoints. A crash loses at most what came after the last one. The end of "
        "the run and SIGTERM always save.",
        json_schema_extra={"left_out": "by `every_minutes`"},
    )
    every_minutes: float | None = Field(
        None,
        ge=0,
        description="Minutes between two checkpoints, by the first process's clock. 0: the clock saves none.",
        json_schema_extra={"left_out": "30, or none with `every_tokens`"},
    )
    keep_last: int = Field(
        2, gt=0, description="Newest checkpoints that stay. 1 leaves nothing to fall back on if a file is damaged."
    )
    keep_every_tokens: int | None = Field(
        None,
        gt=0,
        description="The first checkpoint at or after each multiple of this many tokens stays for good.",
        json_schema_extra={"left_out": "the last ones only"},
    )

    @property
    def minutes(self) -> float | None:
        """Minutes between two checkpoints; None for no clock."""
        if self.every_minutes is None:
            return DEFAULT_MINUTES if self.every_tokens is None else None
        return self.every_minutes or None

    def describe(self) -> str:
        """When checkpoints are written and how many stay, in a sentence."""
        parts = [] if self.every_tokens is None else [f"every {self.every_tokens:,} tokens"]
        if self.minutes is not None:
            parts.append(
                f"every {self.minutes:g} minutes" + ("" if self.every_minutes else " (checkpoint.every_minutes)")
            )
        return f"Checkpoints: {' and '.join([*parts, 'at the end'])}; the last {self.keep_last} stay."


class ValidationConfig(Strict):
    """Held-out loss in the loop."""

    every_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens between two validations, besides those at the end of each stage.",
        json_schema_extra={"left_out": "only at the end of each stage"},
    )
    tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens of the held-out set that one validation reads. More than there are: the whole set, once. A "
        "run keeps what it began with.",
        json_schema_extra={"left_out": "8,192 to 131,072, so that all validations read a tenth of the run"},
    )
    samples: int = Field(
        1, ge=0, description="Texts that a causal model writes at each validation, into `samples/` of the run. 0: none."
    )

    def describe(self) -> str:
        """What is measured when, in a sentence; ``tokens`` must be set."""
        when = "" if self.every_tokens is None else f"every {self.every_tokens:,} tokens and "
        return f"Held-out loss of {self.tokens:,} tokens: {when}at the end of each stage (validation.tokens)."


class TelemetryConfig(Strict):
    """What is written while training, beside metrics.jsonl, which always is."""

    wandb: Literal["offline", "online", "disabled"] = Field(
        "offline",
        description="Weights & Biases. offline: files in the run folder, for `wandb sync`. online falls back to "
        "offline if it can't connect. WANDB_MODE in the environment may ask for less.",
    )
    wandb_project: str = Field("nystrom", description="Project of Weights & Biases that the run belongs to.")
    tensorboard: bool = Field(
        False, description="Also write event files for TensorBoard. Needs the extra `tensorboard`."
    )
    log_every_steps: int = Field(
        10, gt=0, description="Optimizer steps between two lines of metrics.jsonl and of the console. 1: every step."
    )
    peak_flops: float | None = Field(
        None,
        gt=0,
        description="Peak FLOP/s of one device in the run's precision, which MFU is a share of. No training depends on "
        "it.",
        json_schema_extra={"left_out": "known GPUs only"},
    )
    profile_step: int | None = Field(
        None,
        gt=0,
        description="Optimizer step at which a trace of torch's profiler begins, written into `profile/` of the run.",
        json_schema_extra={"left_out": "no trace"},
    )
    profile_steps: int = Field(3, gt=0, description="Optimizer steps that the trace covers.")
    spike_window: int = Field(
        100,
        gt=1,
        description="Steps before it that a loss is compared with to be called a spike. Spikes are reported and change "
        "nothing.",
    )


class CallbackConfig(Strict):
    """A class of the user's that is called while the run trains (``pretrain/callbacks.py``)."""

    call: str = Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$", description="Where it is: `my.module:Class`."
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Arguments that it is made with.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, raw: Any) -> Any:
        return {"call": raw} if isinstance(raw, str) else raw
