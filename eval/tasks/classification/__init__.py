"""Classification by fine-tuning: its settings and its registration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

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
        description="labelled text to train on: a file as data prepare takes it (JSONL, CSV, TSV, Parquet), a folder "
        "with a folder of .txt files for each label, or hub:OWNER/NAME[/CONFIG]:SPLIT",
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
    epochs: int | None = Field(
        None,
        ge=1,
        description="passes over the training text, at most; left out: 10, or as many as --min-steps asks for",
    )
    min_steps: int = Field(
        100,
        ge=1,
        description="optimizer steps at least, also for few texts, where neither --epochs nor --steps is given",
    )
    steps: int | None = Field(
        None,
        ge=1,
        description="optimizer steps at most, weights chosen at up to ten places; left out: whole epochs",
    )
    patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations without a better one; left out: never"
    )
    batch_size: int = Field(32, ge=1, description="texts of one step")
    micro_tokens: int = Field(
        4096, ge=1, description="tokens of one forward pass, padding included; a batch with more is accumulated"
    )
    recompute: bool = Field(
        False, description="compute layers again in the backward pass: less memory, a third more time"
    )
    lr: float | None = Field(None, gt=0, description="peak learning rate; left out: 0.1 / hidden_size")
    head_lr: float = Field(5e-3, gt=0, description="peak learning rate of the head")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor of the learning rate from each layer to the one below it"
    )
    freeze: int = Field(
        0,
        ge=0,
        description="so many of the lowest layers, and the embeddings, stay as they are; from scratch none do",
    )
    weight_decay: float = Field(0.01, ge=0, description="of the backbone's matrices")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    dropout: float = Field(0.1, ge=0, lt=1, description="before the head")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    search: bool = Field(
        False, description="try learning rates and batch sizes on the dev split, for the network from scratch too"
    )
    search_lrs: tuple[float, ...] = Field(
        (), description="learning rates to try; left out: 0.02, 0.06 and 0.2 / hidden_size"
    )
    search_batches: tuple[int, ...] = Field((16, 32, 64), description="batch sizes to try")
    search_keep: int = Field(
        3, ge=1, description="settings trained to the end; of more, all are first trained for a third of the steps"
    )
    search_records: int = Field(
        1000, ge=2, description="training records that the search reads, at most; what it finds is used for all"
    )

    @field_validator("search_lrs", "search_batches")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(value <= 0 for value in values):
            raise ValueError("every value must be above 0")
        return values

    @field_validator("search_batches")
    @classmethod
    def _some(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not values:
            raise ValueError("at least one batch size")
        return values


class ClassifySettings(FineTuneSettings):
    """Of fine-tuning on classes."""

    label_field: str = Field("label", description="field or column with the label")
    positive_label: tuple[str, ...] = Field(
        (), description="names of the class whose F1 is reported too (the first that the data has); left out: none"
    )
    labels: tuple[int, ...] = Field(
        (),
        description="numbers of training records, drawn for every seed: accuracy by labels; left out: none",
    )

    @field_validator("labels")
    @classmethod
    def _in_order(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if any(value < 2 for value in values):
            raise ValueError("at least 2 labels")
        return tuple(sorted(set(values)))


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
