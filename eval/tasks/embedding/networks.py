"""The rows of both tasks: the model and networks with random weights, each centred and as it is, and TF-IDF."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from data_pipeline.errors import UserError
from eval.results.parts import Job, Parts
from eval.shared.labelled import pinned
from eval.shared.pooling import check_pooling
from eval.shared.progress import Progress
from eval.subject import Subject
from eval.tasks.embedding import (
    MODEL_AS_IS_ROW,
    MODEL_ROW,
    RANDOM_AS_IS_ROW,
    RANDOM_ROW,
    TFIDF_CUT_ROW,
    TFIDF_ROW,
    EmbeddingSettings,
)
from eval.tasks.embedding.embed import Texts, centred, embed, network_of, normalised, tfidf

AnyEmbedding = TypeVar("AnyEmbedding", bound=EmbeddingSettings)
Score = Callable[[Any], Any]
"""From normalised vectors (n, d) of the texts, dense or sparse, to plain values."""

PREFIXES = {
    MODEL_ROW: "",
    MODEL_AS_IS_ROW: "as_is_",
    RANDOM_ROW: "random_",
    RANDOM_AS_IS_ROW: "random_as_is_",
    TFIDF_ROW: "tfidf_",
    TFIDF_CUT_ROW: "tfidf_cut_",
}
GAINS = {"gain_over_tfidf": TFIDF_ROW, "gain_over_random": RANDOM_ROW, "gain_of_centring": MODEL_AS_IS_ROW}


def resolve(subject: Subject, settings: AnyEmbedding) -> AnyEmbedding:
    """The length and the commit of a hub dataset filled in; raises for what is missing or cannot be."""
    if not settings.test:
        raise UserError("no text is named: --test FILE (JSONL, CSV, TSV or Parquet)")
    check_pooling(settings.pooling, subject.causal)
    length = subject.check_length(settings.max_length or subject.trained_length, "--max-length")
    return settings.model_copy(update={"max_length": length, "test": pinned(settings.test)})


def scored(subject: Subject, settings: EmbeddingSettings, texts: Texts, score: Score, parts: Parts) -> dict[str, Any]:
    """Row -> what ``score`` gives: a list of one value, of random weights of one for each network."""
    jobs: list[tuple[tuple[str, ...], Job]] = []
    for seed in (None, *range(settings.random_networks)):
        rows: tuple[str, ...] = (MODEL_ROW, MODEL_AS_IS_ROW) if seed is None else (RANDOM_ROW, RANDOM_AS_IS_ROW)
        title = "model" if seed is None else f"random weights, seed {seed}"
        jobs.append((rows, (title, partial(_network, subject, settings, texts, score, seed, title))))
    jobs.append(((TFIDF_ROW,), (TFIDF_ROW, lambda: [score(tfidf(texts.texts))])))
    if texts.cut.any():
        read = partial(texts.read, subject.loaded.tokenizer)
        jobs.append(((TFIDF_CUT_ROW,), (TFIDF_CUT_ROW, lambda: [score(tfidf(read()))])))
    found: dict[str, Any] = {}
    for (of_job, _), values in zip(jobs, parts.map([job for _, job in jobs]), strict=True):
        for row, value in zip(of_job, values, strict=True):
            found.setdefault(row, []).append(value)
    return found


def _network(
    subject: Subject, settings: EmbeddingSettings, texts: Texts, score: Score, seed: int | None, title: str
) -> list[Any]:
    with Progress(len({tuple(ids) for ids in texts.tokens}), title, "text") as progress:
        vectors = embed(
            network_of(subject, seed),
            texts.tokens,
            settings.pooling,
            micro_tokens=settings.micro_tokens,
            pad_id=subject.loaded.tokenizer.pad_id,
            on_batch=progress.update,
        )
    return [score(normalised(centred(vectors))), score(normalised(vectors))]


@dataclass(frozen=True)
class Distinct:
    """Different texts, and of each column the places (n,) of its texts among them."""

    texts: list[str]
    places: list[np.ndarray]


def distinct(columns: Sequence[Sequence[str]]) -> Distinct:
    """Each text once, so that copies have one vector and the mean counts them once."""
    rows: dict[str, int] = {}
    places = [np.array([rows.setdefault(text, len(rows)) for text in column]) for column in columns]
    return Distinct(list(rows), places)


def draw(total: int, records: int | None) -> np.ndarray:
    """Indices of ``records`` records drawn at random, in their order; of all where that is None or more."""
    if records is None or records >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).choice(total, records, replace=False))


def cut_warning(texts: Texts, max_length: int) -> str:
    """How many texts are not read to their end, "" where none is so long."""
    if not texts.cut.any():
        return ""
    return (
        f"{int(texts.cut.sum()):,} of {len(texts.texts):,} different texts ({texts.cut.mean():.1%}) are longer than "
        f"the {max_length} tokens read, and are cut."
    )
