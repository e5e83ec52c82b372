"""Tasks of lm-eval on a local task file and local documents, beside naive computations."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suites_case import WORDS, subject_of

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.results.statistics import estimate
from eval.subject import Subject
from eval.tasks.harness import HarnessSettings, task
from pretrain.model import build_model
from pretrain.model.generation import generate

pytest.importorskip("lm_eval")

CHOICE = """task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """task: toy_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{prompt}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
WRITING = """task: toy_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 6}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def subject(causal: Path, shards: ShardSet) -> Subject:
    return subject_of(causal, shards)


@pytest.fixture(scope="module")
def documents(subject: Subject) -> list[dict[str, object]]:
    rng = np.random.default_rng(4)
    tokenizer = subject.loaded.tokenizer
    rows: list[dict[str, object]] = []
    for number in range(12):
        prompt = " ".join(rng.choice(WORDS, size=int(rng.integers(2, 9))))
        choices = [" " + " ".join(rng.choice(WORDS, size=int(n))) for n in rng.integers(1, 4, size=3)]
        kept = tokenizer.encode(prompt)[-18:]  # beside 6 new tokens in a window of 24
        new = generate(subject.model, kept, max_new_tokens=6, temperature=0.0, stop_id=tokenizer.eos_id)
        written = tokenizer.decode(new).split("e")[0] if number % 3 else "something else"
        rows.append({"prompt": prompt, "choices": choices, "label": int(rng.integers(3)), "written": written})
    return rows


@pytest.fixture(scope="module")
def folder(root: Path, documents: list[dict[str, object]]) -> Path:
    out = root / "tasks"
    out.mkdir()
    (out / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("writing", WRITING)):
        (out / f"{name}.yaml").write_text(text.format(data=out / "docs.jsonl", cache=root / "cache"))
    return out


def harness(subject: Subject, settings: HarnessSettings) -> Outcome:
    return task.run(subject, task.resolve(subject, settings), Parts())


def nats(subject: Subject, context: list[int], continuation: list[int]) -> float:
    model = build_model(subject.loaded.model_config).double()
    model.load_state_dict(subject.model.state_dict())
    model.eval()
    with torch.no_grad():
        log_p = model(torch.tensor([[*context, *continuation][:-1]])).logits[0].log_softmax(-1)
    return -sum(float(log_p[len(context) - 1 + i, token]) for i, token in enumerate(continuation))


def test_multiple_choice_equals_a_naive_computation(
    subject: Subject, folder: Path, documents: list[dict[str, object]], capsys: Any
) -> None:
    settings = HarnessSettings(tasks=("toy_choice",), include_path=(str(folder),))
    task.data(subject, settings)
    outcome = harness(subject, settings)
    assert capsys.readouterr().err == ""  # no bars in a file
    tokenizer = subject.loaded.tokenizer
    right = []
    for row in documents:
        prompt, choices = str(row["prompt"]), row["choices"]
        assert isinstance(choices, list)
        context = tokenizer.encode(prompt)
        # The harness puts a space between prompt and choice.
        scores = [nats(subject, context, tokenizer.encode(f"{prompt} {c}")[len(context) :]) for c in choices]
        right.append(int(np.argmin(scores) == row["label"]))
        record = outcome.records[len(right) - 1]
        assert record["log_likelihoods"] == pytest.approx([-score for score in scores], rel=1e-5)
        assert (record["predicted"], record["right"]) == (int(np.argmin(scores)), [row["label"]])
        assert (record["acc"], record["tied"]) == (right[-1], 0)
    assert outcome.metrics["chance"].value == pytest.approx(1 / 3)
    assert outcome.metrics["ties"].value == 0
    assert 0 < sum(right) < len(right)
    acc = outcome.metrics["acc"]
    assert acc.value == pytest.approx(np.mean(right))
    assert acc.n == 12
    assert acc.low is not None
    assert acc.low < acc.value
    assert acc.higher_is_better is True
    assert sorted(r["acc"] for r in outcome.records) == sorted(right)
    assert estimate(outcome.records, outcome.estimators["acc"]) == pytest.approx(acc.value)
    assert len({r["id"] for r in outcome.records}) == 12


def test_several_tasks_at_once(subject: Subject, folder: Path, documents: list[dict[str, object]]) -> None:
    settings = HarnessSettings(tasks=("toy_*",), include_path=(str(folder),), length=24)
    outcome = harness(subject, settings)
    tokenizer = subject.loaded.tokenizer
    assert max(len(tokenizer.encode(str(row["prompt"]))) for row in documents) > 24
    total, words, size = 0.0, 0, 0
    for row in documents:
        ids, prompt = tokenizer.encode(str(row["prompt"])), str(row["prompt"])
        for start in range(0, len(ids), 24):
            part = ids[start : start + 24]
            # One context token, so that the last window sees as many as fit.
            total += nats(subject, ([tokenizer.eos_id, *ids])[max(start + len(part) - 24, 0) : start + 1], part)
        words += len(prompt.split())
        size += len(prompt.encode())
    figure = outcome.metrics["toy_rolling word_perplexity"]
    assert math.log(figure.value) == pytest.approx(total / words, rel=1e-5)
    assert figure.low is not None
    assert figure.low < figure.value
    assert outcome.metrics["toy_rolling bits_per_byte"].value == pytest.approx(total / size / math.log(2), rel=1e-5)
    exact = outcome.metrics["toy_writing exact_match"]
    assert exact.value == pytest.approx(8 / 12)
    assert {row[0] for row in outcome.tables[0].rows} == {"toy_choice", "toy_rolling", "toy_writing"}
    assert "acc" not in outcome.metrics  # no figure over unlike tasks
    for name, estimator in outcome.estimators.items():
        assert estimate(outcome.records, estimator) == pytest.approx(outcome.metrics[name].value)


