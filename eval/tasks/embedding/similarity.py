"""Semantic textual similarity: the correlation of cosines with the scores that people gave to pairs of texts."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from eval.results.parts import Parts
from eval.results.schema import Metric, Outcome, Result, Series, Table
from eval.shared.agreement import check_scores, correlations, estimators_of, gains_of, records_of
from eval.shared.labelled import Labelled, read_labelled
from eval.shared.verdict import verdict
from eval.subject import Subject
from eval.tasks.embedding import MODEL_AS_IS_ROW, MODEL_ROW, STS_TABLE, SimilaritySettings
from eval.tasks.embedding.embed import as_tokens, paired_cosines
from eval.tasks.embedding.networks import GAINS, PREFIXES, cut_warning, distinct, draw, resolve, scored

__all__ = ["VERSION", "data", "lines", "resolve", "run"]
VERSION = 1


def read(settings: SimilaritySettings) -> Labelled:
    """The pairs; raises :class:`UserError` where scores are missing or say nothing."""
    assert settings.test
    fields = settings.text_field, settings.score_field, settings.text_b_field, settings.quotes
    found = read_labelled(settings.test, *fields, scores=True)
    if settings.test_records is not None and settings.test_records < len(found):
        found = found.take(draw(len(found), settings.test_records))
    check_scores(found)
    return found


def data(subject: Subject, settings: SimilaritySettings) -> dict[str, Any]:
    """What was named, read."""
    found = read(settings)
    return {"test": found.path, "records": len(found), "hash": found.hash}


def run(subject: Subject, settings: SimilaritySettings, parts: Parts) -> Outcome:
    """The cosine of each pair by each row's vectors, and its correlations with the scores."""
    assert settings.max_length
    pairs = read(settings)
    assert pairs.seconds is not None
    found = distinct([pairs.texts, pairs.seconds])
    texts = as_tokens(subject.loaded.tokenizer, found.texts, settings.max_length, pairs.path)
    warning = cut_warning(texts, settings.max_length)
    if warning:
        print(f"warning: {warning}", flush=True)
    first, second = found.places
    values = scored(
        subject, settings, texts, lambda vectors: paired_cosines(vectors[first], vectors[second]).tolist(), parts
    )
    rows = {row: [np.array(run) for run in runs] for row, runs in values.items()}
    scores, ids = pairs.scores, pairs.item_ids()
    table, metrics, undefined = correlations(rows, scores, ids, PREFIXES, (MODEL_ROW, MODEL_AS_IS_ROW), "pairs")
    records = records_of(rows, scores, ids, PREFIXES, (MODEL_ROW, MODEL_AS_IS_ROW), GAINS)
    for record, cosine, one, other in zip(records, rows[MODEL_ROW][0], first, second, strict=True):
        record["cosine"] = float(cosine)
        record["tokens"] = int(texts.lengths[one] + texts.lengths[other])
    estimators = estimators_of(records, metrics, GAINS)
    gains = gains_of(records, GAINS, "pairs")
    metrics |= gains
    metrics["share_of_texts_cut"] = Metric(float(texts.cut.mean()), None, n=len(texts.texts), unit="texts")
    said = [verdict(gains, "Spearman"), "Centred: less the mean of all these texts' vectors.", *undefined, warning]
    table = Table(STS_TABLE, ["vectors", *table.columns[1:-1], "networks"], table.rows, " ".join(filter(None, said)))
    return Outcome(metrics, [table], [_curve(rows[MODEL_ROW][0], scores)], records=records, estimators=estimators)


def lines(result: Result, records: Path) -> list[str]:
    """For the terminal: which is better, and what the figures can't say."""
    table = result.table(STS_TABLE)
    return textwrap.wrap(table.note, 118) if table is not None else []


def _curve(cosine: np.ndarray, truth: np.ndarray, buckets: int = 10) -> Series:
    """The mean cosine by score: in up to ten buckets of as many pairs each, equal scores in one."""
    edges = np.unique(np.quantile(truth, np.linspace(0, 1, buckets + 1)[1:-1]))
    place = np.searchsorted(edges, truth, side="left")
    there = np.unique(place)
    x, y = ([float(values[place == b].mean()) for b in there] for values in (truth, cosine))
    labels = "score that people gave", "mean cosine, centred", "cosine by score"
    return Series("cosine by score", x, y, *labels, scale="linear")
