"""The data of a regression, and its fits: those of classification with a head of one output and another loss."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from data_pipeline.errors import UserError
from eval.shared.agreement import check_scores
from eval.shared.correlation import correlation
from eval.shared.labelled import Labelled, read_labelled
from eval.tasks.classification.dataset import stands_in
from eval.tasks.classification.finetune import Goal
from eval.tasks.classification.jobs import Fits, word_features
from eval.tasks.classification.search import FOLDS
from eval.tasks.regression import TFIDF_CUT_ROW, TFIDF_ROW, RegressSettings


@dataclass(frozen=True)
class RegressData:
    """Training and test records, and those that choose the epoch (None: carved from training)."""

    train: Labelled
    test: Labelled
    dev: Labelled | None = None

    @classmethod
    def read(cls, settings: RegressSettings) -> RegressData:
        """Read what the (resolved) settings name; raises :class:`UserError` for what is missing or says nothing."""
        assert settings.train
        assert settings.test
        fields = settings.text_field, settings.score_field, settings.text_b_field, settings.quotes
        train = read_labelled(settings.train, *fields, scores=True)
        if settings.train_records is not None and settings.train_records < len(train):
            drawn = np.random.default_rng(0).choice(len(train), settings.train_records, replace=False)
            train = train.take(np.sort(drawn))
        test = read_labelled(settings.test, *fields, scores=True)
        dev = read_labelled(settings.dev, *fields, scores=True) if settings.dev else None
        for part in (train, test, dev):
            if part is not None:
                check_scores(part)
        return cls(train, test, dev)

    def with_train(self, train: Labelled) -> RegressData:
        """The same with other training records."""
        return replace(self, train=train)

    def describe(self) -> dict[str, Any]:
        """What the result says about the data."""
        hashes = [self.train.hash, self.test.hash, *([self.dev.hash] if self.dev else [])]
        return {
            "train": self.train.path,
            "test": self.test.path,
            **({"dev": self.dev.path, "dev_records": len(self.dev)} if self.dev else {}),
            "train_records": len(self.train),
            "test_records": len(self.test),
            "hash": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        }

    @property
    def outputs(self) -> int:
        """Of the head."""
        return 1

    @property
    def scale(self) -> tuple[float, float]:
        """Mean and standard deviation of the training scores."""
        return float(self.train.scores.mean()), float(self.train.scores.std())

    def numbers(self, part: Labelled) -> np.ndarray:
        """(n,) float32: scores less the mean of the training scores, in their standard deviations. So the loss, and the
        learning rates, mean the same for scores from 0 to 1 and from 0 to 100."""
        mean, deviation = self.scale
        return ((part.scores - mean) / deviation).astype(np.float32)

    def seen(self) -> np.ndarray:
        """(n,) bool: which test records have a text that training, or the choice of the epoch, has seen too."""
        return stands_in(self.test, self.train, self.dev)


def squared_error(outputs: Tensor, scores: Tensor) -> Tensor:
    """Squared error of outputs (n, 1) against scores (n,), summed."""
    return nn.functional.mse_loss(outputs[:, 0], scores, reduction="sum")


def spearman_and_loss(outputs: Tensor, scores: Tensor) -> tuple[float, float]:
    """Spearman's correlation of outputs (n, 1) and scores (n,), -1 where it is not defined, and the mean squared
    error."""
    found = float(correlation(outputs[:, 0].double().numpy(), scores.double().numpy(), "spearman"))
    return found if np.isfinite(found) else -1.0, float(squared_error(outputs, scores)) / len(scores)


def correlation_error(found: float, count: int) -> float:
    """About the standard error of a correlation, (1 - r^2) / sqrt(n - 1)."""
    return (1 - found * found) / math.sqrt(max(count - 1, 1))


class RegressFits(Fits):
    """Predictions are in the units of the scores."""

    goal: ClassVar[Goal] = Goal("Spearman", squared_error, spearman_and_loss, correlation_error)
    tfidf_rows: ClassVar[tuple[str, str]] = (TFIDF_ROW, TFIDF_CUT_ROW)
    data: RegressData

    def told(self, outputs: Tensor) -> dict[str, Any]:
        """See :class:`Fits`."""
        return {"predicted": self._scores(outputs[:, 0].double().numpy())}

    def carve(self, labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """A share held out at random, 3 records at the least: a correlation of fewer says nothing."""
        held = max(round(share * len(labels)), 3)
        if len(labels) < held + 1:
            raise UserError(
                f"{self.data.train.path} has {len(labels)} records: at least 4 are needed, 3 of them to choose the "
                "epoch on"
            )
        order = np.random.default_rng(seed).permutation(len(labels))
        return np.sort(order[held:]), np.sort(order[:held])

    def order(self, seed: int) -> np.ndarray:
        """The training records in a random order."""
        return np.random.default_rng(seed).permutation(len(self.data.train))

    def cut_into_folds(self, labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each a (rest, fold) of the indices, at random; of a few records fewer folds, with 3 in each."""
        from sklearn.model_selection import KFold

        count = max(2, min(FOLDS, len(labels) // 3))
        return list(KFold(count, shuffle=True, random_state=0).split(labels))

    def tfidf(self, train: list[list[str]], test: list[list[str]]) -> dict[str, Any]:
        """See :func:`ridge`."""
        return {"predicted": self._scores(ridge(train, self.train.examples.labels, test))}

    def _scores(self, predicted: np.ndarray) -> list[float]:
        mean, deviation = self.data.scale
        return (predicted * deviation + mean).tolist()


def ridge(train: Sequence[Sequence[str]], scores: np.ndarray, test: Sequence[Sequence[str]]) -> np.ndarray:
    """(n,) predictions of ridge regression (penalty 1) from TF-IDF of words and word pairs.

    Of pairs the cosine of the two texts' TF-IDF is a feature too: the words of each alone can't tell likeness. Fitted
    on all of the training records, deterministic; a constant where no text has a word.
    """
    import scipy.sparse
    from sklearn.linear_model import Ridge

    found = word_features(train, test)
    if found is None:
        return np.full(len(test[0]), float(scores.mean()))
    sides = [found, *([likeness] if len(train) == 2 and (likeness := _likeness(train, test)) is not None else [])]
    features, held_out = (scipy.sparse.hstack(side, format="csr") for side in zip(*sides, strict=True))
    return np.asarray(Ridge(alpha=1.0).fit(features, scores.astype(np.float64)).predict(held_out))


def _likeness(train: Sequence[Sequence[str]], test: Sequence[Sequence[str]]) -> tuple[Any, Any] | None:
    """(n, 1) TF-IDF cosines of the two texts of each training and test pair, in standard deviations of the training
    pairs'."""
    import scipy.sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True).fit([*train[0], *train[1]])
    columns = []
    for first, second in (train, test):
        product = vectorizer.transform(first).multiply(vectorizer.transform(second))
        columns.append(np.asarray(product.sum(axis=1)).reshape(-1, 1))
    deviation = float(columns[0].std())
    if deviation == 0:
        return None
    return scipy.sparse.csr_array(columns[0] / deviation), scipy.sparse.csr_array(columns[1] / deviation)
