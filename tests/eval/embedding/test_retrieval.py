"""Retrieval and sentence similarity as whole tasks, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from suites_case import WORDS, subject_of

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.results.statistics import bootstrap
from eval.subject import Subject
from eval.tasks.embedding import (
    CHANCE_ROW,
    MODEL_AS_IS_ROW,
    MODEL_ROW,
    RANDOM_AS_IS_ROW,
    RANDOM_ROW,
    TFIDF_CUT_ROW,
    TFIDF_ROW,
    RetrievalSettings,
    SimilaritySettings,
    retrieval,
    similarity,
)
from eval.tasks.embedding.pairs import Pairs, ends


def records(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def find(subject: Subject, settings: RetrievalSettings) -> Outcome:
    return retrieval.run(subject, retrieval.resolve(subject, settings), Parts())


def like(subject: Subject, settings: SimilaritySettings) -> Outcome:
    return similarity.run(subject, similarity.resolve(subject, settings), Parts())


@pytest.fixture(scope="module")
def pairs(root: Path) -> str:
    """40 pairs of which the second holds the words of the first, and more; two have the same positive."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        own = rng.choice(WORDS, 4, replace=False)
        rows.append(
            {"query": " ".join(own), "positive": " ".join(rng.permutation([*own, *own, *rng.choice(WORDS, 3)]))}
        )
    rows.append({"query": "another query", "positive": rows[0]["positive"]})
    return records(root / "pairs.jsonl", rows)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_retrieval_of_pairs(
    kind: str, pairs: str, request: pytest.FixtureRequest, shards: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = subject_of(request.getfixturevalue(kind), shards)
    outcome = find(subject, RetrievalSettings(test=pairs, random_networks=2, max_length=16))
    metrics, table = outcome.metrics, outcome.tables[0]
    said = capsys.readouterr().out
    assert "are longer than the 16 tokens read, and are cut." in said
    assert said.split("warning: ")[1].strip() in table.note
    shown = [MODEL_ROW, MODEL_AS_IS_ROW, RANDOM_ROW, RANDOM_AS_IS_ROW, TFIDF_ROW, TFIDF_CUT_ROW, CHANCE_ROW]
    assert [row[0] for row in table.rows] == shown
    assert [row[-1] for row in table.rows] == [1, 1, 2, 2, 1, 1, 1]
    # 41 queries, 40 documents; of a random order each place is as likely.
    assert metrics["ndcg@10"].n == 41
    gains = 1 / np.log2(np.arange(2, 12))
    assert metrics["chance_ndcg@10"].value == pytest.approx(gains.sum() / 40)
    assert metrics["tfidf_ndcg@10"].value > 0.8
    assert metrics["tfidf_ndcg@10"].value > metrics["tfidf_cut_ndcg@10"].value
    assert metrics["random_ndcg@10"].n == 2
    assert metrics["random_ndcg@10"].std is not None
    difference = metrics["ndcg@10"].value - metrics["tfidf_ndcg@10"].value
    assert metrics["gain_over_tfidf"].value == pytest.approx(difference)
    assert 0 < metrics["share_of_texts_cut"].value < 1
    # The records give the metrics back, with their intervals.
    assert len({record["id"] for record in outcome.records}) == 41
    for name, estimator in outcome.estimators.items():
        found = bootstrap(outcome.records, estimator)
        assert (found.value, found.low, found.high) == (metrics[name].value, metrics[name].low, metrics[name].high)
    worst = outcome.samples[0]
    assert worst["place of the right one"] == max(record["rank"] for record in outcome.records)
    json.dumps([table.rows, outcome.records, outcome.samples])


def test_a_model_that_counts_words_ranks_as_counts_of_words(masked: Path, shards: ShardSet, pairs: str) -> None:
    """With layers that do nothing the mean of the states is that of the tokens' own vectors."""
    subject = subject_of(masked, shards)
    with torch.no_grad():
        for layer in subject.model.layers:
            for parameter in layer.parameters():
                parameter.zero_()
    outcome = find(subject, RetrievalSettings(test=pairs, random_networks=0, max_length=64))
    assert outcome.metrics["ndcg@10"].value > 0.6
    assert "random_ndcg@10" not in outcome.metrics
    assert "gain_over_random" not in outcome.estimators


def test_copies_of_a_positive_are_one_document(tmp_path: Path) -> None:
    rows = [("a", "x"), ("b", "x"), ("a", "y"), ("c", "z"), ("a", "x")]
    path = records(tmp_path / "p.jsonl", [{"anchor": q, "text": p} for q, p in rows])
    found = Pairs.read(RetrievalSettings(test=path, query_field="anchor", positive_field="text"))
    assert (found.queries, found.documents) == (["a", "b", "c"], ["x", "y", "z"])
    assert found.right == [[0, 1], [0], [2]]
    assert found.describe() | {"hash": ""} == {"test": path, "records": 5, "queries": 3, "documents": 3, "hash": ""}
    few = Pairs.read(RetrievalSettings(test=path, query_field="anchor", positive_field="text", test_records=4))
    assert few.records == 4
    assert few.hash != found.hash


def test_both_ends_of_documents_are_disjoint(tmp_path: Path) -> None:
    assert ends("one", 5) is None
    assert ends("a b c d e", 9) == ("a b", "d e")
    assert ends(" a  b\nc d e f", 2) == ("a b", "e f")
    path = records(tmp_path / "d.jsonl", [{"text": text} for text in ("a b c d", "e", "f g", "h i j")])
    found = Pairs.read(RetrievalSettings(test=path, document_field="text"))
    assert (found.queries, found.documents, found.short) == (["a b", "f", "h"], ["c d", "g", "j"], 1)


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([{"query": "a"}], {}, r"no field 'positive'; its fields are: query \(choose with --positive-field\)"),
        ([{"q": "a", "positive": "b"}], {}, "--query-field"),
        ([{"query": "a", "positive": " "}], {}, "line 1: field 'positive' is blank"),
        ([{"query": "a", "positive": 3}], {}, "line 1: field 'positive' is int, not text"),
        ([{"query": "a", "positive": "b"}], {}, "one different text to be found only"),
        ([{"query": "a", "positive": "b"}, {"query": "c", "positive": "b"}], {}, "one different text"),
        ([], {}, "holds no record"),
        ([{"text": "a"}], {"document_field": "text"}, "no document has two words"),
        ([{"text": "a b"}], {"document_field": "body"}, "--document-field"),
    ],
)
def test_pairs_that_are_refused(
    rows: list[dict[str, Any]], changes: dict[str, Any], words: str, causal: Path, shards: ShardSet, tmp_path: Path
) -> None:
    settings = RetrievalSettings(test=records(tmp_path / "p.jsonl", rows), **changes)
    with pytest.raises(UserError, match=words):
        retrieval.data(subject_of(causal, shards), settings)


