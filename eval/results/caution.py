"""What a reader should know before believing a result: that its items are few, or that its weights are old ones."""

from __future__ import annotations

from eval.results.schema import ModelInfo, Result
from eval.results.statistics import FEW


def few_items(result: Result) -> str:
    """A warning for a result whose intervals are over few items, else ""."""
    count = result.records.get("count") or 0
    if not result.estimators or not 0 < count < FEW:
        return ""
    items = "1 item is" if count == 1 else f"{count} items are"
    return f"{items} few: the intervals are wide, and only roughly of 95%"


def outdated(model: ModelInfo, tokens: float) -> str:
    """That a model was scored at fewer tokens than the ``tokens`` its run has seen by now, else ""."""
    if not model.weights_hash or not 0 < model.tokens < tokens:
        return ""
    return f"scored at {short(model.tokens)} tokens, the weights have changed since: the run has seen {short(tokens)}"


def short(tokens: float) -> str:
    """A large number for people: 1200000 as 1.2M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(tokens) >= size:
            return f"{tokens / size:.3g}{letter}"
    return f"{tokens:.3g}"
