"""Pooling, batches in parts, cutting of pairs: what fine-tuning is made of, against naive computations."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suites_case import subject_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from data_pipeline.shards.shardset import ShardSet
from eval.shared.labelled import Labelled
from eval.shared.pooling import Pooling
from eval.shared.training import micro_batches
from eval.tasks.classification.encode import Encoded, cut_pair, encode
from eval.tasks.classification.finetune import Classifier, Examples, fit, predict
from eval.tasks.classification.recipe import Recipe

CPU: dict[str, Any] = {"device": torch.device("cpu"), "precision": "fp32"}


def examples(shards: ShardSet, count: int = 24) -> Examples:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(10, shards.vocab_size, size=int(n)).tolist() for n in rng.integers(1, 40, size=count)]
    return Examples(tokens, rng.integers(0, 3, size=count), shards.tokenizer().pad_id)


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_is_that_of_each_text_alone(
    kind: str, pooling: Pooling, request: pytest.FixtureRequest, shards: ShardSet
) -> None:
    backbone = subject_of(request.getfixturevalue(kind), shards).model
    data = examples(shards, 6)
    network = Classifier(backbone, 32, 3, 0.0, pooling).eval()
    ids, lengths, _ = data.collate(np.arange(6))
    with torch.no_grad():
        found = network.pool(ids, lengths)
        other = network.pool(torch.where(ids == data.pad_id, 7, ids), lengths)  # whatever stands in the padding
        for row, tokens in zip(found, data.tokens, strict=True):
            states = backbone(torch.tensor([tokens]), hidden=True).hidden[0]
            expected = {"mean": sum(states) / len(states), "cls": states[0], "last": states[-1]}[pooling]
            torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other, found, atol=0, rtol=0)


def test_micro_batches_hold_every_row_once_within_their_bound() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=203)
    indices = np.random.default_rng(1).permutation(203)[:150]
    found = list(micro_batches(lengths, indices, 256))
    assert sorted(np.concatenate(found)) == sorted(indices)
    assert all(len(part) * lengths[part].max() <= 256 for part in found)
    assert [len(part) for part in micro_batches(lengths, indices[:3], 1)] == [1, 1, 1]  # a row goes at any length


def test_a_batch_in_parts_trains_as_the_whole_batch(masked: Path, shards: ShardSet) -> None:
    data = examples(shards)
    weights, curves, sizes = [], [], []
    for micro_tokens in (10**6, 64):
        network = Classifier(copy.deepcopy(subject_of(masked, shards).model), 32, 3, 0.0)
        network.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].numel()))
        recipe = Recipe(epochs=3, batch_size=8, lr=1e-3, dropout=0.0, micro_tokens=micro_tokens)
        fitted = fit(network, data, np.arange(18), np.arange(18, 24), recipe, seed=0, **CPU)
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
        curves.append([place.loss for place in fitted.curve])
        sizes.append(0)
    middle = sizes.index(0)
    assert max(sizes[:middle]) > 64 >= max(sizes[middle:])
    torch.testing.assert_close(weights[0], weights[1], atol=2e-4, rtol=0)
    start = torch.cat([p.detach().flatten() for p in subject_of(masked, shards).model.parameters()])
    assert (weights[0][: len(start)] - start).abs().max() > 1e-3  # it did train
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


def test_predictions_come_in_the_order_asked_for(causal: Path, shards: ShardSet) -> None:
    data = examples(shards)
    torch.manual_seed(0)
    network = Classifier(subject_of(causal, shards).model, 32, 3, 0.1)
    torch.nn.init.normal_(network.head.weight)
    order = np.random.default_rng(3).permutation(24)
    logits, labels = predict(network, data, order, micro_tokens=100, **CPU)
    assert labels.tolist() == data.labels[order].tolist()
    for row, index in zip(logits, order, strict=True):
        alone, _ = predict(network, data, np.array([index]), **CPU)
        torch.testing.assert_close(row, alone[0], atol=1e-4, rtol=1e-4)


def test_steps_bound_the_run_and_patience_ends_it(causal: Path, shards: ShardSet) -> None:
    data = examples(shards)

    def curve(**settings: Any) -> list[float]:
        network = Classifier(copy.deepcopy(subject_of(causal, shards).model), 32, 3, 0.0)
        recipe = Recipe(**({"batch_size": 8} | settings))
        fitted = fit(network, data, np.arange(16), np.arange(16, 24), recipe, seed=0, **CPU)
        highest = max(place.figure for place in fitted.curve)
        enough = highest - math.sqrt(highest * (1 - highest) / 8)
        best = min((place for place in fitted.curve if place.figure >= enough), key=lambda place: place.loss)
        assert fitted.best == best
        logits, labels = predict(fitted.model, data, np.arange(16, 24), **CPU)
        assert float((logits.argmax(-1) == labels).float().mean()) == best.figure  # the weights are that place's
        assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(best.loss, rel=1e-4)
        return [place.epoch for place in fitted.curve]

    assert curve(epochs=3) == [1.0, 2.0, 3.0]
    assert curve(epochs=20, steps=25) == [1.5, 3.0, 4.5, 6.0, 7.5, 9.0, 10.5, 12.0, 12.5]
    assert curve(epochs=2, steps=100) == [0.5, 1.0, 1.5, 2.0]
    assert curve(epochs=4, steps=6, batch_size=2) == [0.5, 0.75]  # a pass over the 8 for each 4 steps, and the last
    stopped = curve(epochs=30, patience=2, lr=0.05, head_lr=1.0)
    assert 3 <= len(stopped) < 30


@pytest.mark.parametrize("budget", [2, 5, 8, 13])
def test_pairs_are_cut_from_the_longer_text(budget: int) -> None:
    library = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    library.pre_tokenizer = Whitespace()
    library.enable_truncation(budget, strategy="longest_first")
    for first in range(12):
        for second in range(12):
            found = cut_pair(first, second, budget)
            lengths = [first, second]
            while sum(lengths) > budget:
                lengths[0 if lengths[0] > lengths[1] else 1] -= 1
            assert found == tuple(lengths)
            ids = library.encode("a " * first, "b " * second).ids
            assert sum(found) == len(ids)
            assert abs(found[1] - sum(ids)) <= 1  # the library gives an odd token to the longer text


def test_encoding_of_texts_and_pairs(shards: ShardSet) -> None:
    def read(found: Encoded) -> list[list[int]]:
        return [np.asarray(tokens).tolist() for tokens in found.examples.tokens]

    tokenizer = shards.tokenizer()
    first, second = ["river stone cloud lamp", "", "seven"], ["quiet", "", "window paper ghost violin " * 5]
    ids = [[tokenizer.encode(text) for text in column] for column in (first, second)]
    labels = np.zeros(3, dtype=np.int64)
    whole = encode(tokenizer, Labelled(first, ["x"] * 3, "file", "hash", second), labels, 500)
    eos = tokenizer.eos_id
    assert read(whole) == [[*a, eos, *b] for a, b in zip(*ids, strict=True)]
    assert not whole.cut.any()
    assert {np.asarray(tokens).dtype.name for tokens in whole.examples.tokens} == {"uint16"}  # 2 bytes a token, not 40
    short = encode(tokenizer, Labelled(first, ["x"] * 3, "file", "hash", second), labels, 8)
    assert all(len(tokens) <= 8 for tokens in short.examples.tokens)
    assert short.lengths.tolist() == [len(a) + 1 + len(b) for a, b in zip(*ids, strict=True)]
    assert short.cut.tolist() == [n > 8 for n in short.lengths]
    assert read(short)[2] == [*ids[0][2], eos, *ids[1][2][: 7 - len(ids[0][2])]]
    assert short.texts(tokenizer)[0][2].split() == ["seven"]
    single = encode(tokenizer, Labelled(first, ["x"] * 3, "file", "hash"), labels, 4)
    assert read(single) == [ids[0][0][:4], [eos], ids[0][2][:4]]
