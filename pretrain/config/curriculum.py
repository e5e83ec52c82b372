"""The stages of a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pretrain.config.strict import Strict


class StageConfig(Strict):
    """One stage of the curriculum: a length, and what else changes with it."""

    until_tokens: int = Field(
        gt=0,
        description="Tokens of the run at which the stage ends, counted from the run's start. It must increase from "
        "stage to stage. The last one is the length of the run. The end is rounded up so that no token is lost.",
    )
    seq_len: int = Field(
        gt=1, description="Tokens of a row in this stage. It must divide `data.block_length`; powers of two do."
    )
    micro_batch: int = Field(
        gt=0,
        description="Rows that one process holds in memory at a time. It changes memory and speed, not the batch of an "
        "optimizer step.",
    )
    weights: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] | None = Field(
        None,
        description="Shares of the tokens by name of the source, in any scale. Every source needs one; 0 leaves it "
        "out.",
        json_schema_extra={"left_out": "those of data.train"},
    )
    batch_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens of one optimizer step in this stage, over all processes. A multiple of "
        "`data.block_length`.",
        json_schema_extra={"left_out": "the run's batch_tokens"},
    )
    masking_rate: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="Share of ordinary tokens that become targets in this stage. Objective mlm only. Validation keeps "
        "`data.masking.rate` in every stage, so that its losses compare.",
        json_schema_extra={"left_out": "data.masking.rate"},
    )
    rope_theta: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Base of the rotary angles from this stage on. It wins over the rule `model.rope_scaling`, which "
        "goes on from it.",
        json_schema_extra={"left_out": "as before, by model.rope_scaling"},
    )
