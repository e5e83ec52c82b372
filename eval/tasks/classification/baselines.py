"""What needs no network: bags of words with logistic regression, and the majority class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.tasks.classification.metrics import Predictions


def majority(train: np.ndarray, classes: int, items: int) -> Predictions:
    """The most frequent training class for every item, with the classes' frequencies as probabilities."""
    shares = np.bincount(train, minlength=classes) / len(train)
    return Predictions(np.full(items, int(shares.argmax())), np.tile(shares, (items, 1)))


def tfidf(train: Sequence[Sequence[str]], labels: np.ndarray, test: Sequence[Sequence[str]]) -> Predictions:
    """TF-IDF of words and word pairs (sublinear counts) and logistic regression with C = 10: strong on topics.

    ``train`` and ``test``: one list of texts, or two for pairs, whose features stand side by side. Fitted on all of the
    training records: it has nothing to choose, and so more of them than a network whose epoch is chosen. Deterministic.
    """
    import scipy.sparse
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    columns: list[tuple[Any, Any]] = []
    for first, second in zip(train, test, strict=True):
        vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
        try:
            columns.append((vectorizer.fit_transform(first), vectorizer.transform(second)))
        except ValueError:  # texts without a single word: nothing to count
            continue
    classes = int(labels.max()) + 1
    if not columns:
        return majority(labels, classes, len(test[0]))
    features, held_out = (scipy.sparse.hstack(side, format="csr") for side in zip(*columns, strict=True))
    model = LogisticRegression(C=10.0, max_iter=1000).fit(features, labels)
    probabilities = np.asarray(model.predict_proba(held_out), dtype=np.float64)
    return Predictions(model.classes_[probabilities.argmax(1)].astype(np.int64), probabilities)
