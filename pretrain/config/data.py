"""Where the tokens are, how they become rows, and what is hidden in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from data_pipeline.configuration import Strict

if TYPE_CHECKING:
    from data_pipeline.batches.masking import Masking


class MaskingConfig(Strict):
    """What masked language modeling hides (``data_pipeline/batches/masking.py``); read only for ``objective: mlm``."""

    rate: float = Field(
        0.15,
        gt=0.0,
        lt=1.0,
        description="Share of ordinary tokens that become targets. It holds in validation, and in every stage without "
        "a `masking_rate`.",
    )
    mask_share: float = Field(
        0.8,
        ge=0.0,
        le=1.0,
        description="Share of the targets that are replaced by the mask token. What neither this nor `random_share` "
        "takes stays as it is.",
    )
    random_share: float = Field(
        0.1,
        ge=0.0,
        le=1.0,
        description="Share of the targets that are replaced by a random ordinary token. With `mask_share` at most 1.",
    )
    unit: Literal["token", "word", "span"] = Field(
        "token",
        description="What becomes a target as a whole: a token, a word, or a span of words (SpanBERT, Joshi et al. "
        "2020).",
    )
    span_p: float = Field(
        0.2,
        gt=0.0,
        le=1.0,
        description="Unit span only: parameter of the geometric distribution of a span's words. 1 masks single words; "
        "smaller values make longer spans.",
    )
    span_max: int = Field(10, ge=1, le=255, description="Unit span only: the most words of a span.")

    @model_validator(mode="after")
    def _check(self) -> MaskingConfig:
        if self.mask_share + self.random_share > 1.0:
            raise ValueError(f"mask_share {self.mask_share} + random_share {self.random_share} is more than 1")
        return self

    def build(self) -> Masking:
        """The same values as the data pipeline takes them."""
        from data_pipeline.batches.masking import Masking  # imports numpy, which `--help` must not wait for

        return Masking(**self.model_dump())


class SourceConfig(Strict):
    """One of several sources of training text."""

    path: str = Field(description="Folder of shards, as `nystrom data prepare` writes it.")
    weight: float = Field(
        ge=0.0,
        allow_inf_nan=False,
        description="Share of the training tokens, in any scale. 0 leaves the source out unless a stage gives it a "
        "weight.",
    )
    name: str = Field(
        "",
        description="Name of the source in `curriculum.N.weights` and in the metrics.",
        json_schema_extra={"left_out": "the folder's name"},
    )

    @model_validator(mode="before")
    @classmethod
    def _name(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and not raw.get("name") and isinstance(raw.get("path"), str):
            return {**raw, "name": Path(raw["path"]).name or "train"}
        return raw


TRAIN_TAGS = ("folder", "sources")


class DataConfig(Strict):
    """Where the tokens are and how they become rows. Paths are relative to the working directory."""

    train: Annotated[
        Annotated[str, Tag(TRAIN_TAGS[0])]
        | Annotated[tuple[SourceConfig, ...], Field(min_length=1), Tag(TRAIN_TAGS[1])],
        Discriminator(lambda value: TRAIN_TAGS[isinstance(value, (list, tuple))]),
    ] = Field(
        description="Folder of shards, as `nystrom data prepare` writes it, or a list of sources with weights. Paths "
        "are relative to the working directory."
    )
    valid: str | None = Field(
        None,
        description="Folder of held-out shards, made with the same tokenizer.",
        json_schema_extra={"left_out": "no validation"},
    )
    tokenizer: str | None = Field(
        None,
        description="Folder of a tokenizer. The run is refused if the shards were made with another one.",
        json_schema_extra={"left_out": "no check"},
    )
    block_length: int | None = Field(
        None,
        gt=0,
        description="Tokens of the unit that is shuffled. Every `seq_len` must divide it. It can't change at a resume, "
        "so set it if longer stages may follow later.",
        json_schema_extra={"left_out": "the longest seq_len"},
    )
    packing: Literal["stream", "documents"] = Field(
        "stream",
        description="stream: rows are cut from the documents laid end to end. documents: whole documents are packed "
        "into rows, and none attends to another.",
    )
    max_padding: float = Field(
        0.02,
        ge=0.0,
        lt=1.0,
        description="Packing documents only: largest share of padding. At 0 documents are cut wherever a block would "
        "not be full.",
    )
    masking: MaskingConfig = Field(
        MaskingConfig(), description="What masked language modeling hides. Objective mlm only."
    )

    @model_validator(mode="after")
    def _check_names(self) -> DataConfig:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"train: two sources are called '{name}': give them names of their own (name: ...)")
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources by name, so that the order of the list in the file does not matter."""
        if isinstance(self.train, str):
            return (SourceConfig(path=self.train, weight=1.0),)
        return tuple(sorted(self.train, key=lambda source: source.name))
