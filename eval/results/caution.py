"""What a reader should know before believing a result: that its items are few, or that its weights are old ones."""

from __future__ import annotations

import json
from pathlib import Path

from eval.results.schema import ModelInfo, Result, read_result_or_none
from eval.results.statistics import FEW
from eval.task import described

TAIL = 1 << 16
"""Bytes at the end of a run's metrics that hold its last records: one is some 500."""


def few_items(result: Result) -> str:
    """A warning for a result whose intervals are over few items, else ""."""
    count = result.records.get("count") or 0
    if not result.estimators or not 0 < count < FEW:
        return ""
    items = "1 item is" if count == 1 else f"{count} items are"
    return f"{items} few: the intervals are wide, and only roughly of 95%"


def reached(run: Path) -> int:
    """Tokens that the run in this folder has seen, by its metrics; 0 where nothing says."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            tokens = json.loads(line)["tokens"]
        except (ValueError, KeyError, TypeError):  # half a line, or a record without
            continue
        if isinstance(tokens, int | float):
            return int(tokens)
    return 0


def outdated(model: ModelInfo, tokens: float) -> str:
    """That a model was scored at fewer tokens than the ``tokens`` its run has seen by now, else ""."""
    if not model.weights_hash or not 0 < model.tokens < tokens:
        return ""
    return f"scored at {short(model.tokens)} tokens, the weights have changed since: the run has seen {short(tokens)}"


def earlier_results(folder: Path, model: ModelInfo) -> list[str]:
    """A line for each result in a results folder that is of other weights than ``model``'s, by name."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        result = read_result_or_none(path)
        if result is None or described(result.task).is_gate or not result.model.weights_hash:
            continue
        if result.model.weights_hash != model.weights_hash:
            at = f"scored at {short(result.model.tokens)} tokens" if result.model.tokens else "of other weights"
            lines.append(f"{path.stem}: {at}, these weights have seen {short(model.tokens)}: evaluate it again")
    return lines


def short(tokens: float) -> str:
    """A large number for people: 1200000 as 1.2M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(tokens) >= size:
            return f"{tokens / size:.3g}{letter}"
    return f"{tokens:.3g}"
