"""Where the tokens are, how they become rows, and what is hidden in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from data_pipeline.batches.masking import Masking
from pretrain.config.strict import Strict


class MaskingConfig(Strict):
    """What masked language modeling hides (``data_pipeline/batches/masking.py``); read only for ``objective: mlm``."""

    rate: float = Field(
        0.15,
        gt=0.0,
        lt=1.0,
        description="share of ordinary tokens that become targets, in validation and where a stage says nothing else",
    )
    mask_share: float = Field(
        0.8, ge=0.0, le=1.0, description="of the targets, how many are replaced by the mask token"
    )
    random_share: float = Field(0.1, ge=0.0, le=1.0, description="of the targets, how many by a random ordinary token")
    unit: Literal["token", "word", "span"] = Field(
        "token", description="what becomes a target as a whole: a token, a word, or a span of words (SpanBERT)"
    )
    span_p: float = Field(0.2, gt=0.0, le=1.0, description="span: parameter of the geometric length in words")
    span_max: int = Field(10, ge=1, le=255, description="span: the most words")

    @model_validator(mode="after")
    def _check(self) -> MaskingConfig:
        if self.mask_share + self.random_share > 1.0:
            raise ValueError(f"mask_share {self.mask_share} + random_share {self.random_share} is more than 1")
        return self

    def build(self) -> Masking:
        """The same values as the data pipeline takes them."""
        return Masking(**self.model_dump())


class SourceConfig(Strict):
    """One of several sources of training text."""

    path: str = Field(description="folder of shards written by `nystrom data prepare`")
    weight: float = Field(
        ge=0.0, allow_inf_nan=False, description="share of the tokens; any scale, 0 leaves the source out"
    )
    name: str = Field("", description="what stages and metrics call it; left out: the folder's name")

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
    ] = Field(description="folder of shards written by `nystrom data prepare`, or a list of sources")
    valid: str | None = Field(None, description="held-out shards; without them there is no validation in the loop")
    tokenizer: str | None = Field(None, description="tokenizer folder to check the shards against; normally left out")
    block_length: int | None = Field(
        None, gt=0, description="tokens of the unit that is shuffled; left out: the longest seq_len of the curriculum"
    )
    packing: Literal["stream", "documents"] = Field(
        "stream",
        description="stream: rows are cut from the documents laid end to end; documents: whole documents are packed "
        "into rows, and none attends to another",
    )
    max_padding: float = Field(0.02, ge=0.0, lt=1.0, description="packing documents: share of padding at most")
    masking: MaskingConfig = MaskingConfig()

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
