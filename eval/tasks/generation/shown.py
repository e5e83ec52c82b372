"""What the terminal shows of generation: its main measures beside their controls, and some of the texts themselves."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval.results.schema import Result, Table
from eval.tasks.generation.tables import TABLE

COLUMNS = ("text", "distinct-2", "repetition of 4-grams", "perplexity under the model", "self-BLEU", "tokens")
FEW = 3
"""Texts that are shown of prompts which nobody chose."""
WIDTH = 118


def table_of(result: Result) -> Table | None:
    """The rows of all ways of decoding and of the controls, with the columns that fit a terminal."""
    whole = result.table(TABLE)
    if whole is None:
        return None
    places = [whole.columns.index(name) for name in COLUMNS if name in whole.columns]
    return Table(TABLE, [whole.columns[i] for i in places], [[row[i] for i in places] for row in whole.rows])


def text_lines(result: Result, records: Path) -> list[str]:
    """The samples as text, all that the result has where the prompts are the user's own, and the file of the others."""
    own = bool(result.settings.get("prompt") or result.settings.get("prompts"))
    kind = "continuation" if any(s.get("kind") == "continuation" for s in result.samples) else "fill_mask"
    samples = [sample for sample in result.samples if sample.get("kind") == kind]
    shown = samples if own else samples[:FEW]
    lines = [line for sample in shown for line in _lines(sample)]
    what = "numbers" if kind == "fill_mask" else "texts and their numbers"
    return [*lines, f"all {result.records['count']:,} {what}: {records}"]


def _lines(sample: dict[str, Any]) -> Iterator[str]:
    if sample["kind"] == "fill_mask":
        yield from _wrapped("  ", _filled(sample))
        return
    yield from _wrapped("  prompt: ", sample["prompt"])
    yield from _wrapped("  text:   ", sample["text"] or "(the model ended the document at once)")
    yield ""


def _filled(sample: dict[str, Any]) -> str:
    """The passage with its hidden words in brackets, and the likeliest guess beside each that was not found."""
    found = sample["parts"][0]
    for answer, after in zip(sample["answers"], sample["parts"][1:], strict=True):
        right = answer["right"].strip()
        guess = "" if answer["rank_in_top_5"] == 1 else f", guessed {answer['top'][0][0].strip()!r}"
        found += f" [{right}{guess}]{after}"
    return found


def _wrapped(head: str, text: str) -> list[str]:
    """Text in lines below each other, its own line breaks as they are."""
    rows = [row for line in text.splitlines() or [""] for row in textwrap.wrap(line, WIDTH - len(head)) or [""]]
    return [(head if number == 0 else " " * len(head)) + row for number, row in enumerate(rows)]
