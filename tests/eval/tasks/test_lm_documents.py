"""Held-out loss of documents apart equals a loop that reads each document by itself; who is scored so by default."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from suites_case import subject_of

from data_pipeline.batches.masking import Masking, mask_tokens
from data_pipeline.errors import UserError
from data_pipeline.prepare.plan import plan_preparation
from data_pipeline.prepare.run import prepare
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.training import train_tokenizer
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.shared import scoring
from eval.subject import Subject
from eval.tasks.language_modeling import LMSettings, PseudoSettings, causal, pseudo, task, windows
from eval.tasks.language_modeling.passages import pieces, records_of
from eval.tasks.language_modeling.text import TextStream, open_stream
from eval.tasks.language_modeling.windows import strided, strided_apart, thinned
from pretrain.model import build_model

LENGTH = 48


@pytest.fixture(scope="module")
def uneven(texts: list[str], root: Path) -> str:
    """Held-out text whose documents have from one token to several windows, in no order."""
    path = root / "uneven.jsonl"
    parts = [text[: 7 * (i % 5) ** 2 + i % 3 + 1] if i % 3 else text for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts), encoding="utf-8")
    return str(path)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts, and batches of few windows of unequal width."""
    monkeypatch.setattr(windows, "PART_TOKENS", 600)
    monkeypatch.setattr(scoring, "FORWARD_TOKENS", 200)


@pytest.fixture(scope="module")
def packed(export: Callable[..., Path]) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(objective: str) -> Path:
        if objective not in made:
            made[objective] = export(f"packed-{objective}", packing="documents", objective=objective)
        return made[objective]

    return of


def lm(subject: Subject, settings: LMSettings) -> Outcome:
    return task.run(subject, task.resolve(subject, settings), Parts())


def in_float64(subject: Subject) -> Any:
    model = build_model(subject.loaded.model_config).double()
    model.load_state_dict(subject.model.state_dict())
    return model.eval()


def log_p(model: Any, tokens: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(tokens))[None]).logits[0].log_softmax(-1)


def documents(subject: Subject, settings: LMSettings | PseudoSettings) -> Iterator[tuple[int, list[int]]]:
    """Each document's place in the stream and its tokens, its end included."""
    stream = open_stream(subject, settings)
    for begin, end in pairwise(stream.edges.tolist()):
        yield begin, stream.range(begin, end).tolist()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stride", [None, 20])
def test_causal_loss_equals_a_loop_over_documents(
    packed: Callable[[str], Path], shards: ShardSet, uneven: str, stride: int | None
) -> None:
    subject = subject_of(packed("clm"), shards)
    settings = LMSettings(length=LENGTH, stride=stride, text=(uneven,), record_chars=100)
    outcome = lm(subject, settings)
    model, step = in_float64(subject), stride or LENGTH
    nats, number, widths, places = 0.0, 0, set(), []
    for _, ids in documents(subject, settings):
        done, start = 0, 0  # targets of the document that are predicted
        while done < len(ids) - 1:
            window = ids[start : start + LENGTH + 1]
            found = log_p(model, window[:-1])
            widths.add(len(window) - 1)
            for place in range(done + 1, start + len(window)):
                nats -= float(found[place - 1 - start, ids[place]])
                number += 1
                places.append(place - 1 - start)
            done, start = start + len(window) - 1, start + step
    assert len(widths) > 10
    assert outcome.metrics["loss"].n == number
    assert outcome.metrics["loss"].value == pytest.approx(nats / number, rel=1e-5)
    assert "of each document by itself, whose first token is not predicted" in outcome.tables[0].note
    buckets = outcome.series[0]
    assert buckets.x[0] == pytest.approx(np.mean([place for place in places if place < 8]))
    assert min(record["tokens"] for record in outcome.records) == 1


@pytest.mark.usefixtures("small")
def test_masked_loss_equals_a_loop_over_documents(packed: Callable[[str], Path], shards: ShardSet, uneven: str) -> None:
    subject = subject_of(packed("mlm"), shards)
    settings = LMSettings(length=LENGTH, seed=3, text=(uneven,))
    outcome = lm(subject, settings)
    model = in_float64(subject)
    nats, right, number, scored = 0.0, 0, 0, 0
    for begin, ids in documents(subject, settings):
        for start in range(0, len(ids), LENGTH):
            inputs, labels = mask_tokens(
                np.array([ids[start : start + LENGTH]]),
                np.array([begin + start]),
                seed=3,
                masking=Masking(),
                boundaries=None,
                mask_id=shards.mask_id or 0,
                special_ids=shards.special_ids,
                vocab_size=shards.vocab_size,
            )
            found = log_p(model, inputs[0])
            places = np.flatnonzero(labels[0] != -100)
            scored += len(places) > 0
            for place in places.tolist():
                goal = labels[0, place]
                nats -= float(found[place, goal])
                right += int(found[place].argmax()) == goal
                number += 1
    assert outcome.metrics["masked_loss"].n == number
    assert outcome.metrics["masked_loss"].value == pytest.approx(nats / number, rel=1e-5)
    assert outcome.metrics["masked_accuracy"].value == pytest.approx(right / number, abs=1.5 / number)
    assert len(outcome.records) == scored
    assert "of each document by itself" in outcome.tables[0].note


