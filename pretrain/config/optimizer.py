"""The optimizer and its learning rate."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.configuration import Strict
from pretrain.optim.kind import KINDS

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(Strict):
    """The rule that turns gradients into steps; no weight decay on norms, biases and other vectors."""

    kind: str = Field(
        "adamw",
        description="adamw: Loshchilov & Hutter 2019. lion: Chen et al. 2023, with a 3 to 10 times smaller `lr` and a "
        "larger `weight_decay`. muon: Jordan et al. 2024, for the layers' matrices, and AdamW for all else. muon takes "
        "AdamW's `lr` and `weight_decay`.",
        json_schema_extra={"type": " | ".join(KINDS.names())},
    )
    lr: float = Field(1e-3, gt=0, description="Peak learning rate, reached at the end of the warm-up.")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.95),
        description="Decay rates a step of AdamW's two moments, or of Lion's interpolation and momentum. With muon "
        "they hold for what AdamW trains.",
        json_schema_extra={"left_out": "[0.9, 0.95]; lion: [0.9, 0.99]"},
    )
    eps: float = Field(
        1e-8, gt=0, description="Added to the root of AdamW's second moment, against division by 0. Lion has none."
    )
    momentum: Beta = Field(
        0.95,
        description="Muon only: Nesterov momentum of the layers' matrices. 0 takes the gradient of the step alone.",
    )
    weight_decay: float = Field(
        0.1,
        ge=0,
        description="Decoupled weight decay: each step takes `lr` x `weight_decay` of a weight away. Norms, biases and "
        "gates never decay. 0: none.",
    )
    settings: dict[str, float] = Field(
        default_factory=dict,
        description="Hyper-parameters that only this kind has. adamw, lion and muon have none.",
    )
    decay_embeddings: bool = Field(
        True, description="Whether the word and position tables decay too. A tied head is the word table."
    )
    grad_clip: float = Field(
        1.0,
        ge=0,
        description="Largest L2 norm of the gradient over all weights. Longer ones are scaled down. 0: no clipping.",
    )
    ema_decay: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="Decay a step of a running average of the weights, exported as `export-ema`. It averages about 1 / "
        "(1 - decay) steps. Set at a resume, it starts from the weights of that step.",
        json_schema_extra={"left_out": "no average"},
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_by_kind(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") in KINDS.names():
            return {**KINDS.get(values["kind"]).defaults, **values}
        return values

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        KINDS.get(kind)
        return kind

    @model_validator(mode="after")
    def _check_settings(self) -> OptimizerConfig:
        known = KINDS.get(self.kind).settings
        for name in self.settings:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(known) or 'none'}"
                raise ValueError(f"settings: {self.kind} has no hyper-parameter '{name}': {hint}")
        return self

    def setting(self, name: str) -> float:
        """A hyper-parameter that only this kind has, as set or by default."""
        return self.settings.get(name, KINDS.get(self.kind).settings[name])


class ScheduleConfig(Strict):
    """Learning rate as a function of tokens seen."""

    kind: Literal["wsd", "cosine", "linear", "inverse_sqrt", "constant"] = Field(
        "cosine",
        description="Learning rate after the warm-up. wsd: constant, then a decay at the end. cosine and linear: a "
        "fall over the rest of the run. inverse_sqrt: lr x sqrt(warmup_tokens / tokens), whatever the length of the "
        "run.",
    )
    warmup_tokens: int = Field(
        0,
        ge=0,
        description="Tokens over which the learning rate rises linearly from 0 to `optimizer.lr`. 0: no warm-up. "
        "inverse_sqrt needs one.",
    )
    decay_tokens: int | None = Field(
        None,
        gt=0,
        description="wsd only: tokens of the decay at the end. More than the warm-up leaves: it starts right after the "
        "warm-up.",
        json_schema_extra={"left_out": "20% of the run"},
    )
    decay_shape: Literal["sqrt", "linear"] = Field(
        "sqrt",
        description="wsd only: shape of the decay. With x the share of it that is over, sqrt is 1 - sqrt(x), linear 1 "
        "- x.",
    )
    min_lr_ratio: float = Field(
        0.1,
        ge=0.0,
        le=1.0,
        description="Lowest learning rate after the warm-up, as a share of `optimizer.lr`. 0: down to nothing. 1: no "
        "decay. constant ignores it.",
    )

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.kind == "inverse_sqrt" and self.warmup_tokens == 0:
            raise ValueError("kind inverse_sqrt falls from the end of the warm-up: give warmup_tokens")
        return self
