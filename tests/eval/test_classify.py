"""Classification by fine-tuning, on a separable set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from suites_case import subject_of

from data_pipeline.shards.shardset import ShardSet
from eval.classification import task as classification
from eval.classification.finetune import length_batches
from eval.classification.settings import ClassifySettings
from eval.classification.task import SCRATCH_ROW
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.subject import Subject
from pretrain.checkpoint.export import unique_weights, weights_hash


def classify(subject: Subject, settings: ClassifySettings) -> Outcome:
    return classification.run(subject, classification.resolve(subject, settings), Parts())


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_classification_of_a_separable_set(
    kind: str, labelled: tuple[Path, Path], request: pytest.FixtureRequest, shards: ShardSet
) -> None:
    subject = subject_of(request.getfixturevalue(kind), shards)
    before = weights_hash(unique_weights(subject.model))
    train, test = map(str, labelled)

    settings = ClassifySettings(
        train=train, test=test, max_length=64, seeds=2, scratch_seeds=1, epochs=5, batch_size=8, lr=3e-3
    )
    data = classification.ClassifyData.read(settings)
    outcome = classify(subject, settings)
    metrics = outcome.metrics
    majority = max(np.mean(data.numbers(data.test) == c) for c in (0, 1))
    assert metrics["majority_accuracy"].value == pytest.approx(majority)
    assert metrics["tfidf_accuracy"].value > majority
    assert metrics["accuracy"].value > majority + 0.15
    assert metrics["accuracy"].n == 2
    assert metrics["accuracy"].std is not None
    assert {row[0] for row in outcome.tables[0].rows} >= {"fine-tuned", SCRATCH_ROW, "majority class"}
    assert [row[:2] for row in outcome.tables[1].rows] == [["fine-tuned", 0], [SCRATCH_ROW, 0], ["fine-tuned", 1]]
    assert weights_hash(unique_weights(subject.model)) == before  # the other suites must see the checkpoint
    again = classify(subject, settings.model_copy(update={"seeds": 1, "scratch_seeds": 0}))
    first = [row for row in outcome.tables[1].rows if row[:2] == ["fine-tuned", 0]]
    assert again.tables[1].rows == first  # the same seed, the same numbers


def test_length_batches_hold_every_example_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=203)
    indices = np.arange(203)
    found = list(length_batches(lengths, indices, 8, np.random.default_rng(1)))
    assert sorted(np.concatenate(found)) == list(range(203))
    spread = np.mean([np.ptp(lengths[b]) for b in found])
    assert spread < 0.4 * np.mean([np.ptp(lengths[i : i + 8]) for i in range(0, 203, 8)])
