"""Held-out loss: perplexity by token, word and byte for causal models, masked accuracy and loss for masked ones.

Deterministic: causal models read the held-out stream in windows of ``length`` tokens, ``stride`` apart (side by side
unless said otherwise). Each token is predicted at most once; the very first has no context and never is. Masked models
see fixed noise, a function of the seed alone. Where the rows of training held whole documents that do not see each
other, so do these windows: each document is read by itself, and its first token is not predicted. Sums are in float64,
and the cut of the work into parts depends on the settings alone: the numbers are the same for any number of processes.

Words and bytes are those of the documents' text: the original where it was given as text, what the tokens decode to
where it was given as shards. A word is a run without white space. The cost of a document's end is in the sum of losses
but is neither word nor byte, so word and byte figures are (slightly) on the strict side.
"""

from __future__ import annotations

import hashlib
from typing import Any

from data_pipeline.errors import UserError
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.subject import Subject
from eval.tasks.language_modeling import LMSettings, causal, masked
from eval.tasks.language_modeling.causal import TABLE as TABLE
from eval.tasks.language_modeling.contamination import fingerprint
from eval.tasks.language_modeling.positions import POSITION_SERIES as POSITION_SERIES
from eval.tasks.language_modeling.text import check_source, describe_source, resolve_documents

VERSION = 5
CAUSAL_ONLY = ("stride", "record_chars", "contamination", "contamination_threshold")
MASKED_ONLY = ("mask_rate", "mask_share", "random_share")


def resolve(subject: Subject, settings: LMSettings) -> LMSettings:
    """The window: the longest length of the run unless given, and one the model can read; the stride: the window;
    documents apart where training held them apart.

    Raises :class:`UserError` for settings that do not fit the model or each other.
    """
    check_source(settings)
    length = subject.check_length(settings.length or subject.trained_length, "--length")
    documents = resolve_documents(subject, settings.documents)
    _refuse_of_other_objective(subject, settings)
    if not subject.causal:
        return settings.model_copy(update={"length": length, "documents": documents})
    stride = settings.stride or length
    if stride > length:
        raise UserError(f"--stride {stride} is longer than the window of {length} tokens: some would not be predicted")
    return settings.model_copy(update={"length": length, "stride": stride, "documents": documents})


def _refuse_of_other_objective(subject: Subject, settings: LMSettings) -> None:
    """They would change the key of the result, and nothing else."""
    if subject.causal:
        why = "masked models: a causal one predicts every token and sees no noise"
    else:
        why = "causal models: a masked one is scored on whole windows side by side"
    for name in MASKED_ONLY if subject.causal else CAUSAL_ONLY:
        if getattr(settings, name) != LMSettings.model_fields[name].default:
            raise UserError(f"{name} is for {why}; leave --{name.replace('_', '-')} out")


def data(subject: Subject, settings: LMSettings) -> dict[str, Any]:
    """The held-out text, and the training shards it is looked up in."""
    found = describe_source(subject, settings)
    train = fingerprint(settings)
    if not train:
        return found
    both = hashlib.sha256(f"{found['hash']} {train}".encode()).hexdigest()
    return found | {"training_shards": settings.contamination, "hash": both}


def run(subject: Subject, settings: LMSettings, parts: Parts) -> Outcome:
    """Evaluate by the model's objective; raises :class:`UserError` without held-out text, or with too few tokens."""
    evaluate = causal.evaluate if subject.causal else masked.evaluate
    return evaluate(subject, settings, parts)
