"""Which settings and figures of two results mean the same, so that a difference between them says something."""

from __future__ import annotations

from collections.abc import Sequence

from eval.results.schema import Result
from eval.task import described

PER_TOKEN = {"tokens", "tokens_clean", "targets"}
"""Denominators that count tokens: of another tokenizer, something else. Bytes, words and texts are the same for all."""


def immaterial(task: str) -> frozenset[str]:
    """Settings of a task in which two results may differ and be compared all the same.

    The precision changes how a score is computed and not what it is, but for timings.
    """
    about = described(task)
    return about.immaterial if about.timings else about.immaterial | {"precision"}


def same_unit(metric: str, results: Sequence[Result]) -> bool:
    """Whether a metric counts the same things in all results: not where it is by token and the tokenizers differ."""
    tokenizers = {result.model.tokenizer_hash for result in results} - {""}
    if len(tokenizers) < 2 or described(results[0].task).any_objective:
        return True
    estimators = [result.estimators.get(metric) for result in results]
    return all(found is not None and found.denominator not in PER_TOKEN for found in estimators)
