"""Recall from far back: a needle or passkey in a haystack, key-value pairs, a passage that comes again.

Two looks at a checkpoint. *As it is*: rows in its own vocabulary, scored by likelihood, so that small models show
something too. Two figures tell: the right answer against others, and the gain in nats over the same row without what is
asked for. *Trained* (``train_steps``): the network after some steps on the task, as in the synthetic benchmarks; what
its architecture can do, more than what pretraining made of it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any, TypeVar

from data_pipeline.errors import UserError
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.shared.forms import OWN, named_forms, window_tokens
from eval.subject import Subject, choose_precision
from eval.tasks.recall import (
    CommonWordsSettings,
    InductionSettings,
    MQARSettings,
    NeedleSettings,
    RecallSettings,
    RowSettings,
    VariablesSettings,
)
from eval.tasks.recall.common_words import CommonWords
from eval.tasks.recall.induction import Induction
from eval.tasks.recall.mqar import MQAR
from eval.tasks.recall.needle import Needle
from eval.tasks.recall.outcome import View, outcome
from eval.tasks.recall.questions import Kind
from eval.tasks.recall.spread import SpreadMQAR
from eval.tasks.recall.study import study
from eval.tasks.recall.train import default_lr
from eval.tasks.recall.variables import Variables
from eval.tasks.recall.vocabulary import Text, symbols
from pretrain.model.attention.form import Far
from pretrain.model.attention.registry import forms_of

VERSION = 2
# What without training on the task changes no number: left at its default, so that any two models have it alike.
_OF_TRAINING = ("start", "seeds", "train_batch_tokens", "train_lr", "train_length", "precision")
AnyRecall = TypeVar("AnyRecall", bound=RecallSettings)


def resolve(subject: Subject, settings: AnyRecall) -> AnyRecall:
    """Lengths, and with training its learning rate and precision, filled in from the model; raises for rows that it
    cannot read."""
    config, whole = subject.loaded.model_config, subject.trained_length
    found: dict[str, Any] = {}
    if isinstance(settings, InductionSettings):
        if settings.distances is None and whole < 2 * settings.passage:
            raise UserError(
                f"--passage {settings.passage}: a row of {whole} tokens, the longest that the model was trained on, "
                f"does not hold it twice: --passage {whole // 2} or less, or --distances {settings.passage} or more"
            )
        distances = settings.distances or _doubling(settings.passage, whole - settings.passage)
        longest = subject.check_length(max(distances) + settings.passage, "--distances and --passage together,")
        found["distances"] = tuple(sorted(distances))
        lengths: tuple[int, ...] = (longest,)
    else:
        assert isinstance(settings, RowSettings)
        lengths = settings.lengths or tuple(sorted({max(whole // 4, 2), max(whole // 2, 2), whole}))
        found["lengths"] = tuple(sorted(subject.check_length(length, "--lengths") for length in lengths))
    # As asked for, for models of any form: which of these is the model's own is told from its weights.
    found["attention"] = (OWN, *(form for form in settings.attention if form != OWN))
    if not settings.train_steps:
        found |= {name: type(settings).model_fields[name].default for name in _OF_TRAINING}
        return settings.model_copy(update=found)
    found["precision"] = choose_precision(settings.precision, subject.device)
    found["train_lr"] = settings.train_lr or default_lr(config.hidden_size)
    found["train_length"] = settings.train_length or max(lengths)
    if found["train_length"] < min(lengths):
        raise UserError(f"--train-length {found['train_length']}: the shortest rows have {min(lengths)} tokens")
    return settings.model_copy(update=found)


def data(subject: Subject, settings: RecallSettings) -> dict[str, Any]:
    """The held-out text where rows are made of it; else they follow from the settings and the tokenizer alone."""
    found: dict[str, Any] = {"tokenizer": subject.loaded.tokenizer.hash}
    if _reads_text(settings):
        shards = subject.held_out()
        found |= {"path": str(shards.path), "tokens": shards.num_tokens, "shards": shards.fingerprint}
    key = found["tokenizer"] + found.get("shards", "")
    return found | {"hash": hashlib.sha256(key.encode()).hexdigest()}


def run(subject: Subject, settings: RecallSettings, parts: Parts) -> Outcome:
    """Score, train, present; raises :class:`UserError` for settings that the vocabulary or the text does not allow."""
    kind = make_kind(subject, settings)
    window = window_tokens(subject.loaded.model_config)
    found = study(subject, settings, kind, parts)
    return outcome(found, View(_title(settings), kind, window, _note(subject, settings, kind, window)))


def make_kind(subject: Subject, settings: RecallSettings) -> Kind:
    """The task on the subject's vocabulary."""
    tokenizer = subject.loaded.tokenizer
    mask_id = None if subject.causal else tokenizer.mask_id
    assert subject.causal or mask_id is not None  # without one a masked model is not loaded
    if isinstance(settings, MQARSettings):
        made = SpreadMQAR if settings.spread else MQAR
        return made(settings, symbols(tokenizer, settings.symbols, settings.seed), mask_id)
    if isinstance(settings, VariablesSettings):
        return Variables(settings, symbols(tokenizer, settings.symbols, settings.seed), mask_id)
    if isinstance(settings, CommonWordsSettings):
        return CommonWords(settings, symbols(tokenizer, settings.symbols, settings.seed), mask_id)
    if isinstance(settings, InductionSettings):
        assert settings.distances is not None
        if settings.content == "text":
            text = Text(subject.held_out(), max(settings.distances) + settings.passage)
            return Induction(settings, text, mask_id)
        return Induction(settings, symbols(tokenizer, settings.symbols, settings.seed), mask_id)
    assert isinstance(settings, NeedleSettings)
    assert settings.lengths is not None
    hay = Text(subject.held_out(), max(settings.lengths)) if _reads_text(settings) else None
    return Needle(settings, tokenizer, hay, mask_id)


