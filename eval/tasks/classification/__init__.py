"""Classification by fine-tuning: its settings and its registration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_pipeline.sources.reading import Quotes
from eval.task import Bars, ModuleTask, Row, Settings, quotes_field, register

TABLE = "classification"
MODEL_ROW = "fine-tuned"
SCRATCH_ROW = "same network from scratch"
TFIDF_ROW = "TF-IDF + logistic regression"
TFIDF_CUT_ROW = f"{TFIDF_ROW}, the same tokens"
MAJORITY_ROW = "majority class"


class FineTuneSettings(Settings):
    """Data, and the recipe of fine-tuning."""

    train: str | None = Field(
        None,
        description="labelled text to train on: a file as data prepare takes it (JSONL, CSV, TSV, Parquet), or "
        "hub:OWNER/NAME[/CONFIG]:SPLIT",
    )
    test: str | None = Field(None, description="labelled text to score once, in the end; formats as for --train")
    dev: str | None = Field(
        None, description="labelled text on which the epoch is chosen; left out: a share of the training text"
    )
    local_dir: str | None = Field(
        None,
        description="folder that replaces the hub data of a suite: DIR/SUITE/train.*, test.* and, if there, dev.*",
    )
    local_name: str | None = Field(None, description="the suite's folder in --local-dir; left out: the folder itself")
    text_field: str = Field("text", description="field or column with the text")
    text_b_field: str | None = Field(None, description="field with the second text, where the task is about pairs")
    quotes: Quotes = quotes_field()
    train_records: int | None = Field(
        None, ge=2, description="train on so many records, drawn at random once, by class; left out: all"
    )
    max_length: int | None = Field(
        None, ge=1, description="tokens read of each text; left out: the longest length of the run"
    )
    pooling: Literal["mean", "cls", "last"] = Field(
        "mean", description="what the head reads: the mean over real tokens, the first token or the last real one"
    )
    seeds: int = Field(3, ge=1, description="fine-tunings from different random seeds")
    scratch_seeds: int | None = Field(
        None, ge=0, description="of the seeds, how many also from random weights; left out: all"
    )
    dev_share: float = Field(0.15, gt=0, lt=1, description="share of the training text on which the epoch is chosen")
    dev_records: int = Field(2000, ge=1, description="at most so many records for it")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of fine-tuning; auto: bf16 where it is fast"
    )
    epochs: int = Field(10, ge=1, description="passes over the training text, at most")
    steps: int | None = Field(
        None,
        ge=1,
        description="optimizer steps at most, weights chosen at up to ten places; left out: whole epochs",
    )
    patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations without a better one; left out: never"
    )
    batch_size: int = Field(16, ge=1, description="texts of one step")
    micro_tokens: int = Field(
        8192, ge=1, description="tokens of one forward pass, padding included; a batch with more is accumulated"
    )
    lr: float | None = Field(None, gt=0, description="peak learning rate; left out: 0.1 / hidden_size")
    head_lr: float = Field(5e-3, gt=0, description="peak learning rate of the head")
    weight_decay: float = Field(0.01, ge=0, description="of the backbone's matrices")
    dropout: float = Field(0.1, ge=0, lt=1, description="before the head")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")


class ClassifySettings(FineTuneSettings):
    """Of fine-tuning on classes."""

    label_field: str = Field("label", description="field or column with the label")
    positive_label: tuple[str, ...] = Field(
        (), description="names of the class whose F1 is reported too (the first that the data has); left out: none"
    )


@register
class Classification(ModuleTask):
    """See ``task``."""

    name = "classify"
    summary = "fine-tuning on labelled text, beside the same network from scratch, TF-IDF and the majority"
    settings = ClassifySettings
    module = "eval.tasks.classification.task"
    held_out = False
    any_objective = True
    order = 20
    heading = "Classification"
    lead = "Fine-tuned on labelled text, beside the same network from random weights and models that know no language."
    rows = (
        Row("accuracy", "Classification accuracy, fine-tuned", reference="tfidf_accuracy"),
        # No winner: the controls are not the model.
        Row("tfidf_accuracy", "… TF-IDF, which knows no language", ranked=False),
        Row("scratch_accuracy", "… the same network from scratch", ranked=False),
        Row("macro_f1", "Classification macro F1, fine-tuned"),
    )
    bars = Bars(TABLE, "accuracy", MODEL_ROW, "pretrained", SCRATCH_ROW, "from scratch")