@pytest.mark.parametrize("wanted", [60, 10**6])
def test_pseudo_perplexity_sees_one_document(
    packed: Callable[[str], Path], shards: ShardSet, uneven: str, tmp_path: Path, wanted: int
) -> None:
    subject = subject_of(packed("mlm"), shards)
    path = tmp_path / "some.jsonl"
    path.write_text("".join(Path(uneven).read_text(encoding="utf-8").splitlines(True)[:8]), encoding="utf-8")
    settings = PseudoSettings(length=20, pppl_tokens=wanted, window_targets=4, seed=2, text=(str(path),))
    settings = pseudo.resolve(subject, settings)
    outcome = pseudo.run(subject, settings, Parts())
    stream = open_stream(subject, settings)
    model, edges = in_float64(subject), stream.edges
    nats, number = 0.0, 0
    for start, size, count in zip(*(column.tolist() for column in pseudo.sample(stream, settings)), strict=True):
        assert size <= 20
        assert start + size <= edges[np.searchsorted(edges, start, side="right")]
        row = stream.range(start, start + size)
        for place in pseudo.positions(stream, row, start, count, settings.seed).tolist():
            hidden = row.copy()
            hidden[place] = shards.mask_id
            nats -= float(log_p(model, hidden)[place, row[place]])
            number += 1
    ordinary = stream.num_tokens - stream.num_documents
    assert outcome.metrics["pseudo_perplexity"].n == number
    assert number == ordinary if wanted > ordinary else 55 <= number <= 60
    assert outcome.metrics["pseudo_log_likelihood"].value == pytest.approx(-nats / number, rel=1e-5)
    assert "of one document" in outcome.tables[0].note


def test_documents_are_apart_where_training_held_them_apart(
    packed: Callable[[str], Path], export: Callable[..., Path], shards: ShardSet
) -> None:
    for objective in ("clm", "mlm"):
        plain = export(f"plain-{objective}", objective=objective)
        stream, apart = subject_of(plain, shards), subject_of(packed(objective), shards)
        assert task.resolve(stream, LMSettings()).documents == "stream"
        assert task.resolve(apart, LMSettings()).documents == "apart"
        chosen: Literal["apart", "stream"]
        for chosen in ("apart", "stream"):
            assert {task.resolve(s, LMSettings(documents=chosen)).documents for s in (stream, apart)} == {chosen}
            # The two have the same weights: the setting alone makes the numbers.
            assert lm(stream, LMSettings(documents=chosen)).records == lm(apart, LMSettings(documents=chosen)).records
        assert lm(stream, LMSettings()).metrics != lm(apart, LMSettings()).metrics
    assert pseudo.resolve(stream, PseudoSettings()).documents == "stream"
    assert pseudo.resolve(apart, PseudoSettings()).documents == "apart"


def test_what_a_document_gets_does_not_depend_on_the_others(
    packed: Callable[[str], Path], shards: ShardSet, texts: list[str], tmp_path: Path
) -> None:
    subject = subject_of(packed("clm"), shards)
    found = []
    for name, some in (("all", texts), ("back", texts[::-1]), ("few", texts[10:13])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some), encoding="utf-8")
        records = lm(subject, LMSettings(length=LENGTH, text=(str(path),), record_chars=0)).records
        found.append({record["id"]: record["nats"] for record in records})
    everything, back, few = found
    assert back == pytest.approx(everything, rel=1e-5)
    assert few == pytest.approx({name: everything[name] for name in few}, rel=1e-5)


