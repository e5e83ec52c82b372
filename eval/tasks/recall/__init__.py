"""The recall tasks: their settings and their registration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from eval.task import ModuleTask, Settings, register
from pretrain.model.attention.registry import pattern_of

KEY = "{key}"


class RecallSettings(Settings):
    """What all recall tasks have: how many rows, which forms of attention, and training on the task."""

    rows: int = Field(
        16,
        ge=1,
        description="rows scored in each cell: a depth and length, a number of pairs and length, or a distance",
    )
    attention: tuple[str, ...] = Field(
        ("own",),
        min_length=1,
        description="forms of attention set side by side, by their names, a pattern by layer as window/window/nystrom; "
        "own: as the checkpoint was trained",
    )
    train_steps: int = Field(
        0, ge=0, description="also after so many steps of training on the task; 0: the checkpoint as it is, only"
    )
    start: Literal["checkpoint", "scratch"] = Field(
        "checkpoint", description="training on the task begins with these weights"
    )
    seeds: int = Field(1, ge=1, description="fine-tunings from different random seeds")
    train_batch_tokens: int = Field(4096, ge=1, description="tokens of one step of training on the task")
    train_lr: float | None = Field(
        None, gt=0, description="peak learning rate of training on the task; left out: 0.25 / hidden_size"
    )
    train_length: int | None = Field(
        None, ge=2, description="train on rows of at most so many tokens; left out: on all lengths that are scored"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of fine-tuning; auto: bf16 where it is fast"
    )
    seed: int = Field(0, ge=0, description="of random choices")

    @field_validator("attention")
    @classmethod
    def _known_forms(cls, forms: tuple[str, ...]) -> tuple[str, ...]:
        for form in forms:
            if form != "own":
                pattern_of(form)
        return forms

    @model_validator(mode="after")
    def _distinct(self) -> RecallSettings:
        for name, value in self:
            if isinstance(value, tuple) and len(set(value)) != len(value):
                raise ValueError(f"{name}: {' '.join(map(str, value))} has one twice")
        return self


class RowSettings(RecallSettings):
    """What the tasks have that are scored by length."""

    lengths: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="tokens of a row; left out: a quarter, a half and all of the run's longest length",
    )


class NeedleSettings(RowSettings):
    """One key in a haystack, by depth and length."""

    depths: tuple[int, ...] = Field(
        (0, 25, 50, 75, 100), min_length=1, description="where the needle is, in percent from the row's beginning"
    )
    haystack: Literal["text", "noise", "filler"] = Field(
        "text",
        description="text: held-out text; noise: random tokens; filler: the sentences of Mohtashami and Jaggi (2023)",
    )
    key: Literal["word", "digits"] = Field("word", description="word: a word of one token; digits: a number")
    digits: int = Field(5, ge=1, description="of the number that is the key")
    choices: int = Field(10, ge=2, description="words the key is told from, itself included; for digits it is the ten")
    sentence: str = Field(" The secret word is {key}. Remember it.", description="the needle, with {key} in it")
    question: str = Field(
        " What is the secret word? The secret word is {key}.", description="the row's end, with {key} in it"
    )

    @model_validator(mode="after")
    def _check(self) -> NeedleSettings:
        for depth in self.depths:
            if not 0 <= depth <= 100:
                raise ValueError(f"depths: {depth} is not between 0 and 100 percent")
        for name in ("sentence", "question"):
            text = getattr(self, name)
            if text.count(KEY) != 1 or not text.split(KEY)[0].strip():
                raise ValueError(f"{name}: {text!r} must have {KEY} in it, once, and words before it")
        return self


class MQARSettings(RowSettings):
    """Many keys with values, asked for later in the row."""

    pairs: tuple[int, ...] = Field((4, 8, 16), min_length=1, description="keys with a value in a row")
    gap: int = Field(0, ge=0, description="filler between the last pair and the first place for a query, tokens")
    symbols: int = Field(256, ge=32, description="different tokens that random rows are made of")
    spread: float = Field(
        0,
        ge=0,
        lt=1,
        description="share of the row, from its beginning, in which the pairs stand anywhere; 0: packed at its start",
    )
    values: int = Field(1, ge=1, description="values of a key, each in a pair of its own; several need spread")

    @model_validator(mode="after")
    def _check(self) -> MQARSettings:
        if any(pairs < 2 for pairs in self.pairs):
            raise ValueError("pairs: at least 2, or there is nothing to tell apart")
        if self.values > 1 and not self.spread:
            raise ValueError(f"values: {self.values} of a key need the pairs spread, for example spread 0.5")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Without ``spread`` and ``values`` where they are at their defaults: results from before them keep their
        keys."""
        found = super().as_dict()
        return {name: value for name, value in found.items() if name not in _LATER or value != _LATER[name]}