def test_a_continuation_is_greedy_where_all_of_its_tokens_are(subject: Subject) -> None:
    from eval.tasks.harness.model import SubjectLM

    model = SubjectLM(subject, 64, Parts())
    prompt = subject.loaded.tokenizer.encode("river stone cloud")
    new = generate(subject.model, prompt, max_new_tokens=3, temperature=0.0)
    other = (new[2] + 1) % subject.loaded.tokenizer.vocab_size
    found = model._loglikelihood_tokens(
        [(("", ""), prompt, new), (("", ""), prompt, [*new[:2], other]), (("", ""), prompt[:1], new[:1])]
    )
    assert [greedy for _, greedy in found[:2]] == [True, False]
    assert found[0][0] == pytest.approx(-nats(subject, prompt, new), rel=1e-5)
    assert found[1][0] == pytest.approx(-nats(subject, prompt, [*new[:2], other]), rel=1e-5)
    assert found[2][0] == pytest.approx(-nats(subject, prompt[:1], new[:1]), rel=1e-5)


def test_the_task_says_how_texts_are_written(subject: Subject) -> None:
    """A repetition penalty was passed over in silence, and so was everything else that is not known here."""
    from eval.tasks.harness.model import SubjectLM

    model, tokenizer = SubjectLM(subject, 64, Parts()), subject.loaded.tokenizer
    prompt = tokenizer.encode("river stone cloud")
    wanted = generate(
        subject.model, prompt, max_new_tokens=9, temperature=0.0, repetition_penalty=4.0, stop_id=tokenizer.eos_id
    )
    assert wanted != generate(subject.model, prompt, max_new_tokens=9, temperature=0.0, stop_id=tokenizer.eos_id)
    options = {"until": [], "max_gen_toks": 9, "num_beams": 1}
    assert model._continue(prompt, {**options, "repetition_penalty": 4.0}, 0) == tokenizer.decode(wanted)
    with pytest.raises(UserError, match="generation_kwargs of the task have num_beams: 4, which"):
        model._continue(prompt, {**options, "num_beams": 4}, 0)


def test_pairs_without_a_context_or_that_merge_are_scored(subject: Subject) -> None:
    """White space alone was a ValueError; a choice that merges into its context had log p = 0, and always won."""
    from eval.tasks.harness.model import SubjectLM

    model = SubjectLM(subject, 64, Parts())
    encode = model.tok_encode
    assert model._encode_pair("river ", "stone") == (encode("river"), encode("river stone")[len(encode("river")) :])
    assert model._encode_pair("  ", "stone") == ([model.eot_token_id], encode("  stone"))
    merged = next(
        (word[:cut], word[cut:])
        for word in WORDS
        for cut in range(1, len(word))
        if len(encode(word)) <= len(encode(word[:cut]))
    )
    context, continuation = model._encode_pair(*merged)
    assert (context, continuation) == (encode(merged[0]), encode(merged[1]))
    [(log_p, _)] = model._loglikelihood_tokens([(merged, context, continuation)])
    assert log_p == pytest.approx(-nats(subject, context, continuation), rel=1e-5)
    assert log_p < 0


def test_data_is_the_content_of_the_tasks(
    subject: Subject, folder: Path, tmp_path: Path, documents: list[dict[str, object]]
) -> None:
    settings = HarnessSettings(tasks=("toy_choice",), include_path=(str(folder),))
    found = task.data(subject, settings)
    assert found["documents"] == {"toy_choice": 12}
    assert task.data(subject, settings)["hash"] == found["hash"]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents[1:]), encoding="utf-8")
    (tmp_path / "choice.yaml").write_text(CHOICE.format(data=tmp_path / "docs.jsonl", cache=tmp_path / "cache"))
    other = task.data(subject, HarnessSettings(tasks=("toy_choice",), include_path=(str(tmp_path),)))
    assert other["hash"] != found["hash"]


def test_what_cannot_be_run_is_refused(
    subject: Subject, masked: Path, shards: ShardSet, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = (str(folder),)
    with pytest.raises(UserError, match="which a masked model does not have"):
        task.resolve(subject_of(masked, shards), HarnessSettings(tasks=("toy_choice",)))
    with pytest.raises(UserError, match="harness needs --tasks"):
        task.resolve(subject, HarnessSettings())
    with pytest.raises(UserError, match="gone is not a folder"):
        task.data(subject, HarnessSettings(tasks=("toy_choice",), include_path=(str(folder / "gone"),)))
    with pytest.raises(UserError, match="leaves no room for a prompt in a window of 6"):
        harness(subject, HarnessSettings(tasks=("toy_writing",), include_path=paths, length=6))
    (folder / "docs.jsonl").rename(folder / "away")
    with pytest.raises(UserError, match="toy_rolling cannot be loaded"):
        task.data(subject, HarnessSettings(tasks=("toy_rolling",), include_path=paths))
    (folder / "away").rename(folder / "docs.jsonl")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'nystrom-pretrain\[harness\]'"):
        task.resolve(subject, HarnessSettings(tasks=("toy_choice",)))


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_the_closest_name(subject: Subject, folder: Path) -> None:
    # Slow for the index of lm-eval's own tasks.
    with pytest.raises(UserError, match=r"no task 'toy_choise' of lm-eval.*did you mean toy_choice"):
        task.data(subject, HarnessSettings(tasks=("toy_choise",), include_path=(str(folder),)))
