"""Held-out loss equals a naive float64 computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from suites_case import subject_of

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.shards.summary import summarise
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.subject import Subject
from eval.tasks.language_modeling import LMSettings
from eval.tasks.language_modeling import task as language_modeling
from pretrain.model import build_model


def naive_text(shards: ShardSet, places: list[int]) -> tuple[int, int]:
    """Bytes and words that begin with the tokens at these places, by decoding each document up to each token."""
    tokenizer, chosen, place = shards.tokenizer(), set(places), 0
    size = words = 0
    for ids in shards.documents():
        text = tokenizer.decode(ids.tolist())
        # U+FFFD stands at the end of a prefix that cuts a character, which counts with its first token.
        ends = [len(tokenizer.decode(ids[:n].tolist()).rstrip("\ufffd")) for n in range(len(ids))] + [len(text)]
        for number in range(len(ids)):
            if place + number in chosen:
                begin, end = ends[number], ends[number + 1]
                size += len(text[begin:end].encode())
                for at in range(begin, end):
                    words += not text[at].isspace() and (at == 0 or text[at - 1].isspace())
        place += len(ids) + 1
    return size, words


def in_float64(subject: Subject) -> Any:
    model = build_model(subject.loaded.model_config).double()
    model.load_state_dict(subject.model.state_dict())
    return model.eval()


def lm(subject: Subject, settings: LMSettings) -> Outcome:
    return language_modeling.run(subject, language_modeling.resolve(subject, settings), Parts())


@pytest.mark.parametrize("max_tokens", [None, 500])
def test_causal_numbers_equal_a_naive_float64_computation(
    causal: Path, shards: ShardSet, max_tokens: int | None
) -> None:
    subject = subject_of(causal, shards)
    length = 48
    outcome = lm(subject, LMSettings(length=length, max_tokens=max_tokens))
    stream = [t for d in shards.documents() for t in [*d.tolist(), shards.eos_id]]
    assert len(stream) == shards.num_tokens
    if max_tokens is None:
        starts = list(range(0, len(stream) - 1, length))
    else:
        count, whole = max_tokens // length, (len(stream) - 1) // length
        starts = [i * whole // count * length for i in range(count)]
        assert starts[-1] > len(stream) // 2  # spread over the stream, not its beginning
    model = in_float64(subject)
    nats, targets, by_position = 0.0, [], []
    for start in starts:
        window = stream[start : start + length + 1]
        with torch.no_grad():
            log_p = model(torch.tensor([window[:-1]])).logits[0].log_softmax(-1)
        for place, goal in enumerate(window[1:]):
            nats -= float(log_p[place, goal])
            by_position.append((place, -float(log_p[place, goal])))
            targets.append((start + place + 1, goal))
    n = len(targets)
    metrics = {name: metric.value for name, metric in outcome.metrics.items()}
    assert outcome.metrics["loss"].n == n == (len(stream) - 1 if max_tokens is None else 480)
    assert metrics["loss"] == pytest.approx(nats / n, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / n), rel=1e-4)

    size, words = naive_text(shards, [place for place, _ in targets])
    assert metrics["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-5)
    assert math.log(metrics["word_perplexity"]) == pytest.approx(nats / words, rel=1e-5)

    # Of the whole text and not of the sample, which knows its own tokens: the number of `nystrom data inspect`.
    assert metrics["unigram_entropy"] == pytest.approx(summarise(shards).unigram_entropy, rel=1e-9)
    assert outcome.metrics["unigram_entropy"].higher_is_better is None
    series = outcome.series[0]
    first_bucket = [x for place, x in by_position if place < 8]
    assert series.y[0] == pytest.approx(np.mean(first_bucket), rel=1e-5)
    if max_tokens is not None:  # equal windows: Student's interval of their means
        assert series.x == [3.5, 11.5, 23.5, 39.5]
        means = np.array(first_bucket).reshape(-1, 8).mean(1)
        low, high = scipy.stats.t.interval(0.95, len(means) - 1, means.mean(), scipy.stats.sem(means))
        assert series.low is not None
        assert series.high is not None
        assert [series.low[0], series.high[0]] == pytest.approx([low, high], rel=1e-4)
        assert outcome.tables[1].rows[0][:3] == ["0 to 7", 80, 10]


def test_bytes_of_the_whole_stream_are_those_of_the_text(causal: Path, shards: ShardSet, texts: list[str]) -> None:
    outcome = lm(subject_of(causal, shards), LMSettings(length=64))
    first = shards.tokenizer().decode([int(shards.read(np.array([0]), 1)[0, 0])])
    assert outcome.metrics["bits_per_byte"].n == sum(len(t.encode()) for t in texts) - len(first.encode())


def test_masked_numbers_equal_a_naive_float64_computation(masked: Path, shards: ShardSet) -> None:
    from data_pipeline.batches.loader import validation_batches
    from data_pipeline.batches.masking import Masking

    subject = subject_of(masked, shards)
    outcome = lm(subject, LMSettings(length=64, seed=3))
    model = in_float64(subject)
    nats, right, n = 0.0, 0, 0
    for batch in validation_batches(
        shards, objective="mlm", seq_len=64, rows=1, max_tokens=10**9, seed=3, masking=Masking()
    ):
        with torch.no_grad():
            log_p = model(batch.input_ids).logits[0].log_softmax(-1)
        for place, goal in enumerate(batch.labels[0].tolist()):
            if goal != -100:
                nats -= float(log_p[place, goal])
                right += int(log_p[place].argmax()) == goal
                n += 1
    assert outcome.metrics["masked_loss"].n == n
    assert 0.1 < n / shards.num_tokens < 0.2
    assert outcome.metrics["masked_loss"].value == pytest.approx(nats / n, rel=1e-4)
    assert outcome.metrics["masked_accuracy"].value == pytest.approx(right / n, abs=1.5 / n)
    kinds = [row for row in outcome.tables[0].rows if "targets" in row[0]]
    assert sum(row[3] for row in kinds) == n
    counts = summarise(shards).token_counts
    counts[list(shards.tokenizer().special_ids)] = 0  # never a target
    p = counts[counts > 0] / counts.sum()
    assert outcome.metrics["unigram_entropy"].value == pytest.approx(-(p * np.log(p)).sum(), rel=1e-9)
    few = lm(subject, LMSettings(length=64, seed=3, max_tokens=128))
    assert few.metrics["unigram_entropy"] == outcome.metrics["unigram_entropy"]  # whatever is scored


def test_learned_positions_bound_the_length(export: Callable[..., Path], shards: ShardSet) -> None:
    path = export("short", objective="mlm", positions="learned", max_positions=64)
    with pytest.raises(UserError, match="64 learned positions"):
        language_modeling.resolve(subject_of(path, shards), LMSettings(length=128))


def test_settings_of_the_other_objective_are_refused(causal: Path, masked: Path, shards: ShardSet) -> None:
    """They would change the key of the result, and no number of it."""
    both = {
        causal: {"mask_rate": 0.3, "mask_share": 0.5, "random_share": 0.0},
        masked: {"stride": 8, "record_chars": 0, "contamination": "shards", "contamination_threshold": 0.9},
    }
    for path, given in both.items():
        subject = subject_of(path, shards)
        other = "masked" if path == causal else "causal"
        for name, value in given.items():
            settings = LMSettings(**{name: value})  # type: ignore[arg-type]
            with pytest.raises(
                UserError, match=f"^{name} is for {other} models: .* leave --{name.replace('_', '-')} out"
            ):
                language_modeling.resolve(subject, settings)
        assert language_modeling.resolve(subject, LMSettings(mask_rate=0.15, record_chars=4096)).length == 64
