"""The parts of the suite: one fit for each predictor and seed, each a pure function of the data and the settings."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from eval.results.parts import Job
from eval.shared.labelled import Labelled
from eval.shared.progress import Progress, about
from eval.shared.training import carve
from eval.subject import Subject
from eval.tasks.classification import MODEL_ROW, SCRATCH_ROW, TFIDF_CUT_ROW, TFIDF_ROW, FineTuneSettings
from eval.tasks.classification.dataset import nested_order
from eval.tasks.classification.encode import Encoded, encode
from eval.tasks.classification.finetune import CLASSES, Classifier, Evaluation, Examples, Goal, fit, predict
from eval.tasks.classification.metrics import Predictions
from eval.tasks.classification.recipe import Recipe
from eval.tasks.classification.search import FEWEST, FOLDS, Trial
from pretrain.model.transformer import build_model


class FineTuneData(Protocol):
    """The parts of the data, and what of a record is learned."""

    @property
    def train(self) -> Labelled: ...
    @property
    def test(self) -> Labelled: ...
    @property
    def dev(self) -> Labelled | None: ...
    @property
    def outputs(self) -> int:
        """Of the head."""

    def numbers(self, part: Labelled) -> np.ndarray:
        """The targets (n,): class numbers int64, or scores float32."""

    def with_train(self, train: Labelled) -> FineTuneData:
        """The same with other training records."""


class Fits:
    """The data as tokens, and the jobs on it. A subclass has another goal than classes."""

    goal: ClassVar[Goal] = CLASSES
    tfidf_rows: ClassVar[tuple[str, str]] = (TFIDF_ROW, TFIDF_CUT_ROW)
    """TF-IDF on whole texts, and on what the network reads."""

    def __init__(self, subject: Subject, settings: FineTuneSettings, data: FineTuneData) -> None:
        assert settings.lr
        assert settings.scratch_seeds is not None
        self.subject, self.settings, self.data = subject, settings, data
        self.recipe = Recipe(
            epochs=settings.epochs,
            min_steps=settings.min_steps,
            steps=settings.steps,
            patience=settings.patience,
            batch_size=settings.batch_size,
            micro_tokens=settings.micro_tokens,
            lr=settings.lr,
            head_lr=settings.head_lr,
            layer_decay=settings.layer_decay,
            freeze=settings.freeze,
            weight_decay=settings.weight_decay,
            warmup=settings.warmup_share,
            dropout=settings.dropout,
            grad_clip=settings.grad_clip,
            recompute=settings.recompute,
        )
        self.trials: dict[str, Trial] = {}
        """By row, what a search has chosen."""
        self.scratch_seeds = min(settings.scratch_seeds, settings.seeds)
        self.train, self.test = self._encode(data.train), self._encode(data.test)
        self.dev = None if data.dev is None else self._encode(data.dev)
        self.share: list[str] = []
        """Names of the jobs that this process is going to do, for estimates."""
        self.title = ""
        """What stands before the names of the fits."""

    def _encode(self, part: Labelled) -> Encoded:
        assert self.settings.max_length
        return encode(self.subject.loaded.tokenizer, part, self.data.numbers(part), self.settings.max_length)

    def only(self, records: np.ndarray) -> Self:
        """The same with some of the training records."""
        few = copy.copy(self)
        few.data, few.train = self.data.with_train(self.data.train.take(records)), self.train.take(records)
        few.trials, few.share = dict(self.trials), []
        return few

    def order(self, seed: int) -> np.ndarray:
        """The training records in an order of which every beginning is a draw by class."""
        return nested_order(self.train.examples.labels, seed)

    @property
    def hidden_size(self) -> int:
        """Width of the network."""
        return self.subject.loaded.model_config.hidden_size

    def recipe_of(self, row: str) -> Recipe:
        """How the networks of a row are trained: with what a search has chosen, and from scratch in all layers."""
        recipe = replace(self.recipe, freeze=0) if row == SCRATCH_ROW else self.recipe
        return self.trials[row].applied(recipe) if row in self.trials else recipe

    def name(self, row: str, seed: int) -> str:
        """What a fit is called, as a part and in its lines."""
        return f"{self.title}{fit_name(row, seed)}"

    def jobs(self, seeds: Sequence[int] | None = None) -> list[tuple[str, int, Job]]:
        """(row, seed, job) of every fit of the ``seeds`` (default: all).

        TF-IDF once, and again on what the network reads where texts were cut.
        """
        found: list[tuple[str, int, Job]] = []
        for seed in range(self.settings.seeds) if seeds is None else seeds:
            for row in (MODEL_ROW, SCRATCH_ROW) if seed < self.scratch_seeds else (MODEL_ROW,):
                found.append((row, seed, (self.name(row, seed), partial(self.network, row, seed))))
        whole, cut = self.tfidf_rows
        found.append((whole, 0, (f"{self.title}{whole}", self.words)))
        if self.train.cut.any() or self.test.cut.any():
            found.append((cut, 0, (f"{self.title}{cut}", self.words_read)))
        return found

    def fresh(self, row: str, seed: int) -> Classifier:
        """A copy of the checkpoint's network or one with random weights, with a new head."""
        torch.manual_seed(seed)
        config = self.subject.loaded.model_config
        backbone = copy.deepcopy(self.subject.model) if row == MODEL_ROW else build_model(config)
        return Classifier(backbone, self.hidden_size, self.data.outputs, self.recipe.dropout, self.settings.pooling)

    def network(self, row: str, seed: int) -> dict[str, Any]:
        """Fine-tune (or train from scratch) and predict the test items, once, with the weights chosen on the dev
        split."""
        network, recipe = self.fresh(row, seed), self.recipe_of(row)
        examples, train, dev = self.split(seed)
        how: dict[str, Any] = {"device": self.subject.device, "precision": self.settings.precision}
        total = recipe.texts(len(train))
        with Progress(total, self.name(row, seed), "text") as progress:
            said = self._announced(progress, recipe, len(train), len(dev))
            fitted = fit(
                network,
                examples,
                train,
                dev,
                recipe,
                seed=seed,
                goal=self.goal,
                on_batch=progress.update,
                on_evaluation=said,
                **how,
            )
            progress.say(f"the best was epoch {fitted.best.epoch:g}; now the {len(self.data.test):,} test texts")
        how["micro_tokens"] = recipe.micro_tokens
        logits, _ = predict(fitted.model, self.test.examples, np.arange(len(self.data.test)), **how)
        return {
            **self.told(logits),
            "chosen": asdict(fitted.best),
            "curve": [asdict(place) for place in fitted.curve],
        }

    def told(self, outputs: Tensor) -> dict[str, Any]:
        """The predictions from the head's outputs (n, outputs) on the test items, as plain values."""
        return {"predicted": outputs.argmax(-1).tolist(), "probabilities": outputs.double().softmax(-1).tolist()}

    def _announced(self, progress: Progress, recipe: Recipe, train: int, dev: int) -> Callable[[Evaluation], None]:
        """Say that a fit begins, and return what says each look at the development split, with the time to come."""
        fits = [name for name in self.share if not name.endswith(self.tfidf_rows)]
        after = len(fits) - fits.index(progress.title) - 1 if progress.title in fits else 0
        most = f"at most {recipe.epochs} epochs"
        if recipe.epochs is None or recipe.steps is not None:
            most = f"{recipe.total_steps(train):,} steps"
        more = f"; {after} {'fit' if after == 1 else 'fits'} to follow" if after else ""
        progress.say(f"{train:,} texts, {most}, the best chosen on {dev:,} other texts{more}")

        def said(found: Evaluation) -> None:
            rest = f"{about(progress.left())} left"
            if after:
                rest += f", {about(progress.left() + after * progress.whole())} for all fits"
            progress.say(f"epoch {found.epoch:g}: {self.goal.figure} {found.figure:.3f}, loss {found.loss:.3f}, {rest}")

        return said

    def split(self, seed: int) -> tuple[Examples, np.ndarray, np.ndarray]:
        """The examples with the indices to train on and those on which the epoch is chosen."""
        examples = self.train.examples
        if self.dev is None:
            share = min(self.settings.dev_share, self.settings.dev_records / len(examples.labels))
            return examples, *self.carve(examples.labels, share, seed)
        chosen = np.arange(len(self.dev.examples.labels))
        if len(chosen) > self.settings.dev_records:
            drawn = np.random.default_rng(seed).choice(chosen, self.settings.dev_records, replace=False)
            chosen = np.sort(drawn)
        both = Examples(
            [*examples.tokens, *self.dev.examples.tokens],
            np.concatenate([examples.labels, self.dev.examples.labels]),
            examples.pad_id,
        )
        return both, np.arange(len(examples.labels)), chosen + len(examples.labels)

    def carve(self, labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices to train on, and those held out."""
        return carve(labels, share, seed)

    def folds(self) -> tuple[Examples, list[tuple[np.ndarray, np.ndarray]]]:
        """The examples with what the trials of a search are trained on and judged on; see
        :mod:`eval.tasks.classification.search`."""
        examples, train, dev = self.split(0)
        if self.dev is not None or len(dev) >= FEWEST:
            return examples, [(train, dev)]
        folds = self.cut_into_folds(examples.labels)
        enough = np.cumsum([len(dev) for _, dev in folds]) >= FEWEST
        return examples, folds[: int(enough.argmax()) + 1] if enough.any() else folds

    def cut_into_folds(self, labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each a (rest, fold) of the indices, by class."""
        from sklearn.model_selection import StratifiedKFold

        count = min(FOLDS, int(np.bincount(labels).max()))
        with warnings.catch_warnings():  # of a class with fewer records than folds, which some folds then lack
            warnings.simplefilter("ignore", UserWarning)
            return list(StratifiedKFold(count, shuffle=True, random_state=0).split(labels, labels))

    def words(self) -> dict[str, Any]:
        """TF-IDF on the whole texts."""
        train, test = (
            [texts for texts in (part.texts, part.seconds) if texts is not None]
            for part in (self.data.train, self.data.test)
        )
        return self.tfidf(train, test)

    def words_read(self) -> dict[str, Any]:
        """TF-IDF on what the network reads of them."""
        tokenizer = self.subject.loaded.tokenizer
        return self.tfidf(self.train.texts(tokenizer), self.test.texts(tokenizer))

    def tfidf(self, train: list[list[str]], test: list[list[str]]) -> dict[str, Any]:
        """What TF-IDF predicts of the test items; one list of texts for each text of a record."""
        found = tfidf(train, self.train.examples.labels, test)
        return {"predicted": found.classes.tolist(), "probabilities": found.probabilities.tolist()}


def fit_name(row: str, seed: int) -> str:
    """What a fit is called, as a part and in its lines."""
    return f"{row}, seed {seed}"


def predictions(value: dict[str, Any]) -> Predictions:
    """The predictions in a job's value."""
    return Predictions(np.array(value["predicted"], dtype=np.int64), np.array(value["probabilities"], dtype=np.float64))


def majority(train: np.ndarray, classes: int, items: int) -> Predictions:
    """The most frequent training class for every item, with the classes' frequencies as probabilities."""
    shares = np.bincount(train, minlength=classes) / len(train)
    return Predictions(np.full(items, int(shares.argmax())), np.tile(shares, (items, 1)))


def tfidf(train: Sequence[Sequence[str]], labels: np.ndarray, test: Sequence[Sequence[str]]) -> Predictions:
    """TF-IDF of words and word pairs (sublinear counts) and logistic regression with C = 10: strong on topics.

    ``train`` and ``test``: one list of texts, or two for pairs, whose features stand side by side. Fitted on all of the
    training records: it has nothing to choose, and so more of them than a network whose epoch is chosen. Deterministic.
    """
    from sklearn.linear_model import LogisticRegression

    classes = int(labels.max()) + 1
    found = word_features(train, test)
    if found is None:
        return majority(labels, classes, len(test[0]))
    features, held_out = found
    model = LogisticRegression(C=10.0, max_iter=1000).fit(features, labels)
    probabilities = np.asarray(model.predict_proba(held_out), dtype=np.float64)
    return Predictions(model.classes_[probabilities.argmax(1)].astype(np.int64), probabilities)


def word_features(train: Sequence[Sequence[str]], test: Sequence[Sequence[str]]) -> tuple[Any, Any] | None:
    """Sparse TF-IDF features (n, words) of training and test records, those of the texts of a pair side by side; None
    where no text has a word."""
    import scipy.sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

    columns: list[tuple[Any, Any]] = []
    for first, second in zip(train, test, strict=True):
        vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
        try:
            columns.append((vectorizer.fit_transform(first), vectorizer.transform(second)))
        except ValueError:  # texts without a single word: nothing to count
            continue
    if not columns:
        return None
    features, held_out = (scipy.sparse.hstack(side, format="csr") for side in zip(*columns, strict=True))
    return features, held_out
