"""What the model writes, beside real text and its controls."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from suites_case import subject_of

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.training import train_tokenizer
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.results.statistics import estimate
from eval.subject import Subject
from eval.suites.load import parse
from eval.task import tasks
from eval.tasks.generation import GenerateSettings, scoring
from eval.tasks.generation import task as generation
from eval.tasks.generation.decodings import Decoding
from eval.tasks.generation.judges import Judges, continuation_nats, mean_states
from eval.tasks.generation.prompts import material, two_sets
from eval.tasks.generation.shown import text_lines
from pretrain.checkpoint.load import load_model
from pretrain.model.generation import generate

CONTROLS = ["real continuation (control)", "other real text (control)", "shuffled tokens (control)"]
SMALL: dict[str, Any] = {"num_samples": 6, "prompt_tokens": 8, "max_new_tokens": 12}


def write(subject: Subject, settings: GenerateSettings) -> Outcome:
    return generation.run(subject, generation.resolve(subject, settings), Parts())


def column(outcome: Outcome, name: str, table: int = 0) -> dict[str, Any]:
    found = outcome.tables[table]
    return {row[0]: row[found.columns.index(name)] for row in found.rows}


@pytest.fixture(scope="module")
def fitted(causal: Path, shards: ShardSet) -> Subject:
    """The tiny model after a few steps on the held-out text itself: one that has learnt something."""
    subject = subject_of(causal, shards)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(subject.model.parameters(), lr=1e-2)
    rng = np.random.default_rng(0)
    for _ in range(40):
        ids = torch.from_numpy(shards.read(rng.integers(0, shards.num_tokens - 33, 16), 33))
        output = subject.model(ids[:, :-1], labels=ids[:, 1:])
        optimizer.zero_grad()
        (output.loss_sum / output.num_targets).backward()
        optimizer.step()
    return subject


def test_rows_are_the_ways_of_decoding_and_the_controls(fitted: Subject, shards: ShardSet) -> None:
    settings = GenerateSettings(**SMALL, decodings=("greedy", "beams=3", "temperature=0.8,top_k=50"))
    outcome = write(fitted, settings)
    names = ["top-k 50, temperature 0.8", "greedy", "beam search of 3"]  # what equals the main one is not run again
    assert [row[0] for row in outcome.tables[0].rows] == [*names, *CONTROLS]
    documents = [shards.tokenizer().decode(d) for d in shards.documents()]
    kinds = [sample["kind"] for sample in outcome.samples]
    assert kinds == ["continuation"] * 6 + ["side_by_side"] * 4
    for sample in outcome.samples:
        assert any(sample["prompt"] + sample["real"] in text for text in documents)
    beside = outcome.samples[-1]
    assert list(beside["texts"]) == names
    assert beside["texts"][names[0]] in [s["text"] for s in outcome.samples[:6]]
    # Every number of the metrics follows from the records, and stands in the table's first row.
    for name, estimator in outcome.estimators.items():
        assert estimate(outcome.records, estimator) == pytest.approx(outcome.metrics[name].value)
    assert {"own_perplexity", "repetition_4", "coherence"} <= set(outcome.estimators)
    assert column(outcome, "perplexity under the model")[names[0]] == outcome.metrics["own_perplexity"].value
    assert len({record["id"] for record in outcome.records}) == 6
    json.dumps(outcome.records)


def test_controls_are_ordered_as_they_must_be(fitted: Subject) -> None:
    outcome = write(fitted, GenerateSettings(num_samples=12, prompt_tokens=8, max_new_tokens=32))
    real, other, shuffled = ({} for _ in range(3))
    for table in range(3):
        for name in outcome.tables[table].columns[1:]:
            values = column(outcome, name, table)
            real[name], other[name], shuffled[name] = (values[key] for key in CONTROLS)
    surprise = "perplexity under the model"
    assert shuffled[surprise] > 3 * max(real[surprise], other[surprise])
    assert column(outcome, surprise)["greedy"] < real[surprise]
    assert shuffled["distinct-1"] == real["distinct-1"]  # the same tokens
    assert shuffled["distinct-2"] > real["distinct-2"]
    assert shuffled["Zipf exponent"] == pytest.approx(real["Zipf exponent"], abs=1e-12)
    assert shuffled["self-BLEU"] < real["self-BLEU"]
    assert column(outcome, "repetition of 4-grams")["greedy"] > real["repetition of 4-grams"]
    low, high = map(float, real["95% interval"].split(" to "))
    assert low < real[surprise] < high
    assert set(column(outcome, "tokens").values()) == {12 * 32}
    positions = [s for s in outcome.series if s.chart == "loss along the text"]
    means = {s.name.split(", ", 1)[1]: float(np.mean(s.y)) for s in positions}
    assert math.exp(means[CONTROLS[0]]) == pytest.approx(real[surprise], rel=1e-3)


def test_numbers_do_not_depend_on_how_the_work_is_cut(fitted: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = GenerateSettings(**SMALL, decodings=("top_p=0.9", "beams=2"))
    whole = write(fitted, settings)
    monkeypatch.setattr(scoring, "CHUNK", 2)
    pieces = write(fitted, settings)
    assert whole.samples[0]["text"] == pieces.samples[0]["text"]
    for a, b in zip(whole.records, pieces.records, strict=True):
        assert a == {k: pytest.approx(v, rel=1e-4, abs=1e-5) if isinstance(v, float) else v for k, v in b.items()}
    for a, b in zip(whole.tables, pieces.tables, strict=True):
        for x, y in zip(a.rows, b.rows, strict=True):
            assert x == [pytest.approx(v, rel=1e-4) if isinstance(v, float) else v for v in y]
    other = write(fitted, settings.model_copy(update={"seed": 100}))
    assert [r["text"] for r in other.records] != [r["text"] for r in whole.records]
    assert [r["prompt"] for r in other.records] == [r["prompt"] for r in whole.records]


def test_a_prompt_is_continued_with_its_own_seed(fitted: Subject, shards: ShardSet) -> None:
    settings = GenerateSettings(**SMALL, seed=7)
    outcome = write(fitted, settings)
    prompts = [p.prompt for p in material(fitted, settings).prompts]
    for place, prompt in enumerate(prompts):
        alone = generate(
            fitted.model, prompt, max_new_tokens=12, temperature=0.8, top_k=50, seed=7 + place, stop_id=shards.eos_id
        )
        assert outcome.records[place]["text"] == shards.tokenizer().decode(alone)
        assert (outcome.records[place]["prompt_ids"], outcome.records[place]["ids"]) == (prompt, alone)


def test_texts_that_end_at_once_are_no_measure_for_others(
    fitted: Subject, causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Decoding.write

    def nothing_if_greedy(self: Decoding, subject: Subject, prompts: Any, *args: Any) -> list[list[int]]:
        texts = written(self, subject, prompts, *args)
        return texts if self.temperature else [[] for _ in texts]

    monkeypatch.setattr(Decoding, "write", nothing_if_greedy)
    outcome = write(fitted, GenerateSettings(**SMALL, decodings=("greedy",)))
    assert column(outcome, "tokens")["greedy"] == 0
    assert column(outcome, "ended early")["greedy"] == 6
    assert column(outcome, "distinct-1")["greedy"] is None
    tokens = min(v for v in column(outcome, "tokens").values() if v)
    assert f"the first {tokens} tokens" in outcome.tables[0].note
    assert outcome.metrics["distinct_1"].value > 0
    silent = GenerateSettings(prompt=("a river",), temperature=0, decodings=())
    assert "own_perplexity" not in write(subject_of(causal, None), silent).metrics
    assert write(subject_of(causal, None), silent).samples[0]["text"] == ""


def test_two_sets_of_passages_do_not_overlap(shards: ShardSet) -> None:
    settings = GenerateSettings(prompt_tokens=10, max_new_tokens=20)
    first, second = two_sets(shards, 15, settings)
    assert len(first) == len(second) == 15
    documents = [d.tolist() for d in shards.documents()]
    seen = set()
    for passage in [*first, *second]:
        tokens = [*passage.prompt, *passage.real]
        assert (len(passage.prompt), len(passage.real)) == (10, 20)
        places = {
            (n, i) for n, d in enumerate(documents) for i in range(len(d) - 29) if d[i : i + 30] == tokens
        }  # a passage of 30 tokens stands in this text once
        (n, start), *rest = places
        assert not rest
        assert not seen & {(n, start + i) for i in range(30)}
        seen |= {(n, start + i) for i in range(30)}
    assert len({n for n, _ in seen}) > 15  # spread over the documents
    every = [p for pair in zip_longest(*two_sets(shards, 10**6, settings)) for p in pair if p is not None]
    # Of each document as many as fit, one after the other, what is left over on both sides.
    cut = [d[(len(d) % 30) // 2 :][30 * i : 30 * i + 30] for d in documents for i in range(len(d) // 30)]
    assert [[*p.prompt, *p.real] for p in every] == cut
    with pytest.raises(UserError, match=r"no document of .* has a passage of 9012 tokens"):
        two_sets(shards, 1, GenerateSettings(prompt_tokens=9000, max_new_tokens=12))


def test_nats_and_states_equal_a_loop_over_single_texts(causal: Path, shards: ShardSet) -> None:
    subject = subject_of(causal, shards)
    ids = shards.read(np.array([0, 50, 90]), 30).tolist()
    pairs = [(ids[0][:20], ids[0][20:]), (ids[1][:1], ids[1][1:4]), (ids[2][:20], ids[2][20:]), (ids[0][:1], [])]
    found = continuation_nats(subject, pairs)
    for (prompt, text), nats in zip(pairs, found, strict=True):
        assert len(nats) == len(text)
        for t, token in enumerate(text):
            with torch.no_grad():
                log_p = subject.model(torch.tensor([[*prompt, *text[:t]]])).logits[0, -1].log_softmax(-1)
            assert nats[t] == pytest.approx(-float(log_p[token]), rel=1e-4, abs=1e-5)
    states = mean_states(subject, [ids[0], ids[1][:7], []])
    for text, state in zip([ids[0], ids[1][:7], [shards.eos_id]], states, strict=True):
        with torch.no_grad():
            hidden = subject.model(torch.tensor([text]), hidden=True).hidden[0]
        assert state == pytest.approx(hidden.mean(0).tolist(), abs=1e-5)


def test_a_reference_of_another_tokenizer_judges_the_text(
    fitted: Subject, export: Callable[..., Path], masked: Path, texts: list[str]
) -> None:
    path = export("reference", objective="clm")
    other = train_tokenizer(texts, 280)
    other.save(path)
    settings = GenerateSettings(**SMALL, reference=str(path), decodings=())
    outcome = write(fitted, settings)
    reference, bits, size = load_model(path).model, 0.0, 0
    for record in outcome.records:
        prompt, text = other.encode(record["prompt"]), other.encode(record["text"])
        with torch.no_grad():
            log_p = reference(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        nats = -float(log_p.gather(-1, torch.tensor(text)[:, None]).sum())
        assert record["reference_nats"] == pytest.approx(nats, rel=1e-4)
        assert record["bytes"] == len(record["text"].encode())
        bits, size = bits + nats / math.log(2), size + record["bytes"]
    assert outcome.metrics["reference_bits_per_byte"].value == pytest.approx(bits / size, rel=1e-4)
    # Its hidden states stand for the texts, unless others are named.
    judges = Judges.of(fitted, settings)
    assert judges.features is judges.reference
    masked_too = Judges.of(fitted, settings.model_copy(update={"features": str(masked)}))
    assert masked_too.features.loaded.model_config.objective == "mlm"
    hashes = {
        generation.data(fitted, settings.model_copy(update=update))["hash"]
        for update in ({}, {"reference": None}, {"features": str(masked)})
    }
    assert len(hashes) == 3


def test_copies_of_the_training_text_are_found(fitted: Subject, shards: ShardSet) -> None:
    settings = GenerateSettings(num_samples=6, prompt_tokens=8, max_new_tokens=40, copies=str(shards.path))
    outcome = write(fitted, settings)
    share = column(outcome, "8-word runs of the training text", 1)
    assert share[CONTROLS[0]] > 0.8  # all but words cut at the edges
    assert share[CONTROLS[2]] < 0.1
    assert outcome.metrics["training_copies_8"].value == share[outcome.tables[1].rows[0][0]]


def test_prompts_of_ones_own(fitted: Subject, causal: Path, tmp_path: Path) -> None:
    own = write(fitted, GenerateSettings(prompt=("a river", "stone"), max_new_tokens=4, decodings=()))
    assert own.samples[0]["prompt"] == "a river"
    assert own.samples[0]["real"] is None
    assert [row[0] for row in own.tables[0].rows] == ["top-k 50, temperature 0.8", *CONTROLS]
    assert column(own, "texts") == dict.fromkeys([row[0] for row in own.tables[0].rows], 2)
    result: Any = SimpleNamespace(settings={"prompt": ["a river", "stone"]}, samples=own.samples, records={"count": 2})
    shown = text_lines(result, Path("eval/generate.samples.jsonl"))
    assert [line for line in shown if "prompt:" in line] == ["  prompt: a river", "  prompt: stone"]
    assert shown[1].removeprefix("  text:   ") == own.records[0]["text"].split("\n")[0]
    assert shown[-1] == "all 2 texts and their numbers: eval/generate.samples.jsonl"
    lines = tmp_path / "own.txt"
    lines.write_text("a river\r\n\nstone\n", encoding="utf-8")
    records = tmp_path / "own.jsonl"
    records.write_text('{"start": "a river"}\n{"start": "stone"}\n', encoding="utf-8")
    for settings in (
        GenerateSettings(prompts=str(lines), max_new_tokens=4, decodings=()),
        GenerateSettings(prompts=str(records), prompt_field="start", max_new_tokens=4, decodings=()),
    ):
        assert write(fitted, settings).records == own.records
        assert (
            generation.data(fitted, settings)["hash"]
            == generation.data(fitted, GenerateSettings(prompt=("a river", "stone")))["hash"]
        )
    alone = write(subject_of(causal, None), GenerateSettings(prompt=("a river",), max_new_tokens=4, decodings=()))
    assert len(alone.tables[0].rows) == 1
    assert "--data" in alone.tables[0].note
    assert alone.metrics["own_perplexity"].low is None
    (other,) = column(alone, "with another prompt", 2).values()
    assert other is None  # there is no other prompt
    assert "coherence" in alone.metrics
    assert alone.records[0]["cosine_other"] is None


def test_what_cannot_be_done_is_said(fitted: Subject, masked: Path, shards: ShardSet, tmp_path: Path) -> None:
    def data(prompts: Path) -> None:
        generation.data(fitted, GenerateSettings(prompts=str(prompts)))

    def put(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    with pytest.raises(UserError, match=r"none\.txt does not exist"):
        data(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"a\.docx: files of this kind are not read"):
        data(put("a.docx", b"x"))
    with pytest.raises(UserError, match=r"no column 'prompt'; its columns are: x \(choose with --prompt-field\)"):
        data(put("a.csv", b"x\n1\n"))
    with pytest.raises(UserError, match="holds no prompt"):
        data(put("a.txt", b"\n \n"))
    with pytest.raises(UserError, match="not UTF-8"):
        data(put("b.txt", b"\xff\xff"))
    with pytest.raises(UserError, match="line 2: not a JSON record"):
        data(put("a.jsonl", b'{"prompt": "x"}\n{"prompt"'))
    with pytest.raises(UserError, match=r"line 1: a record must be a JSON object .* not list"):
        data(put("b.jsonl", b"[1]"))
    with pytest.raises(UserError, match=r"no field 'prompt'; its fields are: text \(choose with --prompt-field\)"):
        data(put("c.jsonl", b'{"text": "x"}'))
    with pytest.raises(UserError, match="field 'prompt' is int, not text"):
        data(put("d.jsonl", b'{"prompt": 3}'))
    with pytest.raises(UserError, match=r"--prompt\) or as a file"):
        parse(tasks()["generate"], {"prompt": ["x"], "prompts": "y.txt"}, "here")
    with pytest.raises(UserError, match="here: decoding 'beam=4': write greedy, or key=value"):
        parse(tasks()["generate"], {"decodings": ["beam=4"]}, "here")
    with pytest.raises(UserError, match="masked model, which gives no likelihood"):
        write(fitted, GenerateSettings(**SMALL, reference=str(masked)))
    with pytest.raises(UserError, match="--prompt is for causal models"):
        write(subject_of(masked, shards), GenerateSettings(prompt=("x",)))
    with pytest.raises(UserError, match="--reference is for causal models"):
        write(subject_of(masked, shards), GenerateSettings(reference="x"))


def test_ways_of_decoding_are_read_and_named() -> None:
    assert Decoding.parse("greedy") == Decoding(temperature=0) == Decoding(temperature=0, top_k=50, top_p=0.5)
    assert Decoding.parse("top-k=50, temperature=0.8") == Decoding(temperature=0.8, top_k=50)
    assert Decoding.parse("top-p=1e-3") == Decoding(top_p=0.001)
    names = {
        "greedy": "greedy",
        "temperature=1": "sampled",
        "temperature=0.5": "sampled, temperature 0.5",
        "top_k=5,top_p=0.9": "top-k 5, top-p 0.9",
        "beams=4": "beam search of 4",
        "repetition_penalty=1.2,greedy": "greedy, penalty 1.2",
    }
    assert {text: Decoding.parse(text).name for text in names} == names
    for text, message in {
        "": "write greedy, or key=value",
        "top_k": "write greedy, or key=value",
        "top_k=1.5": "top_k must be a whole number, got '1.5'",
        "top_p=x": "top_p must be a number, got 'x'",
        "temperature=-1": "temperature -1 is out of range",
        "top_k=1-2": "top_k must be a whole number, got '1-2'",
        "top_p=0": "top_p 0 is out of range",
        "temperature=nan": "temperature nan is out of range",
        "beams=0": "beams 0 is out of range",
        "beams=2,temperature=0.5": "takes no other setting",
    }.items():
        with pytest.raises(UserError, match=message):
            Decoding.parse(text)


def test_coherence_is_the_cosine_with_its_own_prompt_and_with_another(fitted: Subject) -> None:
    settings = GenerateSettings(**SMALL, decodings=())
    passages = material(fitted, settings).prompts
    outcome = write(fitted, settings)
    prompts, texts = (np.array(mean_states(fitted, [getattr(p, x) for p in passages])) for x in ("prompt", "real"))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (prompts, texts)]
    cosines = unit[0] @ unit[1].T
    names = ("coherence with the prompt", "with another prompt")
    found = [column(outcome, name, 2)[CONTROLS[0]] for name in names]
    assert found[0] == pytest.approx(np.diag(cosines).mean(), abs=1e-5)
    assert found[1] == pytest.approx(np.mean([cosines[i, (i + 3) % 6] for i in range(6)]), abs=1e-5)


def test_filled_masks_join_to_the_passage(masked: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    # A model that knows which tokens are frequent, so that it is right now and then.
    tokens = np.concatenate(list(shards.documents()))
    counts = np.bincount(tokens, minlength=shards.vocab_size)
    counts[[len(shards.tokenizer().decode([i])) < 4 for i in range(len(counts))]] = 0  # those that are hidden
    frequent = torch.from_numpy(counts).float().log1p()
    monkeypatch.setattr(Subject, "logits", lambda self, ids: frequent.expand(*ids.shape, -1))
    settings = GenerateSettings(num_samples=14, max_new_tokens=16)
    outcome = write(subject_of(masked, shards), settings)
    documents = [shards.tokenizer().decode(d) for d in shards.documents()]
    right = in_five = 0
    for sample in outcome.samples:
        answers = [answer["right"] for answer in sample["answers"]] + [""]
        passage = "".join(p + a for p, a in zip(sample["parts"], answers, strict=True))
        assert any(passage in text for text in documents)
        assert all(len(answer["top"]) == 5 for answer in sample["answers"])
        right += sum(answer["top"][0][0] == answer["right"] for answer in sample["answers"])
        in_five += sum(answer["right"] in [text for text, _ in answer["top"]] for answer in sample["answers"])
    assert 0 < right < in_five < 42
    assert (outcome.metrics["top_1"].value, outcome.metrics["top_5"].value) == (right / 42, in_five / 42)
    for name in ("top_1", "top_5"):
        assert estimate(outcome.records, outcome.estimators[name]) == outcome.metrics[name].value
