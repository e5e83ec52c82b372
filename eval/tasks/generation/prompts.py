"""What is continued, and the real text beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.sources.records import read_records
from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.subject import Subject
from eval.tasks.generation import GenerateSettings


@dataclass(frozen=True)
class Passage:
    """Tokens of a beginning and of what really follows (none for a prompt of one's own)."""

    prompt: list[int]
    real: list[int]


@dataclass(frozen=True)
class Material:
    """``prompts`` are to be continued. ``real`` and ``other``: two sets of held-out passages that do not overlap, each
    as many as there are prompts where the held-out text has so many; empty without held-out text. With prompts from
    held-out text, ``prompts`` is ``real``."""

    prompts: list[Passage]
    real: list[Passage]
    other: list[Passage]


def own_prompts(settings: GenerateSettings) -> list[str]:
    """The texts of ``prompt`` or of the file ``prompts``; none for held-out text.

    Raises :class:`UserError` naming file and line for a file that is missing, empty or of an unknown format.
    """
    return list(settings.prompt) if settings.prompts is None else _read(Path(settings.prompts), settings)


def material(subject: Subject, settings: GenerateSettings) -> Material:
    """Prompts and real text; raises :class:`UserError` where a prompt is needed and there is no held-out text."""
    own = own_prompts(settings)
    if not own:
        real, other = two_sets(subject.held_out(), settings.num_samples, settings)
        return Material(real, real, other)
    tokenizer = subject.loaded.tokenizer
    prompts = [Passage(tokenizer.encode(text) or [tokenizer.eos_id], []) for text in own]
    try:
        real, other = ([], []) if subject.shards is None else two_sets(subject.shards, len(own), settings)
    except UserError:  # too short: then there is nothing to stand beside
        real, other = [], []
    return Material(prompts, real, other)


def two_sets(shards: ShardSet, number: int, settings: GenerateSettings) -> tuple[list[Passage], list[Passage]]:
    """Two sets of at most ``number`` passages, taken in turn over the held-out text, so that both see all of it."""
    found = passages(shards, 2 * number, settings)
    return (found[0::2], found[1::2]) if len(found) > 1 else (found, [])


def passages(shards: ShardSet, number: int, settings: GenerateSettings) -> list[Passage]:
    """At most ``number`` passages that do not overlap, spread evenly over the documents that are long enough.

    A document is cut into as many as fit, what is left over divided between its beginning (often boilerplate) and its
    end. Raises :class:`UserError` if no document is long enough.
    """
    need = settings.prompt_tokens + settings.max_new_tokens
    edges, before = [np.zeros(1, dtype=np.int64)], 0
    for shard in shards.manifest.shards:
        edges.append(shards.document_ends(shard.index).astype(np.int64) + before)
        before += shard.num_tokens
    ends = np.concatenate(edges)
    starts, lengths = ends[:-1], np.diff(ends) - 1  # without the token that closes a document
    fits = lengths // need
    total = int(fits.sum())
    if not total:
        raise UserError(
            f"no document of {shards.path} has a passage of {need} tokens: lower --max-new-tokens or --prompt-tokens"
        )
    chosen = np.unique(((np.arange(number) + 0.5) * total / number).astype(np.int64))
    firsts = np.concatenate([[0], np.cumsum(fits)])
    documents = np.searchsorted(firsts, chosen, side="right") - 1
    margins = (lengths - fits * need) // 2
    places = starts[documents] + margins[documents] + (chosen - firsts[documents]) * need
    rows = shards.read(places, need).tolist()
    return [Passage(row[: settings.prompt_tokens], row[settings.prompt_tokens :]) for row in rows]


def text_between(passage: Sequence[int], places: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text around some tokens of a passage: one part more than there are tokens."""
    return [tokenizer.decode(passage[a + 1 : b]) for a, b in pairwise([-1, *places, len(passage)])]


def content_hash(*parts: object) -> str:
    """32 hexadecimal digits that tell these plain values from others."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:32]


def _read(path: Path, settings: GenerateSettings) -> list[str]:
    field = settings.prompt_field
    found = []
    for record, place in read_records(path, (field,), ("--prompt-field",), quotes=settings.quotes, text_unit="line"):
        text = record[field]
        if not isinstance(text, str):
            raise UserError(f"{path}, {place}: field '{field}' is {type(text).__name__}, not text")
        if text.strip():
            found.append(text)
    if not found:
        raise UserError(f"prompts {path} holds no prompt")
    return found
