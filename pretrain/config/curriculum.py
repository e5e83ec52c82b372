"""The stages of a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pretrain.config.strict import Strict


class StageConfig(Strict):
    """One stage of the curriculum: a length, and what else changes with it."""

    until_tokens: int = Field(
        gt=0, description="the stage ends at this many tokens of the run (rounded up, see order.py)"
    )
    seq_len: int = Field(gt=1)
    micro_batch: int = Field(gt=0, description="rows that one process holds in memory at a time")
    weights: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] | None = Field(
        None, description="of the sources by name, all of them; left out: those of data.train"
    )
    batch_tokens: int | None = Field(
        None, gt=0, description="tokens of one optimizer step in this stage; left out: the run's batch_tokens"
    )
    masking_rate: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="share of ordinary tokens that become targets in this stage (objective mlm); left out: "
        "data.masking.rate, which validation keeps in every stage so that its numbers compare",
    )
    rope_theta: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="base of the rotary angles from this stage on; left out: that of the stage before, changed by the "
        "rule model.rope_scaling if this stage is longer than all before",
    )
