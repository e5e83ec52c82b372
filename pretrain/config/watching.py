"""What a run keeps and tells while it trains: checkpoints, held-out loss, metrics, and whom it calls."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pretrain.config.strict import Strict


class CheckpointConfig(Strict):
    """When a checkpoint is committed and how many stay."""

    every_tokens: int | None = Field(None, gt=0, description="left out: only at the end and on SIGTERM")
    keep_last: int = Field(2, gt=0)
    keep_every_tokens: int | None = Field(
        None, gt=0, description="besides the last ones, keep the first checkpoint after each multiple of this for good"
    )


class ValidationConfig(Strict):
    """Held-out loss in the loop."""

    every_tokens: int | None = Field(None, gt=0, description="left out: only at the end of each stage")
    tokens: int = Field(131_072, gt=0, description="tokens of the held-out set that one validation reads")
    samples: int = Field(1, ge=0, description="texts generated at each validation (objective clm)")


class TelemetryConfig(Strict):
    """What is written while training, beside metrics.jsonl, which always is."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "nystrom"
    tensorboard: bool = Field(
        False, description="also write event files for TensorBoard (needs the extra of that name)"
    )
    log_every_steps: int = Field(10, gt=0)
    peak_flops: float | None = Field(
        None, gt=0, description="peak FLOP/s of one device, for MFU; left out: known GPUs only"
    )
    profile_step: int | None = Field(
        None, gt=0, description="write a trace of torch's profiler of the steps from this one on"
    )
    profile_steps: int = Field(3, gt=0, description="how many steps the trace covers")
    spike_window: int = Field(100, gt=1, description="steps that a loss is compared with to be called a spike")


class CallbackConfig(Strict):
    """A class of the user's that is called while the run trains (``pretrain/callbacks.py``)."""

    call: str = Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$", description="where it is: my.module:Class"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="arguments that it is made with")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, raw: Any) -> Any:
        return {"call": raw} if isinstance(raw, str) else raw
