"""The optimizer and its learning rate."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config.strict import Strict
from pretrain.optim.kind import KINDS

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(Strict):
    """The rule that turns gradients into steps; no weight decay on norms, biases and other vectors."""

    kind: str = Field(
        "adamw",
        description="adamw (Loshchilov & Hutter 2019); lion (Chen et al. 2023): give it a 3 to 10 times smaller lr and "
        "a larger weight_decay; muon (Jordan et al. 2024): for the layers' matrices, AdamW for all else, at the lr and "
        "weight_decay of AdamW",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.95), description="of AdamW, or of Lion, for which they are (0.9, 0.99) if left out"
    )
    eps: float = Field(1e-8, gt=0, description="of AdamW; Lion has none")
    momentum: Beta = Field(0.95, description="muon only: of the layers' matrices (Nesterov)")
    settings: dict[str, float] = Field(
        default_factory=dict, description="hyper-parameters that only this kind has; adamw, lion and muon have none"
    )
    weight_decay: float = Field(0.1, ge=0)
    decay_embeddings: bool = Field(
        True, description="whether the word and position tables decay too; a tied head is the word table"
    )
    grad_clip: float = Field(1.0, ge=0, description="largest norm of the global gradient; 0 does not clip")
    ema_decay: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="also keep a running average of the weights with this decay a step, exported as export-ema; one "
        "that is set later starts from the weights of that step",
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

    kind: Literal["wsd", "cosine", "linear", "inverse_sqrt", "constant"] = "cosine"
    warmup_tokens: int = Field(0, ge=0)
    decay_tokens: int | None = Field(
        None, gt=0, description="wsd only: length of the final decay; left out: 20% of the run"
    )
    decay_shape: Literal["sqrt", "linear"] = Field(
        "sqrt", description="wsd only: sqrt falls as 1 - sqrt(share of the decay), linear as 1 - share"
    )
    min_lr_ratio: float = Field(0.1, ge=0.0, le=1.0, description="the last learning rate as a share of the peak")

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.kind == "inverse_sqrt" and self.warmup_tokens == 0:
            raise ValueError("kind inverse_sqrt falls from the end of the warm-up: give warmup_tokens")
        return self
