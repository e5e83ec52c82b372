"""What a group of results was measured on, in words: which text, how much of it is there, and how much was scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.report.compare import Member
from eval.report.numbers import number, words
from eval.report.tables import over
from eval.results.schema import Result

SOURCES = ("path", "dataset", "source", "text", "train", "test")
# Files that are named; of more, their number.
MOST_FILES = 3


def lead_of(members: Sequence[Member]) -> str:
    """A sentence or two, where all of them were measured on the same data; "" where nothing is known of it."""
    first = members[0].result
    if any(member.result.data != first.data for member in members):
        return ""
    named, counts = source_of(first), _counts(first.data)
    scored = {scored_of(member.result) for member in members}
    parts = [f"Measured on {named}" + (f" ({counts})" if named and counts else counts)] if named or counts else []
    if len(scored) == 1 and "" not in scored:
        parts.append(f"scored: {scored.pop()}")
    return "; ".join(parts)


def source_of(result: Result) -> str:
    """The text or files that a result was measured on, "" where they have no name."""
    found = []
    for key in SOURCES:
        value = result.data.get(key)
        if not value:
            continue
        files = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        more = f" and {len(files) - MOST_FILES} more" if len(files) > MOST_FILES else ""
        prefix = f"{words(key)} " if key in ("train", "test", "source") else ""
        found.append(prefix + ", ".join(files[:MOST_FILES]) + more)
    return ", ".join(found)


def scored_of(result: Result) -> str:
    """How much was scored of what is there: "4,915 targets in 128 items"; "" where the result does not say."""
    names = [name for name in result.estimators if name in result.metrics]
    amount = over(result, names[0]) if names else ""
    count = result.records.get("count")
    if not count:
        return ""
    items = f"{number(count)} {'item' if count == 1 else 'items'}"
    unit = amount.partition(" ")[2]
    return f"{amount} in {items}" if unit and unit not in ("items", "item", "seeds", "seed", "texts") else items


def _counts(data: dict[str, Any]) -> str:
    """What the data holds: "538,025 tokens, 168 documents"."""
    counts = [
        (value if isinstance(value, int) else len(value), words(key))
        for key, value in data.items()
        if not isinstance(value, bool) and isinstance(value, int | list) and value and key not in SOURCES
    ]
    return ", ".join(f"{number(n)} {singular(name) if n == 1 else name}" for n, name in counts)


def singular(name: str) -> str:
    """ "classes" as "class", "documents" as "document"."""
    return name.removesuffix("es") if name.endswith("sses") else name.removesuffix("s")
