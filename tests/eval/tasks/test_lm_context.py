"""Loss by context length and pseudo-perplexity, beside naive float64 loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suites_case import subject_of

from data_pipeline.batches import IGNORE
from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.results.statistics import estimate
from eval.subject import Subject
from eval.tasks.language_modeling import ContextSettings, PseudoSettings, context, pseudo
from eval.tasks.language_modeling.masked import noised
from eval.tasks.language_modeling.text import open_stream
from pretrain.model import build_model


def in_float64(subject: Subject) -> Any:
    model = build_model(subject.loaded.model_config).double()
    model.load_state_dict(subject.model.state_dict())
    return model.eval()


def by_context(subject: Subject, settings: ContextSettings) -> Outcome:
    return context.run(subject, context.resolve(subject, settings), Parts())


def test_the_same_targets_under_every_context_causal(
    causal: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "PART_TOKENS", 400)
    subject = subject_of(causal, shards)
    settings = ContextSettings(contexts=(8, 16, 40), probes=12, probe_targets=3)
    outcome = by_context(subject, settings)
    stream = open_stream(subject, settings)
    starts = context.probe_starts(stream, 41, 12)
    eos = np.cumsum([len(d) + 1 for d in shards.documents()]) - 1
    assert not any(((start <= eos) & (eos <= start + 40)).any() for start in starts)  # each in one document
    assert starts.min() < shards.num_tokens // 6
    assert starts.max() > 5 * shards.num_tokens // 6
    model = in_float64(subject)
    for size in (8, 16, 40):
        nats = 0.0
        for start in starts.tolist():
            end = start + 40  # the last target
            window = stream.range(end - size, end + 1)
            with torch.no_grad():
                log_p = model(torch.from_numpy(window[None, :-1])).logits[0].log_softmax(-1)
            nats -= sum(float(log_p[place, window[place + 1]]) for place in range(size - 3, size))
        assert outcome.metrics[f"loss_at_{size}"].value == pytest.approx(nats / 36, rel=1e-5)
        assert outcome.metrics[f"loss_at_{size}"].n == 36
    losses = [outcome.metrics[f"loss_at_{size}"].value for size in (8, 16, 40)]
    gain = outcome.metrics["context_gain"]
    assert gain.value == pytest.approx(losses[0] - losses[2], rel=1e-9)
    assert gain.low is not None
    assert gain.high is not None
    assert gain.low < gain.value < gain.high
    assert [row[6] for row in outcome.tables[0].rows[1:]] == pytest.approx(-np.diff(losses))
    assert outcome.series[0].y == losses
    assert outcome.series[0].x == [8, 16, 40]
    for name, estimator in outcome.estimators.items():
        assert estimate(outcome.records, estimator) == pytest.approx(outcome.metrics[name].value, rel=1e-12)


def test_the_same_targets_under_every_context_masked(masked: Path, shards: ShardSet) -> None:
    subject = subject_of(masked, shards)
    settings = ContextSettings(contexts=(16, 48), probes=20, seed=5)
    outcome = by_context(subject, settings)
    stream = open_stream(subject, settings)
    starts = context.probe_starts(stream, 48, 20)
    eos = np.cumsum([len(d) + 1 for d in shards.documents()]) - 1
    assert not any(((start <= eos) & (eos < start + 48)).any() for start in starts)  # each in one document
    inputs, labels = noised(subject, stream, settings, starts, np.full_like(starts, 48))
    model = in_float64(subject)
    places = range(20, 28)  # the 8 in the middle
    for size in (16, 48):
        begin = (48 - size) // 2
        nats, right, number = 0.0, 0, 0
        for row, label in zip(inputs, labels, strict=True):
            with torch.no_grad():
                log_p = model(torch.from_numpy(row[None, begin : begin + size])).logits[0].log_softmax(-1)
            for place in places:
                if label[place] != IGNORE:
                    nats -= float(log_p[place - begin, label[place]])
                    right += int(log_p[place - begin].argmax()) == label[place]
                    number += 1
        assert outcome.metrics[f"loss_at_{size}"].n == number > 5
        assert outcome.metrics[f"loss_at_{size}"].value == pytest.approx(nats / number, rel=1e-5)
        assert outcome.metrics[f"accuracy_at_{size}"].value == pytest.approx(right / number)


def test_every_place_with_room_in_its_document_can_be_a_probe(causal: Path, shards: ShardSet) -> None:
    stream = open_stream(subject_of(causal, shards), ContextSettings())
    places, begin = [], 0
    for ids in shards.documents():
        places += [begin + i for i in range(len(ids)) if i + 41 <= len(ids)]
        begin += len(ids) + 1
    assert context.probe_starts(stream, 41, 10**6).tolist() == places


def test_contexts_default_to_doubling_up_to_the_length(causal: Path, shards: ShardSet) -> None:
    subject = subject_of(causal, shards)
    assert context.resolve(subject, ContextSettings(length=100)).contexts == (32, 64, 100)
    with pytest.raises(UserError, match="at least two different ones, of at least 8 tokens"):
        context.resolve(subject, ContextSettings(contexts=(4, 64)))
    with pytest.raises(UserError, match="has the 5001 tokens that the longest context needs"):
        by_context(subject, ContextSettings(contexts=(64, 5000)))


@pytest.mark.parametrize("wanted", [30, 10**6])
def test_pseudo_perplexity_equals_a_naive_float64_loop(
    masked: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    monkeypatch.setattr(pseudo, "PART_TOKENS", 4000)
    subject = subject_of(masked, shards)
    length = 20 if wanted == 30 else shards.num_tokens // 3
    if wanted == 30:
        settings = PseudoSettings(length=length, pppl_tokens=30, window_targets=4, seed=2)
    else:  # every token of a short text
        text = shards.tokenizer().decode(next(shards.documents())[:40].tolist())
        path = shards.path.parent / "short.txt"
        path.write_text(text, encoding="utf-8")
        settings = PseudoSettings(length=30, pppl_tokens=wanted, text=(str(path),))
    settings = pseudo.resolve(subject, settings)
    outcome = pseudo.run(subject, settings, Parts())
    stream = open_stream(subject, settings)
    length = settings.length or 0
    starts, _, counts = pseudo.sample(stream, settings)
    model = in_float64(subject)
    nats, number, pieces = 0.0, 0, []
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        row = stream.range(start, start + length)
        places = pseudo.positions(stream, row, start, count, settings.seed)
        assert len(set(places.tolist())) == len(places) == min(count, int((row != shards.eos_id).sum()))
        for place in places.tolist():
            hidden = torch.from_numpy(row.copy())[None]
            hidden[0, place] = shards.mask_id
            with torch.no_grad():
                nats -= float(model(hidden).logits[0, place].log_softmax(-1)[row[place]])
            number += 1
            pieces.append(start + place)
    assert outcome.metrics["pseudo_perplexity"].n == number == (30 if wanted == 30 else length)
    assert outcome.metrics["pseudo_log_likelihood"].value == pytest.approx(-nats / number, rel=1e-5)
    assert outcome.metrics["pseudo_perplexity"].value == pytest.approx(math.exp(nats / number), rel=1e-4)
    if wanted != 30:
        whole = stream.spans(0)
        size, words = len(stream.text(0)[: _chars(stream, length)].encode()), int(whole.words[length])
        assert outcome.metrics["pseudo_bits_per_byte"].value == pytest.approx(nats / size / math.log(2), rel=1e-5)
        assert math.log(outcome.metrics["pseudo_word_perplexity"].value) == pytest.approx(nats / words, rel=1e-5)
    else:
        assert len(starts) == 8
        assert starts[-1] > 2 * shards.num_tokens // 3


def _chars(stream: Any, tokens: int) -> int:
    return len(stream.tokenizer.decode(stream.range(0, tokens).tolist()).rstrip("\ufffd"))


def test_a_causal_model_has_no_pseudo_perplexity(causal: Path, shards: ShardSet) -> None:
    with pytest.raises(UserError, match="measure it with lm"):
        pseudo.resolve(subject_of(causal, shards), PseudoSettings())
