"""Regression by fine-tuning: its settings and its registration."""

from __future__ import annotations

from pydantic import Field

from eval.task import Bars, ModuleTask, Row, register
from eval.tasks.classification import MODEL_ROW, SCRATCH_ROW, FineTuneSettings

TABLE = "regression"
TFIDF_ROW = "TF-IDF + ridge regression"
TFIDF_CUT_ROW = f"{TFIDF_ROW}, the same tokens"


class RegressSettings(FineTuneSettings):
    """Of fine-tuning on scores."""

    score_field: str = Field("score", description="field or column with the score, a number")


@register
class Regression(ModuleTask):
    """See ``task``."""

    name = "regress"
    summary = "fine-tuning on scores of texts or of pairs, beside the same network from scratch and TF-IDF"
    settings = RegressSettings
    module = "eval.tasks.regression.task"
    held_out = False
    any_objective = True
    variants = False
    order = 21
    heading = "Regression"
    lead = (
        "Fine-tuned on scores of texts, beside the same network from random weights and a model that knows no language."
    )
    rows = (
        Row("spearman", "Regression, Spearman, fine-tuned", reference="tfidf_spearman"),
        Row("tfidf_spearman", "… TF-IDF, which knows no language", ranked=False),
        Row("scratch_spearman", "… the same network from scratch", ranked=False),
    )
    bars = Bars(TABLE, "Spearman", MODEL_ROW, "pretrained", SCRATCH_ROW, "from scratch")
