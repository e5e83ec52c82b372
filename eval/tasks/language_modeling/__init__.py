"""Held-out loss, its curve over context, and pseudo-perplexity: settings and registration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_pipeline.sources.reading import Quotes
from eval.task import ModuleTask, Row, Settings, quotes_field, register


class TextSettings(Settings):
    """Where held-out text comes from, if not from shards, and how much of it a window holds."""

    length: int | None = Field(None, ge=2, description="window in tokens; left out: the longest length of the run")
    text: tuple[str, ...] = Field(
        (),
        description="held-out text instead of shards: files, folders or globs of text, JSONL, CSV, TSV or Parquet",
    )
    dataset: str | None = Field(
        None, description="held-out text instead of shards: a dataset of the hub, or a folder laid out like one"
    )
    dataset_config: str | None = Field(None, description="configuration of dataset")
    dataset_split: str = Field("test", description="split of dataset")
    dataset_revision: str | None = Field(None, description="commit, branch or tag of dataset")
    text_field: str = Field("text", description="field or column with the text")
    text_unit: Literal["file", "line"] = Field("file", description="what a document is in plain text files")
    quotes: Quotes = quotes_field()
    seed: int = Field(0, ge=0, description="of random choices")

    @property
    def own_text(self) -> str:
        """The option that names it."""
        return "--text" if self.text else "--dataset" if self.dataset else ""


class MaskSettings(TextSettings):
    """The noise that masked models are scored under."""

    mask_rate: float = Field(0.15, gt=0, lt=1, description="share of the tokens that are targets (masked models)")
    mask_share: float = Field(0.8, ge=0, le=1, description="of the targets, share replaced by the mask token")
    random_share: float = Field(0.1, ge=0, le=1, description="of the targets, share replaced by a random token")


class DocumentSettings(Settings):
    """Whether a window may hold several documents."""

    documents: Literal["auto", "apart", "stream"] = Field(
        "auto",
        description="apart: no window holds two documents, and their first tokens are not predicted; stream: windows "
        "of the documents laid end to end; auto: as the model was trained (data.packing of the run)",
    )


class LMSettings(DocumentSettings, MaskSettings):
    """Windows, the unit of uncertainty, and what to look for in the training text."""

    max_tokens: int | None = Field(
        None, ge=1, description="evaluate so many held-out tokens, spread evenly; left out: all"
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="new tokens that each window predicts (causal models); left out: the length, windows side by side",
    )
    record_chars: int = Field(
        4096,
        ge=0,
        description="documents are scored in passages of at most so many characters, over which intervals are made; "
        "0: whole documents",
    )
    contamination: str | None = Field(
        None, description="shards of the training text: tell which passages stand in them, and the loss on the others"
    )
    contamination_threshold: float = Field(
        0.5, gt=0, le=1, description="share of a passage's 13-grams that must be found to set it aside"
    )


class ContextSettings(MaskSettings):
    """Which contexts, and on how many targets."""

    contexts: tuple[int, ...] = Field(
        (), description="tokens of context, the longest may exceed the trained length; left out: 32, 64, ... length"
    )
    probes: int = Field(256, ge=2, description="places of the text whose tokens are scored under every context")
    probe_targets: int = Field(8, ge=1, description="tokens scored at each place (causal models)")


class PseudoSettings(DocumentSettings, TextSettings):
    """How many positions are masked in turn."""

    pppl_tokens: int = Field(1024, ge=1, description="positions that are masked, one at a time")
    window_targets: int = Field(8, ge=1, description="of them, how many in each window")


@register
class LanguageModeling(ModuleTask):
    """See ``task``."""

    name = "lm"
    summary = "held-out loss: perplexity, bits per byte, by position; masked accuracy"
    settings = LMSettings
    module = "eval.tasks.language_modeling.task"
    order = 10
    heading, lead = "Language modelling", "How well the model predicts text it has not seen."
    rows = (
        Row("loss", "Held-out loss, nats per token", reference="unigram_entropy"),
        Row("perplexity", "Held-out perplexity, per token"),
        Row("word_perplexity", "Held-out perplexity, per word"),
        Row("bits_per_byte", "Held-out bits per byte"),
        Row("masked_accuracy", "Masked accuracy, held-out"),
        Row("masked_loss", "Masked loss, held-out, nats", reference="unigram_entropy"),
        Row("unigram_entropy", "… the loss of knowing only how frequent tokens are", ranked=False),
    )


@register
class Context(ModuleTask):
    """See ``context``."""

    name = "context"
    summary = "does more context help? the same held-out tokens under contexts of different lengths"
    settings = ContextSettings
    module = "eval.tasks.language_modeling.context"
    order = 11
    heading = "Context"
    lead = "Whether more context helps: the same held-out tokens after contexts of different lengths."


@register
class PseudoPerplexity(ModuleTask):
    """See ``pseudo``."""

    name = "pppl"
    summary = "pseudo-perplexity of a masked model: held-out tokens masked one at a time"
    settings = PseudoSettings
    module = "eval.tasks.language_modeling.pseudo"
    order = 12
    heading, lead = "Pseudo-perplexity", "Masked models: held-out tokens hidden one at a time."
