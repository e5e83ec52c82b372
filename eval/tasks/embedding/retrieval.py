"""Retrieval: every query against all documents, by cosine. How high the right ones are ranked."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from eval.results.parts import Parts
from eval.results.schema import Estimator, Metric, Outcome, Result, Table
from eval.results.statistics import bootstrap
from eval.shared.verdict import verdict
from eval.subject import Subject
from eval.tasks.embedding import CHANCE_ROW, MODEL_AS_IS_ROW, MODEL_ROW, RETRIEVAL_TABLE, RetrievalSettings
from eval.tasks.embedding.embed import Texts, as_tokens, cosines
from eval.tasks.embedding.networks import GAINS, PREFIXES, cut_warning, distinct, resolve, scored
from eval.tasks.embedding.pairs import Pairs
from eval.tasks.embedding.ranking import MEASURES, NDCG, chance, measures

__all__ = ["VERSION", "data", "lines", "resolve", "run"]
VERSION = 1
# Similarities held at once: 2^24 float64 are 128 MiB.
_BUDGET = 2**24
SHOWN = 6


def data(subject: Subject, settings: RetrievalSettings) -> dict[str, Any]:
    """What was named, read."""
    return Pairs.read(settings).describe()


def run(subject: Subject, settings: RetrievalSettings, parts: Parts) -> Outcome:
    """Rank the documents by each row's vectors, and set chance beside them."""
    assert settings.max_length
    pairs = Pairs.read(settings)
    found = distinct([pairs.queries, pairs.documents])
    texts = as_tokens(subject.loaded.tokenizer, found.texts, settings.max_length, pairs.path)
    warning = cut_warning(texts, settings.max_length)
    if warning:
        print(f"warning: {warning}", flush=True)
    queries, documents = found.places

    def score(vectors: Any) -> dict[str, list[float]]:
        """Each measure of all queries, and the document that was found first."""
        columns: dict[str, list[float]] = {name: [] for name in (*MEASURES, "rank", "first")}
        of_documents = vectors[documents]
        step = max(1, _BUDGET // len(documents))
        for start in range(0, len(queries), step):
            for place, row in enumerate(cosines(vectors[queries[start : start + step]], of_documents), start):
                values = measures(row, pairs.right[place]) | {"first": int(row.argmax())}
                for name, value in values.items():
                    columns[name].append(value)
        return columns

    rows = scored(subject, settings, texts, score, parts)
    by_chance = chance(len(documents), pairs.right)
    rows[CHANCE_ROW] = [{name: [values[name] for values in by_chance] for name in (*MEASURES, "rank")}]
    ids = pairs.item_ids()
    records = _records(rows, ids, texts, queries)
    table, metrics = _table(rows, ids)
    names = [*(PREFIXES[row] + name for row in (MODEL_ROW, MODEL_AS_IS_ROW) for name in MEASURES), *_gains(records)]
    estimators = {name: Estimator(name) for name in names}
    for name in _gains(records):
        metrics[name] = _measured(records, name)
    metrics["share_of_texts_cut"] = Metric(float(texts.cut.mean()), None, n=len(texts.texts), unit="texts")
    note = verdict({name: metrics[name] for name in _gains(records)}, NDCG.replace("ndcg", "nDCG"))
    note += (
        f" {len(queries):,} different queries, {len(documents):,} different documents. Centred: less the mean of all "
        "these texts' vectors. Equal cosines count as their mean over all orders."
    )
    if pairs.short:
        note += f" {pairs.short:,} documents of fewer than two words are left out."
    table = Table(table.name, table.columns, table.rows, note + (f" {warning}" if warning else ""))
    return Outcome(metrics, [table], samples=_misses(rows, pairs), records=records, estimators=estimators)


def lines(result: Result, records: Path) -> list[str]:
    """For the terminal: which is better, and what the figures can't say."""
    table = result.table(RETRIEVAL_TABLE)
    return textwrap.wrap(table.note, 118) if table is not None else []


def _mean(values: list[dict[str, list[float]]], name: str) -> np.ndarray:
    """(queries,) a measure, the mean of the networks."""
    return np.mean([run[name] for run in values], axis=0)


def _records(
    rows: dict[str, list[dict[str, list[float]]]], ids: list[str], texts: Texts, queries: np.ndarray
) -> list[dict[str, Any]]:
    """A record for each query: all measures of the model, and its gains."""
    columns: dict[str, Any] = {"id": ids, "tokens": texts.lengths[queries].tolist()}
    for row in (MODEL_ROW, MODEL_AS_IS_ROW):
        for name in (*MEASURES, "rank"):
            columns[PREFIXES[row] + name] = rows[row][0][name]
    for name, row in GAINS.items():
        if row in rows:
            columns[name] = (_mean(rows[MODEL_ROW], NDCG) - _mean(rows[row], NDCG)).tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _gains(records: list[dict[str, Any]]) -> list[str]:
    return [name for name in GAINS if name in records[0]]


def _measured(records: list[dict[str, Any]], name: str) -> Metric:
    found = bootstrap(records, Estimator(name))
    return Metric(found.value, True, n=found.n, low=found.low, high=found.high, unit="queries")


def _table(rows: dict[str, list[dict[str, list[float]]]], ids: list[str]) -> tuple[Table, dict[str, Metric]]:
    """A row for each kind of vectors. All measures of the model are metrics, of the others nDCG."""
    metrics: dict[str, Metric] = {}
    cells: list[list[Any]] = []
    for row, runs in rows.items():
        items = [{"id": item} for item in ids]
        for name in MEASURES:
            for item, value in zip(items, _mean(runs, name).tolist(), strict=True):
                item[name] = value
        whole = [float(np.mean(run[NDCG])) for run in runs]
        std = float(np.std(whole, ddof=1)) if len(runs) > 1 else None
        for name in MEASURES:
            if row in (MODEL_ROW, MODEL_AS_IS_ROW) or name == NDCG:
                found = _measured(items, name)
                if std is not None:
                    found = Metric(found.value, True, std, len(runs), found.low, found.high, "networks")
                metrics[PREFIXES.get(row, f"{row}_") + name] = found
        of_row = bootstrap(items, Estimator(NDCG))
        others = [float(_mean(runs, name).mean()) for name in MEASURES if name != NDCG]
        median = float(np.median(_mean(runs, "rank")))
        cells.append([row, of_row.value, std, of_row.low, of_row.high, *others, median, len(runs)])
    names = [name.replace("mrr", "MRR") for name in MEASURES if name != NDCG]
    columns = ["vectors", "nDCG@10", "± std", "low", "high", *names, "median place", "networks"]
    return Table(RETRIEVAL_TABLE, columns, cells), metrics


def _misses(rows: dict[str, list[dict[str, list[float]]]], pairs: Pairs, characters: int = 300) -> list[dict[str, Any]]:
    """The queries whose right document is farthest down, with what was found in its place."""
    of_model = rows[MODEL_ROW][0]
    ranks = np.array(of_model["rank"])
    worst = [i for i in np.argsort(-ranks, kind="stable")[:SHOWN] if ranks[i] > 1]
    return [
        {
            "kind": "not_found",
            "query": pairs.queries[i][:characters],
            "right": pairs.documents[pairs.right[i][0]][:characters],
            "found first": pairs.documents[int(of_model["first"][i])][:characters],
            "place of the right one": float(ranks[i]),
        }
        for i in worst
    ]