def test_settings_that_are_refused(causal: Path, export: Callable[..., Path], shards: ShardSet) -> None:
    subject = subject_of(causal, shards)
    for settings, words in [
        (RetrievalSettings(), "no text is named: --test FILE"),
        (RetrievalSettings(test="x", pooling="cls"), "in a causal model has seen nothing but itself"),
        (RetrievalSettings(test="x", max_length=1), "at least 2 tokens"),
    ]:
        with pytest.raises(UserError, match=words):
            retrieval.resolve(subject, settings)
    assert retrieval.resolve(subject, RetrievalSettings(test="x")).max_length == 64


@pytest.fixture(scope="module")
def scored(root: Path) -> list[dict[str, Any]]:
    """60 pairs whose score is how many of the words of the first the second has."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(60):
        first, kept = rng.choice(WORDS, 5, replace=False), int(rng.integers(0, 6))
        others = [word for word in WORDS if word not in first]
        second = [*first[:kept], *rng.choice(others, 5 - kept, replace=False)]
        rows.append(
            {"sentence1": " ".join(first), "sentence2": " ".join(rng.permutation(second)), "score": float(kept)}
        )
    return rows


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_sentence_similarity(
    kind: str, scored: list[dict[str, Any]], request: pytest.FixtureRequest, shards: ShardSet, tmp_path: Path
) -> None:
    subject = subject_of(request.getfixturevalue(kind), shards)
    settings = SimilaritySettings(test=records(tmp_path / "sts.jsonl", scored), random_networks=2)
    outcome = like(subject, settings)
    metrics, table = outcome.metrics, outcome.tables[0]
    truth = [row["score"] for row in scored]
    assert [record["score"] for record in outcome.records] == truth
    cosine = [record["cosine"] for record in outcome.records]
    assert metrics["spearman"].value == pytest.approx(spearmanr(cosine, truth)[0])
    assert metrics["pearson"].value == pytest.approx(pearsonr(cosine, truth)[0])
    assert metrics["tfidf_spearman"].value > 0.9
    low, high = metrics["tfidf_spearman"].low, metrics["tfidf_spearman"].high
    assert low is not None
    assert high is not None
    assert 0.8 < low < metrics["tfidf_spearman"].value < high < 1
    assert [row[0] for row in table.rows] == [MODEL_ROW, MODEL_AS_IS_ROW, RANDOM_ROW, RANDOM_AS_IS_ROW, TFIDF_ROW]
    assert set(outcome.estimators) == {
        "spearman", "pearson", "as_is_spearman", "as_is_pearson", "gain_over_tfidf", "gain_over_random",
        "gain_of_centring",
    }  # fmt: skip
    for name, estimator in outcome.estimators.items():
        assert bootstrap(outcome.records, estimator).value == pytest.approx(metrics[name].value)
    assert "TF-IDF is better than the model" in table.note
    assert outcome.series[0].x == sorted(set(truth))


def test_glue_tsv_parquet_and_jsonl_are_one(
    causal: Path, shards: ShardSet, scored: list[dict[str, Any]], tmp_path: Path
) -> None:
    """GLUE's dev.tsv has quotes that enclose nothing, and further columns."""
    rows = [{**row, "sentence1": f'"{row["sentence1"]}'} for row in scored[:5]]
    header = ["index", "genre", "sentence1", "sentence2", "score"]
    lines = [[str(i), "news", row["sentence1"], row["sentence2"], f"{row['score']:.3f}"] for i, row in enumerate(rows)]
    tsv = tmp_path / "dev.tsv"
    tsv.write_text("".join("\t".join(line) + "\n" for line in [header, *lines]))
    pq.write_table(
        pa.Table.from_pylist([{**row, "label": row.pop("score")} for row in map(dict, rows)]), tmp_path / "dev.parquet"
    )
    subject = subject_of(causal, shards)
    found = [
        similarity.data(subject, SimilaritySettings(test=str(path), score_field=field))
        for path, field in [
            (tsv, "score"),
            (tmp_path / "dev.parquet", "label"),
            (records(tmp_path / "dev.jsonl", rows), "score"),
        ]
    ]
    assert len({item["hash"] for item in found}) == 1
    assert found[0]["records"] == 5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1, 2], "2 records with a score: a correlation of fewer than 3"),
        ([1], "1 record with a score"),
        ([2, 2.0, "2"], "every score is 2.0, and a correlation with a constant is not defined"),
        ([1, 2, float("nan")], "line 3: field 'score' holds nan, not a finite number"),
        ([1, "inf", 2], "line 2: field 'score' holds 'inf', not a finite number"),
        ([1, "good", 2], "line 2: field 'score' holds 'good', not a number"),
        ([1, True, 2], "line 2: field 'score' holds True, not a finite number"),
        ([1, None, 2], "line 2: field 'score' is empty"),
        ([-1, -1.0, -1], "every label is -1"),
        ([1, [2], 3], r"line 2: field 'score' holds \[2\], not a number"),
    ],
)
def test_scores_that_are_refused(values: list[Any], words: str, causal: Path, shards: ShardSet, tmp_path: Path) -> None:
    rows = [{"sentence1": "river", "sentence2": f"stone {i}", "score": value} for i, value in enumerate(values)]
    settings = SimilaritySettings(test=records(tmp_path / "s.jsonl", rows))
    with pytest.raises(UserError, match=words):
        similarity.data(subject_of(causal, shards), settings)


