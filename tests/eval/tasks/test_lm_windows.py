"""Strided windows, passages and the sources of text of held-out loss."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from suites_case import subject_of
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data_pipeline.errors import UserError
from data_pipeline.prepare.plan import plan_preparation
from data_pipeline.prepare.run import prepare
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.results.statistics import estimate, paired_bootstrap
from eval.shared import scoring
from eval.subject import Subject
from eval.tasks.language_modeling import LMSettings, task, windows
from eval.tasks.language_modeling.passages import pieces, records_of
from eval.tasks.language_modeling.spans import Aligner, cut_passages
from eval.tasks.language_modeling.text import TextStream
from eval.tasks.language_modeling.windows import strided
from pretrain.model import build_model


def lm(subject: Subject, settings: LMSettings) -> Outcome:
    return task.run(subject, task.resolve(subject, settings), Parts())


@pytest.mark.parametrize(("available", "length", "stride"), [(100, 16, 16), (100, 16, 5), (97, 16, 1), (9, 16, 4)])
def test_strided_windows_predict_each_token_once_with_enough_context(available: int, length: int, stride: int) -> None:
    found = strided(available, length, stride, None)
    predicted: list[int] = []
    for start, width, scored in zip(found.starts, found.widths, found.scored, strict=True):
        assert width <= length
        for target in range(start + width + 1 - scored, start + width + 1):
            assert target - start >= min(length - stride + 1, target)  # tokens of context
            predicted.append(int(target))
    assert predicted == list(range(1, available + 1))


def test_a_sample_of_strided_windows_is_spread_and_predicts_the_stride() -> None:
    found = strided(1000, 16, 4, 40)
    assert len(found) == 10
    assert found.targets == 40
    assert found.starts[0] == 0
    assert 850 < found.starts[-1] <= 984
    assert (found.starts % 4 == 0).all()
    assert (found.widths == 16).all()


@pytest.mark.parametrize("max_tokens", [None, 300])
def test_strided_loss_equals_a_naive_float64_loop(
    causal: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch, max_tokens: int | None
) -> None:
    monkeypatch.setattr(windows, "PART_TOKENS", 200)  # many parts, cut inside passages
    monkeypatch.setattr(scoring, "FORWARD_TOKENS", 100)
    monkeypatch.setattr(scoring, "LOGIT_BUDGET", 3000)  # a few positions of the head at a time
    subject = subject_of(causal, shards)
    length, stride = 32, 12
    outcome = lm(subject, LMSettings(length=length, stride=stride, max_tokens=max_tokens, record_chars=100))
    model = build_model(subject.loaded.model_config).double()
    model.load_state_dict(subject.model.state_dict())
    model.eval()
    stream = [t for d in shards.documents() for t in [*d.tolist(), shards.eos_id]]
    last = len(stream) - 1
    if max_tokens is None:
        spans = [(0, 1, min(length, last))]  # window's start, first and last target
        while spans[-1][2] < last:
            end = spans[-1][2]
            spans.append((end + stride - length, end + 1, min(end + stride, last)))
    else:
        whole = 1 + (last - length) // stride
        starts = [i * whole // 25 * stride for i in range(25)]
        spans = [(start, start + length - stride + 1, start + length) for start in starts]
    nats, number = 0.0, 0
    for start, low, high in spans:
        with torch.no_grad():
            log_p = model(torch.tensor([stream[start:high]])).logits[0].log_softmax(-1)
        for target in range(low, high + 1):
            nats -= float(log_p[target - 1 - start, stream[target]])
            number += 1
    assert outcome.metrics["loss"].n == number == (last if max_tokens is None else 300)
    assert outcome.metrics["loss"].value == pytest.approx(nats / number, rel=1e-5)
    assert f"{stride} apart" in outcome.tables[0].note
    # Of the first positions one window tells, or none: that is no mean, and one point is no curve.
    first, second, last_bucket = [["0 to 7", 8, 1], ["8 to 15", 8, 1], ["16 to 31", number - 16, len(spans)]]
    rows = outcome.tables[1].rows
    expected = [first, second, last_bucket] if max_tokens is None else [["16 to 31", 300, 25]]
    assert [row[:3] for row in rows] == expected
    assert [row[3] is None for row in rows] == ([True, True, False] if max_tokens is None else [False])
    assert outcome.series == []
    assert "before position 20: leave the stride out" in outcome.tables[1].note


def test_records_give_the_metrics_and_do_not_depend_on_the_parts(
    causal: Path, shards: ShardSet, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of(causal, shards)
    settings = LMSettings(length=48, record_chars=200)
    outcome = lm(subject, settings)
    for name, estimator in outcome.estimators.items():
        metric = outcome.metrics[name]
        assert estimate(outcome.records, estimator) == pytest.approx(metric.value, rel=1e-12)
        assert metric.low is not None
        assert metric.high is not None
        assert metric.low < metric.value < metric.high
    assert max(record["document"] for record in outcome.records) == len(texts) - 1
    assert sum(record["tokens"] for record in outcome.records) == shards.num_tokens - 1
    ids = [record["id"] for record in outcome.records]
    assert len(set(ids)) == len(ids)
    assert not any(":" in name for name in ids)
    monkeypatch.setattr(windows, "PART_TOKENS", 100)
    again = lm(subject, settings)
    assert [record["id"] for record in again.records] == ids
    assert again.metrics["loss"].value == pytest.approx(outcome.metrics["loss"].value, rel=1e-7)


def test_text_and_a_dataset_folder_give_the_numbers_of_shards(
    causal: Path, shards: ShardSet, root: Path, texts: list[str], tmp_path: Path
) -> None:
    subject, bare = subject_of(causal, shards), subject_of(causal, None)
    settings = LMSettings(length=64)
    reference = lm(subject, settings)
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "test.jsonl").write_text((root / "held-out.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    sources = [
        LMSettings(length=64, text=(str(root / "held-out.jsonl"),)),
        LMSettings(length=64, text=(str(tmp_path / "*.txt"),)),
        LMSettings(length=64, dataset=str(folder)),
    ]
    hashes = set()
    for source in sources:
        outcome = lm(bare, source)
        assert outcome.metrics == reference.metrics
        assert outcome.records == reference.records
        hashes.add(task.data(bare, source)["hash"])
    assert len(hashes) == 2  # the two of text have one content
    (tmp_path / "29.txt").write_text("another end\n", encoding="utf-8")
    assert task.data(bare, sources[1])["hash"] not in hashes


def test_models_of_two_tokenizers_pair_up_by_passage(
    causal: Path, export: Callable[..., Path], shards: ShardSet, root: Path, texts: list[str]
) -> None:
    other = prepare(
        plan_preparation([str(root / "held-out.jsonl")], train_tokenizer(texts, 280)), root / "other"
    ).shards
    assert other.num_tokens != shards.num_tokens
    settings = LMSettings(length=64, record_chars=150)
    first = lm(subject_of(causal, shards), settings)
    tokens = TextStream("other", texts, other.tokenizer(), 150)
    zeros = records_of(pieces(tokens, 1, np.ones(tokens.num_tokens - 1)))[0]
    assert [r["id"] for r in zeros] == [r["id"] for r in first.records]
    # But for the stream's first token, which nothing predicts, the bytes and words are the same too.
    assert [(r["bytes"], r["words"]) for r in zeros[1:]] == [(r["bytes"], r["words"]) for r in first.records[1:]]
    change = paired_bootstrap(first.records, zeros, first.estimators["bits_per_byte"], resamples=200)
    assert change.n == len(first.records)
    assert change.value < 0


def test_passages_end_at_words_and_at_the_limit_without_any() -> None:
    text = "one two  three four"
    edges = cut_passages(text, 8)
    assert [text[a:b] for a, b in itertools.pairwise(edges)] == ["one two", "  three", " four"]
    assert cut_passages("x" * 25, 10) == [0, 10, 20, 25]
    assert cut_passages(text, 0) == [0, len(text)]
    assert cut_passages("", 8) == [0, 0]


def test_spans_of_a_tokenizer_that_does_not_give_the_text_back() -> None:
    words = ["[PAD]", "[UNK]", "[MASK]", "[SEP]", "river", "##s", "stone", "."]
    backend = Backend(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(words[:4])
    tokenizer = Tokenizer(backend, {"eos": "[SEP]", "pad": "[PAD]", "mask": "[MASK]", "unk": "[UNK]"})
    text = "Rivers,  stone."
    ids = np.array(tokenizer.encode(text))
    assert ids.tolist() == [4, 5, 1, 6, 7]
    exact = Aligner(tokenizer, 0).spans(ids, text)
    assert exact.exact
    assert np.diff(exact.bytes).tolist() == [5, 1, 3, 5, 1, 0]
    assert np.diff(exact.words).tolist() == [1, 0, 0, 1, 0, 0]
    decoded = tokenizer.decode(ids)
    assert decoded == "rivers stone."  # the comma is gone, and with it the token
    guessed = Aligner(tokenizer, 0).spans(ids, decoded)
    assert not guessed.exact
    assert guessed.bytes[-1] == len(decoded)
    assert guessed.words[-1] == 2
    stream = TextStream("text", [text], tokenizer, 0)
    assert records_of(pieces(stream, 1, np.ones(5)))[0][0]["bytes"] == len(text) - 5


def test_contamination_sets_passages_of_the_training_text_aside(
    causal: Path, shards: ShardSet, root: Path, texts: list[str], tmp_path: Path
) -> None:
    train = tmp_path / "train.jsonl"
    fresh = [" ".join(f"w{i}x{j}" for i in range(40)) for j in range(3)]
    train.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*fresh, texts[3], texts[7]]), encoding="utf-8"
    )
    prepare(plan_preparation([str(train)], shards.tokenizer()), tmp_path / "train")
    subject = subject_of(causal, shards)
    settings = LMSettings(length=64, record_chars=0, contamination=str(tmp_path / "train"))
    outcome = lm(subject, settings)
    found = [record["document"] for record in outcome.records if record["overlap"] >= 0.5]
    assert found == [3, 7]
    assert outcome.metrics["contaminated"].value == pytest.approx(2 / len(texts))
    rest = [record for record in outcome.records if record["document"] not in (3, 7)]
    loss = sum(r["nats"] for r in rest) / sum(r["tokens"] for r in rest)
    bits = sum(r["nats"] for r in rest) / sum(r["bytes"] for r in rest) / math.log(2)
    assert outcome.metrics["loss_clean"].value == pytest.approx(loss, rel=1e-12)
    assert outcome.metrics["bits_per_byte_clean"].value == pytest.approx(bits, rel=1e-12)
    assert outcome.tables[0].rows[-1][1] == pytest.approx(loss, rel=1e-12)
    assert task.data(subject, settings)["hash"] != task.data(subject, LMSettings())["hash"]


def test_what_does_not_fit_is_refused(causal: Path, masked: Path, shards: ShardSet, tmp_path: Path) -> None:
    subject = subject_of(causal, shards)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    for settings, message in (
        (LMSettings(length=16, stride=17), "--stride 17 is longer than the window of 16 tokens"),
        (LMSettings(text=("a.txt",), dataset="b"), "from text or from dataset, not from both"),
        (LMSettings(dataset_config="en"), "say which with dataset"),
        (LMSettings(text=(str(tmp_path / "nothing.txt"),)), "nothing.txt does not exist"),
        (LMSettings(text=(str(empty),)), "has no text in 'text'"),
        (LMSettings(dataset=str(tmp_path), dataset_split="gone"), "cannot be read"),
        (LMSettings(length=2000, stride=8, text=(str(tmp_path / "*.csv"),)), "matches no file to read"),
    ):
        with pytest.raises(UserError, match=message):
            lm(subject, settings)
    with pytest.raises(UserError, match="gone does not exist"):
        task.data(subject, LMSettings(contamination=str(tmp_path / "gone")))
    with pytest.raises(UserError, match="stride is for causal models"):
        task.resolve(subject_of(masked, shards), LMSettings(stride=8))