def _reads_text(settings: RecallSettings) -> bool:
    if isinstance(settings, NeedleSettings):
        return settings.haystack == "text"
    return isinstance(settings, InductionSettings) and settings.content == "text"


def _doubling(first: int, last: int) -> tuple[int, ...]:
    """first, 2 first, 4 first and so on, and last."""
    found = []
    while first < last:
        found.append(first)
        first *= 2
    return (*found, last)


def _title(settings: RecallSettings) -> str:
    if isinstance(settings, NeedleSettings):
        return "Passkey" if settings.key == "digits" else "Needle"
    if isinstance(settings, MQARSettings):
        return "Associative recall, pairs spread" if settings.spread else "Associative recall"
    if isinstance(settings, VariablesSettings):
        return "Variable tracking"
    if isinstance(settings, CommonWordsSettings):
        return "Common words"
    assert isinstance(settings, InductionSettings)
    return "Repeated text" if settings.content == "text" else "Repeated random tokens"


_FARTHER: dict[Far, str] = {
    "approximate": ", those farther back through landmarks",
    "unseen": ", and no others",
    "exact": ", and those farther back too",
}


_WHOLE: dict[Far, str] = {
    "approximate": "all tokens through landmarks",
    "unseen": "some tokens only",
    "exact": "all tokens exactly",
}
"""What a layer without a window sees."""


def _note(subject: Subject, settings: RecallSettings, kind: Kind, window: int | None) -> str:
    """What a reader of the numbers must know about this model and these rows."""
    whole, config = subject.trained_length, subject.loaded.model_config
    longer = sorted({cell.length for cell in kind.cells if cell.length > whole})
    parts = []
    if longer:
        parts.append(
            f"Rows of {', '.join(map(str, longer))} tokens are longer than the {whole} that the model was trained on."
        )
    layers = Counter(config.attention_by_layer)
    for name, form in forms_of(config).items():
        if form.window is not None:
            size = form.window.segment_length
            least, most = (form.window.segments - 1) * size + 1, form.window.segments * size
            who = "Each layer" if len(layers) == 1 else f"{name} ({layers[name]} of {config.num_layers} layers)"
            parts.append(f"{who} sees the {least} to {most} nearest tokens exactly{_FARTHER[form.far]}.")
        elif len(layers) > 1:
            parts.append(f"{name} ({layers[name]} of {config.num_layers} layers) sees {_WHOLE[form.far]}.")
    if len(named_forms(config, settings.attention)) > 1:
        parts.append(
            "Forms other than the model's own have the same weights, which were not trained for them; "
            f"own: {config.attention_label}."
        )
    if settings.train_steps:
        start = "the checkpoint" if settings.start == "checkpoint" else "random weights"
        parts.append(f"Trained: {settings.train_steps} steps on the task from {start}.")
    return " ".join(parts)
