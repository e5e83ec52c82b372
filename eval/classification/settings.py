"""Settings of classification by fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from eval.suites.settings import Settings


class ClassifySettings(Settings):
    """Data, and the recipe of fine-tuning."""

    train: str | None = Field(None, description="labelled text to train on: JSONL, JSONL.gz, CSV, TSV or Parquet")
    test: str | None = Field(None, description="labelled text to score once, in the end")
    text_field: str = Field("text", description="field or column with the text")
    label_field: str = Field("label", description="field or column with the label")
    max_length: int | None = Field(
        None, ge=1, description="tokens read of each text; left out: the longest length of the run"
    )
    seeds: int = Field(3, ge=1, description="fine-tunings from different random seeds")
    scratch_seeds: int | None = Field(
        None, ge=0, description="of the seeds, how many also from random weights; left out: all"
    )
    dev_share: float = Field(0.15, gt=0, lt=1, description="share of the training file on which the epoch is chosen")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of fine-tuning; auto: bf16 where it is fast"
    )
    epochs: int = Field(10, ge=1, description="passes over the training file, at most")
    batch_size: int = Field(16, ge=1, description="texts of one step")
    lr: float | None = Field(None, gt=0, description="peak learning rate; left out: 0.1 / hidden_size")
    head_lr: float = Field(5e-3, gt=0, description="peak learning rate of the head")
    weight_decay: float = Field(0.01, ge=0, description="of the backbone's matrices")
    dropout: float = Field(0.1, ge=0, lt=1, description="before the head")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
