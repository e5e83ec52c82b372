"""Which settings and figures of two results mean the same, so that a difference between them says something."""

from __future__ import annotations

from collections.abc import Sequence

from eval.results.schema import Result

ANY_OBJECTIVE = {"classify", "efficiency"}
"""Tasks whose figures mean the same for masked and causal models. A masked model's loss is not a causal one's: it sees
both sides of the word."""

PER_TOKEN = {"tokens", "tokens_clean", "targets"}
"""Denominators that count tokens: of another tokenizer, something else. Bytes, words and texts are the same for all."""

_EXTRAS = {
    # What is tried besides; the figures of the model as it was trained do not depend on it.
    "approximation": {"landmarks", "inverse_steps", "segment_lengths", "window_sizes"},
    # None for masked models: the figures of decoding are absent then, the others are the same.
    "efficiency": {"decode_tokens"},
}


def immaterial(task: str) -> set[str]:
    """Settings of a task in which two results may differ and be compared all the same.

    The precision changes how a score is computed and not what it is, but for timings.
    """
    return _EXTRAS.get(task, set()) | ({"precision"} if task != "efficiency" else set())


def same_unit(metric: str, results: Sequence[Result]) -> bool:
    """Whether a metric counts the same things in all results: not where it is by token and the tokenizers differ."""
    tokenizers = {result.model.tokenizer_hash for result in results} - {""}
    if len(tokenizers) < 2 or results[0].task in ANY_OBJECTIVE:
        return True
    estimators = [result.estimators.get(metric) for result in results]
    return all(found is not None and found.denominator not in PER_TOKEN for found in estimators)
