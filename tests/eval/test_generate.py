"""What the model writes, and its statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from suites_case import subject_of

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.generation import task as generation
from eval.generation.settings import GenerateSettings
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.subject import Subject


def write(subject: Subject, settings: GenerateSettings) -> Outcome:
    return generation.run(subject, settings, Parts())


def test_statistics_of_generated_text() -> None:
    assert generation.distinct([[1, 2, 3, 1]], 1) == 0.75
    assert generation.distinct([[1, 2], [1, 2]], 2) == 0.5
    assert generation.repetition([[1, 2, 3, 4, 1, 2, 3, 4]], 4) == pytest.approx(0.2)
    assert generation.repetition([[1, 2, 3]], 4) == 0.0


def test_continuations_and_their_control(causal: Path, shards: ShardSet) -> None:
    subject = subject_of(causal, shards)
    settings = GenerateSettings(num_samples=3, prompt_tokens=8, max_new_tokens=12)
    outcome = write(subject, settings)
    assert [s["kind"] for s in outcome.samples] == ["continuation"] * 3
    documents = [shards.tokenizer().decode(d) for d in shards.documents()]
    for sample in outcome.samples:
        assert any(sample["prompt"] + sample["real"] in text for text in documents)
    assert [row[0] for row in outcome.tables[0].rows] == ["model", "real continuation (control)"]
    assert write(subject, settings).samples == outcome.samples
    own = write(subject, GenerateSettings(prompt=("a river",), max_new_tokens=4))
    assert own.samples[0]["prompt"] == "a river"
    assert len(own.tables[0].rows) == 1


def test_continuation_nats_equal_the_token_by_token_sum(causal: Path, shards: ShardSet) -> None:
    subject = subject_of(causal, shards)
    ids = shards.read(np.array([0]), 30)[0].tolist()
    naive = 0.0
    for t in range(20, 30):
        with torch.no_grad():
            naive -= float(subject.model(torch.tensor([ids[:t]])).logits[0, -1].log_softmax(-1)[ids[t]])
    assert generation.continuation_nats(subject, ids[:20], ids[20:]) == pytest.approx(naive, rel=1e-4)


def test_filled_masks_join_to_the_passage(masked: Path, shards: ShardSet) -> None:
    outcome = write(subject_of(masked, shards), GenerateSettings(num_samples=2, max_new_tokens=16))
    documents = [shards.tokenizer().decode(d) for d in shards.documents()]
    for sample in outcome.samples:
        answers = [answer["right"] for answer in sample["answers"]] + [""]
        passage = "".join(p + a for p, a in zip(sample["parts"], answers, strict=True))
        assert any(passage in text for text in documents)
        assert all(len(answer["top"]) == 5 for answer in sample["answers"])
    with pytest.raises(UserError, match="causal"):
        write(subject_of(masked, shards), GenerateSettings(prompt=("x",)))
