"""The stages of a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pretrain.config.strict import Strict


class StageConfig(Strict):
    """One stage of the length curriculum."""

    until_tokens: int = Field(
        gt=0, description="the stage ends at this many tokens of the run (rounded up, see order.py)"
    )
    seq_len: int = Field(gt=1)
    micro_batch: int = Field(gt=0, description="rows that one process holds in memory at a time")
    weights: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] | None = Field(
        None, description="of the sources by name, all of them; left out: those of data.train"
    )
    batch_tokens: int | None = Field(None, gt=0, description="tokens of one optimizer step; left out: the run's")
    masking_rate: float | None = Field(None, gt=0.0, lt=1.0, description="left out: data.masking.rate")
    rope_theta: float | None = Field(
        None, gt=0, description="base of the rotary angles; left out: by the rule model.rope_scaling"
    )
