"""A look at what the model writes: continuations of prompts (causal) or filled-in masks (masked)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.results.parts import Parts
from eval.results.schema import Outcome, Result
from eval.subject import Subject
from eval.tasks.generation import GenerateSettings
from eval.tasks.generation.continuations import run_continuations
from eval.tasks.generation.fill import run_fill
from eval.tasks.generation.judges import Judges
from eval.tasks.generation.prompts import content_hash, own_prompts
from eval.tasks.generation.shown import table_of, text_lines

VERSION = 6


def resolve(subject: Subject, settings: GenerateSettings) -> GenerateSettings:
    """The settings as they are; lengths are checked where the prompts are known.

    Raises :class:`UserError` for what a masked model cannot do.
    """
    given = [name for name in ("prompt", "prompts", "reference", "features", "copies") if getattr(settings, name)]
    if given and not subject.causal:
        raise UserError(
            f"--{given[0]} is for causal models; a masked model fills in tokens of the held-out text: leave it out"
        )
    return settings


def data(subject: Subject, settings: GenerateSettings) -> dict[str, Any]:
    """Where prompts and real text come from, and the other checkpoints that judge."""
    prompts = own_prompts(settings)
    shards = subject.shards if prompts else subject.held_out()
    found: dict[str, Any] = {"path": str(shards.path), "held_out": shards.fingerprint} if shards is not None else {}
    if prompts:
        found |= {"prompts": len(prompts), "prompts_hash": content_hash(prompts)}
    if settings.reference or settings.features:
        judges = Judges.of(subject, settings)
        found["features"] = judges.features.info().identity
        found["reference"] = judges.reference.info().identity if judges.reference is not None else None
    if settings.copies:
        found["copies"] = ShardSet.open(settings.copies).fingerprint
    return found | {"hash": content_hash({key: value for key, value in found.items() if key != "path"})}


def run(subject: Subject, settings: GenerateSettings, parts: Parts) -> Outcome:
    """Samples and their statistics; raises :class:`UserError` for impossible settings or too little held-out text."""
    return (run_continuations if subject.causal else run_fill)(subject, settings, parts)


def lines(result: Result, records: Path) -> list[str]:
    """For the terminal: the main measures of all rows, and texts."""
    from eval.console import table_lines

    table = table_of(result)
    return [*(table_lines(table) if table is not None else []), "", *text_lines(result, records)]
