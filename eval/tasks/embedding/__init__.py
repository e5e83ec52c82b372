"""What texts are near to each other by a model's hidden states, without training: settings and registration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_pipeline.sources.reading import Quotes
from eval.task import Bars, ModuleTask, Row, Settings, quotes_field, register

RETRIEVAL_TABLE, STS_TABLE = "retrieval", "sentence similarity"
MODEL_ROW, MODEL_AS_IS_ROW = "model, centred", "model, as it is"
RANDOM_ROW, RANDOM_AS_IS_ROW = "random weights, centred", "random weights, as they are"
AS_IS_ROWS = MODEL_AS_IS_ROW, RANDOM_AS_IS_ROW
TFIDF_ROW = "TF-IDF cosine"
TFIDF_CUT_ROW = f"{TFIDF_ROW}, the same tokens"
CHANCE_ROW = "chance"


class EmbeddingSettings(Settings):
    """The texts, and how each becomes a vector."""

    test: str | None = Field(
        None,
        description="labelled text to score: a file as data prepare takes it (JSONL, CSV, TSV, Parquet), or "
        "hub:OWNER/NAME[/CONFIG]:SPLIT",
    )
    quotes: Quotes = quotes_field()
    test_records: int | None = Field(
        None, ge=2, description="score so many records, drawn at random once; left out: all"
    )
    max_length: int | None = Field(
        None, ge=1, description="tokens read of each text; left out: the longest length of the run"
    )
    pooling: Literal["mean", "cls", "last"] = Field(
        "mean", description="what of the hidden states: the mean over real tokens, the first token or the last real one"
    )
    random_networks: int = Field(3, ge=0, description="networks of the same kind with random weights, set beside it")
    micro_tokens: int = Field(8192, ge=1, description="tokens of one forward pass, padding included")


class RetrievalSettings(EmbeddingSettings):
    """Which text belongs to which, or documents that both are taken from."""

    query_field: str = Field("query", description="field or column with the text that is looked for")
    positive_field: str = Field("positive", description="field or column with the text that is to be found")
    document_field: str | None = Field(
        None,
        description="field with whole documents: beginning and end of each are query and positive, in place of pairs",
    )
    passage_words: int = Field(
        100, ge=1, description="with --document-field: words of a passage, at most half of the document"
    )


class SimilaritySettings(EmbeddingSettings):
    """Pairs of texts with a score."""

    text_field: str = Field("sentence1", description="field or column with the text")
    text_b_field: str = Field("sentence2", description="field with the second text")
    score_field: str = Field("score", description="field or column with the score, a number")


@register
class Retrieval(ModuleTask):
    """See ``retrieval``."""

    name = "retrieval"
    summary = "whether a text's hidden states find the text that belongs to it, beside TF-IDF and random weights"
    settings = RetrievalSettings
    module = "eval.tasks.embedding.retrieval"
    held_out = False
    any_objective = True
    variants = False
    order = 22
    heading = "Retrieval"
    lead = "Each query against all texts, by cosine of pooled hidden states; nothing is trained."
    rows = (
        Row("ndcg@10", "Retrieval nDCG@10, no training", reference="tfidf_ndcg@10"),
        Row("tfidf_ndcg@10", "… TF-IDF, which knows no language", ranked=False),
        Row("random_ndcg@10", "… the same network with random weights", ranked=False),
    )
    bars = Bars(RETRIEVAL_TABLE, "nDCG@10", MODEL_ROW, "pretrained", RANDOM_ROW, "random weights", AS_IS_ROWS)


@register
class Similarity(ModuleTask):
    """See ``similarity``."""

    name = "sts"
    summary = "how cosines of hidden states follow people's scores of likeness, beside TF-IDF and random weights"
    settings = SimilaritySettings
    module = "eval.tasks.embedding.similarity"
    held_out = False
    any_objective = True
    variants = False
    order = 23
    heading = "Sentence similarity"
    lead = "Correlation of the cosine of two texts' hidden states with a score of their likeness; nothing is trained."
    rows = (
        Row("spearman", "Sentence similarity, Spearman, no training", reference="tfidf_spearman"),
        Row("tfidf_spearman", "… TF-IDF, which knows no language", ranked=False),
        Row("random_spearman", "… the same network with random weights", ranked=False),
    )
    bars = Bars(STS_TABLE, "Spearman", MODEL_ROW, "pretrained", RANDOM_ROW, "random weights", AS_IS_ROWS)