def test_bytes_are_those_of_the_predicted_tokens_and_passages_pair_across_tokenizers(
    packed: Callable[[str], Path], shards: ShardSet, root: Path, texts: list[str]
) -> None:
    subject = subject_of(packed("clm"), shards)
    outcome = lm(subject, LMSettings(length=64, record_chars=150))
    tokenizer = shards.tokenizer()
    first = sum(len(tokenizer.decode([int(document[0])]).encode()) for document in shards.documents())
    assert outcome.metrics["bits_per_byte"].n == sum(len(text.encode()) for text in texts) - first
    assert outcome.metrics["loss"].n == shards.num_tokens - len(texts)
    total = {key: sum(record[key] for record in outcome.records) for key in ("nats", "bytes")}
    bits = total["nats"] / total["bytes"] / math.log(2)
    assert outcome.metrics["bits_per_byte"].value == pytest.approx(bits, rel=1e-12)
    assert not any(":" in record["id"] for record in outcome.records)
    stream = lm(subject, LMSettings(length=64, record_chars=150, documents="stream"))
    assert [record["id"] for record in stream.records] == [record["id"] for record in outcome.records]
    other = prepare(plan_preparation([str(root / "held-out.jsonl")], train_tokenizer(texts, 280)), root / "pair").shards
    edges = np.cumsum([0, *(len(document) + 1 for document in other.documents())])
    tokens = TextStream("other", texts, other.tokenizer(), 150)
    found = [pieces(tokens, int(a) + 1, np.ones(b - a - 1)) for a, b in pairwise(edges)]
    records = records_of([piece for part in found for piece in part], apart=True)[0]
    assert [record["id"] for record in records] == [record["id"] for record in outcome.records]


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 5), (16, 1)])
def test_windows_of_documents_are_those_of_a_stream_of_one(length: int, stride: int) -> None:
    edges = np.cumsum([0, 1, 2, 16, 17, 18, 40, 1, 33, 100])
    found = strided_apart(edges, length, stride, None, 0)
    rows = list(zip(found.starts.tolist(), found.widths.tolist(), found.scored.tolist(), strict=True))
    expected = []
    for begin, end in pairwise(edges.tolist()):
        if end - begin > 1:
            one = strided(end - begin - 1, length, stride, None)
            expected += zip((one.starts + begin).tolist(), one.widths.tolist(), one.scored.tolist(), strict=True)
    assert rows == expected
    batches = [chosen for part in found.parts() for chosen in found.batches(part)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(found)))


def test_a_sample_of_windows_is_no_sample_of_first_windows() -> None:
    edges = np.arange(0, 200 * 31, 31)  # 30 predicted tokens a document: windows of 20 and of 10
    found = strided_apart(edges, 20, 20, 199 * 15, 4)
    assert found.targets == pytest.approx(199 * 15, rel=0.05)
    assert 70 < (found.scored == 20).sum() < 130
    assert (np.diff(found.starts) > 0).all()
    assert found.starts[-1] > 190 * 31
    assert np.array_equal(thinned(found.scored, 10, 4), thinned(found.scored, 10, 4))
    assert len(thinned(found.scored, 1, 0)) == 1


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_a_sample_of_documents_is_scored_as_the_whole(
    packed: Callable[[str], Path], shards: ShardSet, objective: str
) -> None:
    subject = subject_of(packed(objective), shards)
    passages: dict[str, Any] = {"record_chars": 12} if objective == "clm" else {}
    outcome = lm(subject, LMSettings(length=16, max_tokens=1500, **passages))
    whole = lm(subject, LMSettings(length=16, **passages))

    def name(record: dict[str, Any]) -> tuple[Any, ...]:
        return record.get("document"), record.get("passage"), record["id"].split("#")[0]

    everything = {name(record): record["nats"] for record in whole.records}
    same = [record for record in outcome.records if name(record) in everything]
    assert len(same) > 20
    for record in same:
        assert record["nats"] == pytest.approx(everything[name(record)], rel=1e-4, abs=1e-4)


def test_nothing_to_predict_is_said(
    packed: Callable[[str], Path], shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = TextStream("spaces", ["", ""], shards.tokenizer(), 0)
    monkeypatch.setattr(causal, "open_stream", lambda *_: empty)
    with pytest.raises(UserError, match="every document of spaces is empty"):
        lm(subject_of(packed("clm"), shards), LMSettings())
    monkeypatch.setattr(pseudo, "open_stream", lambda *_: empty)
    subject = subject_of(packed("mlm"), shards)
    with pytest.raises(UserError, match="spaces holds no ordinary token"):
        pseudo.run(subject, pseudo.resolve(subject, PseudoSettings()), Parts())


def test_copies_of_a_text_are_one_item(
    packed: Callable[[str], Path], shards: ShardSet, texts: list[str], tmp_path: Path
) -> None:
    """Twenty texts ten times each give the interval of twenty."""
    found = []
    for times in (1, 10):
        path = tmp_path / f"{times}.txt"
        path.write_text("".join(text.split("\n")[0] + "\n" for text in texts[:20]) * times, encoding="utf-8")
        settings = LMSettings(length=16, text=(str(path),), text_unit="line", documents="apart", record_chars=0)
        found.append(lm(subject_of(packed("clm"), shards), settings))
    once, tenfold = (outcome.metrics["loss"] for outcome in found)
    assert len(found[1].records) == 200
    assert len({record["id"] for record in found[1].records}) == 20
    assert tenfold.value == pytest.approx(once.value, rel=1e-5)
    assert (tenfold.low, tenfold.high) == (pytest.approx(once.low, rel=1e-5), pytest.approx(once.high, rel=1e-5))
