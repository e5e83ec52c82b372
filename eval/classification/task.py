"""Classification by fine-tuning: the checkpoint against the same network untrained, TF-IDF and the majority class.

The epoch is chosen on a split carved from the training file; the test file is scored once for each seed, with the
chosen weights. Seeds change the split, the order and the dropout (and the start of the weights, from scratch).
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data_pipeline.errors import UserError
from eval.classification.finetune import (
    Classifier,
    Examples,
    Recipe,
    default_lr,
    fast_precision,
    fit,
    predict,
)
from eval.classification.labelled import Labelled, carve, class_names, read_labelled
from eval.classification.settings import ClassifySettings
from eval.results.parts import Parts
from eval.results.schema import Metric, Outcome, Table
from eval.subject import Subject
from pretrain.model.transformer import build_model

VERSION = 2
TABLE = "classification"
SEEDS_TABLE = "by seed"
MODEL_ROW = "fine-tuned"
SCRATCH_ROW = "same network from scratch"
TFIDF_ROW = "TF-IDF + logistic regression"
MAJORITY_ROW = "majority class"


@dataclass(frozen=True)
class ClassifyData:
    """Training and test records with the classes, checked against each other."""

    train: Labelled
    test: Labelled
    classes: list[str]

    @classmethod
    def read(cls, train: str, test: str, text_field: str, label_field: str) -> ClassifyData:
        """Read both files; raises :class:`UserError` for what is missing or does not fit."""
        first, second = (read_labelled(path, text_field, label_field) for path in (train, test))
        return cls(first, second, class_names(first, second))

    def describe(self) -> dict[str, Any]:
        """What the result says about the data."""
        joined = hashlib.sha256((self.train.hash + self.test.hash).encode()).hexdigest()
        return {
            "train": self.train.path,
            "test": self.test.path,
            "train_records": len(self.train),
            "test_records": len(self.test),
            "classes": self.classes,
            "hash": joined,
        }

    def numbers(self, part: Labelled) -> np.ndarray:
        """Class numbers (n,) int64."""
        index = {name: i for i, name in enumerate(self.classes)}
        return np.array([index[label] for label in part.labels], dtype=np.int64)


@dataclass(frozen=True)
class Score:
    """Accuracy and macro-averaged F1 on the test file."""

    accuracy: float
    macro_f1: float


def resolve(subject: Subject, settings: ClassifySettings) -> ClassifySettings:
    """The length, the learning rate and the precision filled in from the model; raises for data that is not named."""
    if not (settings.train and settings.test):
        raise UserError("classify needs labelled text: --train FILE --test FILE (JSONL, CSV, TSV or Parquet)")
    max_length = settings.max_length or subject.trained_length
    return settings.model_copy(
        update={
            "max_length": subject.check_length(max_length, "--max-length"),
            "scratch_seeds": settings.seeds if settings.scratch_seeds is None else settings.scratch_seeds,
            "precision": fast_precision(subject.device) if settings.precision == "auto" else settings.precision,
            "lr": settings.lr or default_lr(subject.loaded.model_config.hidden_size),
        }
    )


def data(subject: Subject, settings: ClassifySettings) -> dict[str, Any]:
    """Both files, read."""
    return _read(settings).describe()


def _read(settings: ClassifySettings) -> ClassifyData:
    assert settings.train
    assert settings.test
    return ClassifyData.read(settings.train, settings.test, settings.text_field, settings.label_field)


def run(subject: Subject, settings: ClassifySettings, parts: Parts) -> Outcome:
    """Fine-tune for every seed, from the checkpoint and from random weights, and set the baselines beside them."""
    data = _read(settings)
    assert settings.max_length
    assert settings.lr
    assert settings.scratch_seeds is not None
    recipe = Recipe(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        head_lr=settings.head_lr,
        weight_decay=settings.weight_decay,
        dropout=settings.dropout,
        grad_clip=settings.grad_clip,
    )
    config = subject.loaded.model_config
    train, cut_train = _tokenize(subject, data.train, data, settings.max_length)
    test, cut_test = _tokenize(subject, data.test, data, settings.max_length)
    scores: dict[str, list[Score]] = {MODEL_ROW: []}
    scratch_seeds = min(settings.scratch_seeds, settings.seeds)
    seed_rows: list[list[Any]] = []
    total = (settings.seeds + scratch_seeds) * recipe.epochs * len(carve(train.labels, settings.dev_share, 0)[0])
    with tqdm(total=total, desc="classify", unit="doc", disable=None) as bar:
        for seed in range(settings.seeds):
            rest, dev = carve(train.labels, settings.dev_share, seed)
            for row in (MODEL_ROW, SCRATCH_ROW) if seed < scratch_seeds else (MODEL_ROW,):
                torch.manual_seed(seed)
                backbone = copy.deepcopy(subject.model) if row == MODEL_ROW else build_model(config)
                backbone.requires_grad_(True)
                network = Classifier(backbone, config.hidden_size, len(data.classes), recipe.dropout)
                bar.set_postfix_str(f"seed {seed}, {row}")
                fitted = fit(
                    network, train, rest, dev, recipe,
                    seed=seed, device=subject.device, precision=settings.precision, progress=bar,
                )  # fmt: skip
                logits, labels = predict(
                    fitted.model, test, np.arange(len(test.labels)), device=subject.device, precision=settings.precision
                )
                score = _score(labels.numpy(), logits.argmax(-1).numpy())
                scores.setdefault(row, []).append(score)
                seed_rows.append([row, seed, fitted.best_epoch, fitted.dev_accuracy, score.accuracy, score.macro_f1])
    for name, score in _baselines(subject, data, train, test, max(cut_train, cut_test)).items():
        scores[name] = [score]
    return _outcome(scores, seed_rows, len(data.test), max(cut_train, cut_test))


def _outcome(scores: dict[str, list[Score]], seed_rows: list[list[Any]], tested: int, cut: float) -> Outcome:
    rows: list[list[Any]] = []
    for name, runs in scores.items():
        row: list[Any] = [name]
        for values in ([s.accuracy for s in runs], [s.macro_f1 for s in runs]):
            row += [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None]
        rows.append([*row, len(runs)])
    by_name = {row[0]: row for row in rows}
    metrics = {
        prefix + name: Metric(by_name[row][column], True, by_name[row][column + 1], by_name[row][5])
        for prefix, row in (
            ("", MODEL_ROW),
            ("scratch_", SCRATCH_ROW),
            ("tfidf_", TFIDF_ROW),
            ("majority_", MAJORITY_ROW),
        )
        for name, column in (("accuracy", 1), ("macro_f1", 3))
        if row in by_name
    }
    metrics["share_of_texts_cut"] = Metric(cut, False, n=tested)
    return Outcome(
        metrics,
        [
            Table(TABLE, ["predictor", "accuracy", "± std", "macro F1", "± std", "seeds"], rows),
            Table(
                SEEDS_TABLE, ["predictor", "seed", "epoch chosen", "dev accuracy", "accuracy", "macro F1"], seed_rows
            ),
        ],
    )


def _tokenize(subject: Subject, part: Labelled, data: ClassifyData, max_length: int) -> tuple[Examples, float]:
    """Token ids cut to ``max_length``, and the share of texts that were cut. An empty text becomes one end token."""
    tokenizer = subject.loaded.tokenizer
    tokens = tokenizer.encode_batch(part.texts)
    cut = sum(len(ids) > max_length for ids in tokens) / len(tokens)
    return Examples(
        [ids[:max_length] or [tokenizer.eos_id] for ids in tokens], data.numbers(part), tokenizer.pad_id
    ), cut


def _baselines(subject: Subject, data: ClassifyData, train: Examples, test: Examples, cut: float) -> dict[str, Score]:
    """TF-IDF on the whole texts, on the same tokens as the model where texts were cut, and the majority class."""
    truth = data.numbers(data.test)
    majority = Counter(train.labels.tolist()).most_common(1)[0][0]
    result = {TFIDF_ROW: _tfidf(data.train.texts, train.labels, data.test.texts, truth)}
    if cut > 0:
        decode = subject.loaded.tokenizer.decode
        shortened = [[decode(list(ids)) for ids in part.tokens] for part in (train, test)]
        result[f"{TFIDF_ROW}, the same tokens"] = _tfidf(shortened[0], train.labels, shortened[1], truth)
    result[MAJORITY_ROW] = _score(truth, np.full(len(truth), majority))
    return result


def _tfidf(train: list[str], labels: np.ndarray, test: list[str], truth: np.ndarray) -> Score:
    """Words and word pairs, sublinear counts, C = 10: strong on topics; all of the training file, nothing to choose."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), LogisticRegression(C=10.0, max_iter=1000)
    )
    try:
        model.fit(train, labels)
    except ValueError:  # texts without a single word: nothing to count
        return _score(truth, np.full(len(truth), Counter(labels.tolist()).most_common(1)[0][0]))
    return _score(truth, model.predict(test))


def _score(truth: np.ndarray, predicted: np.ndarray) -> Score:
    from sklearn.metrics import f1_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class that is never predicted counts as F1 0, which is meant
        macro = f1_score(truth, predicted, average="macro", zero_division=0.0)
    return Score(float((truth == predicted).mean()), float(macro))