def test_fields_and_texts_that_are_refused(causal: Path, shards: ShardSet, tmp_path: Path) -> None:
    subject = subject_of(causal, shards)
    path = records(tmp_path / "s.jsonl", [{"sentence1": "", "sentence2": "b", "score": 1}])
    for changes, words in [
        ({}, "line 1: field 'sentence1' is blank"),
        ({"score_field": "gold"}, "choose with --score-field"),
        ({"text_b_field": "other"}, "choose with --text-b-field"),
    ]:
        with pytest.raises(UserError, match=words):
            similarity.data(subject, SimilaritySettings(test=path, **changes))


def test_equal_predictions_are_said_to_have_no_correlation(causal: Path, shards: ShardSet, tmp_path: Path) -> None:
    """Texts without a word: TF-IDF finds all pairs equally unlike."""
    rows = [{"sentence1": "? " * i, "sentence2": "! " * i, "score": i} for i in (1, 2, 3, 4)]
    outcome = like(
        subject_of(causal, shards), SimilaritySettings(test=records(tmp_path / "s.jsonl", rows), random_networks=1)
    )
    row = next(row for row in outcome.tables[0].rows if row[0] == TFIDF_ROW)
    assert row[1:9] == [None] * 8
    assert "TF-IDF cosine: all predictions are equal, and no correlation is defined." in outcome.tables[0].note
    assert "tfidf_spearman" not in outcome.metrics
    assert "gain_over_tfidf" not in outcome.metrics
    assert np.isfinite([metric.value for metric in outcome.metrics.values()]).all()


def test_the_report_draws_the_table(causal: Path, shards: ShardSet, pairs: str) -> None:
    """Rows that depend on the run are its own bars or none; the others are drawn once."""
    from eval.report import charts
    from eval.task import task_of

    about = task_of("retrieval").bars
    assert about is not None
    table = find(subject_of(causal, shards), RetrievalSettings(test=pairs, random_networks=1, max_length=16)).tables[0]
    assert (table.name, table.columns[1], table.columns[2]) == (about.table, about.value, "± std")
    names = {row[0] for row in table.rows}
    assert {about.model, about.control, *about.left_out} <= names
    assert names - {about.model, about.control, *about.left_out} == {TFIDF_ROW, TFIDF_CUT_ROW, CHANCE_ROW}
    similar = task_of("sts").bars
    assert similar is not None
    assert similar.left_out == about.left_out
    drawn = charts.bars([("a run", -0.2, None, 0), ("TF-IDF", 0.5, 0.1, None)], "title", "Spearman on the test file")
    assert "Spearman on the test file" in str(drawn)
    assert "-0.200" in str(drawn)
