"""The optimizer and its learning rate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.config.strict import Strict


class OptimizerConfig(Strict):
    """The rule that turns gradients into steps; no weight decay on norms, biases and other vectors."""

    kind: Literal["adamw", "lion", "muon"] = Field(
        "adamw", description="AdamW (Loshchilov & Hutter 2019), Lion (Chen et al. 2023), Muon (Jordan et al. 2024)"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    decay_embeddings: bool = Field(True, description="whether the word and position tables decay too")
    grad_clip: float = Field(1.0, ge=0, description="largest norm of the global gradient; 0 does not clip")
    ema_decay: float | None = Field(
        None, gt=0.0, lt=1.0, description="also keep a running average of the weights with this decay a step"
    )


class ScheduleConfig(Strict):
    """Learning rate as a function of tokens seen."""

    kind: Literal["wsd", "cosine", "linear", "constant"] = "cosine"
    warmup_tokens: int = Field(0, ge=0)
    decay_tokens: int | None = Field(
        None, gt=0, description="wsd only: length of the final decay; left out: 20% of the run"
    )
    min_lr_ratio: float = Field(0.1, ge=0.0, le=1.0, description="the last learning rate as a share of the peak")