_LATER = {"spread": 0, "values": 1}


class VariablesSettings(RowSettings):
    """Chains of assignments, by hops, chains and length."""

    hops: tuple[int, ...] = Field(
        (0, 1, 2, 4), min_length=1, description="assignments between a value and the variable asked for; 0: none"
    )
    chains: tuple[int, ...] = Field((4,), min_length=1, description="chains of assignments in a row")
    symbols: int = Field(256, ge=32, description="different tokens that random rows are made of")

    @model_validator(mode="after")
    def _check(self) -> VariablesSettings:
        if min(self.hops) < 0:
            raise ValueError(f"hops: {min(self.hops)} is negative")
        if min(self.chains) < 2:
            raise ValueError("chains: at least 2, or there is nothing to tell apart")
        return self


class CommonWordsSettings(RowSettings):
    """Words of which one came most often, by ratio of frequencies and length."""

    ratios: tuple[int, ...] = Field(
        (2, 4, 8), min_length=1, description="how many times as often as another option the commonest word comes"
    )
    choices: int = Field(10, ge=2, description="words the commonest is told from, itself included")
    symbols: int = Field(256, ge=32, description="different tokens that random rows are made of")

    @model_validator(mode="after")
    def _check(self) -> CommonWordsSettings:
        if min(self.ratios) < 2:
            raise ValueError(f"ratios: {min(self.ratios)} is less than 2: no word would be the commonest")
        return self


class InductionSettings(RecallSettings):
    """A passage that comes again, by distance."""

    content: Literal["random", "text"] = Field("random", description="random: random tokens; text: held-out text")
    distances: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="tokens from a passage back to its first occurrence; left out: powers of two up to the run's "
        "longest length",
    )
    passage: int = Field(32, ge=2, description="tokens of the passage that comes again")
    symbols: int = Field(256, ge=32, description="different tokens that random rows are made of")
    mask_rate: float = Field(0.15, gt=0, lt=1, description="share of the tokens that are targets (masked models)")

    @model_validator(mode="after")
    def _check(self) -> InductionSettings:
        if self.distances is not None and min(self.distances) < self.passage:
            raise ValueError(f"distances: {min(self.distances)} is shorter than the passage of {self.passage} tokens")
        return self


@register
class NeedleTask(ModuleTask):
    """See ``needle`` and ``task``."""

    name = "needle"
    summary = "a word or passkey in a long row, by depth and length, as the model is and trained on it"
    settings = NeedleSettings
    module = "eval.tasks.recall.task"
    order, section = 80, 30
    heading = "Needle"
    lead = "A word or passkey hidden in a long text and asked for at its end, by depth and length."


@register
class MQARTask(ModuleTask):
    """See ``mqar`` and ``task``."""

    name = "mqar"
    summary = "multi-query associative recall: key-value pairs, asked for later, by number and length"
    settings = MQARSettings
    module = "eval.tasks.recall.task"
    order, section = 81, 31
    heading = "Associative recall"
    lead = "Values found again by their keys: what an attention can hold of its past (MQAR)."


@register
class InductionTask(ModuleTask):
    """See ``induction`` and ``task``."""

    name = "induction"
    summary = "a passage that comes again, random or real text: what its first occurrence is worth, by distance"
    settings = InductionSettings
    module = "eval.tasks.recall.task"
    order, section = 82, 32
    heading = "Induction"
    lead = "Whether a passage seen once is continued when it comes again, by the distance between."


@register
class VariablesTask(ModuleTask):
    """See ``variables`` and ``task``."""

    name = "variables"
    summary = "variable tracking: chains of assignments, by hops, chains and length"
    settings = VariablesSettings
    module = "eval.tasks.recall.task"
    order, section = 83, 33
    heading = "Variable tracking"
    lead = "The value of a variable, through a chain of assignments that are spread over the row (RULER)."


@register
class CommonWordsTask(ModuleTask):
    """See ``common_words`` and ``task``."""

    name = "common-words"
    summary = "which of some words came most often, by ratio of frequencies and length"
    settings = CommonWordsSettings
    module = "eval.tasks.recall.task"
    order, section = 84, 34
    heading = "Common words"
    lead = "The word that came most often, told from others: evidence that is spread over the whole row (RULER)."
