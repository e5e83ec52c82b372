"""The suites on tiny models: numbers equal a naive float64 computation, and the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suites_case import WORDS, no_mask, subject_of

from data_pipeline.errors import UserError, run_cli
from data_pipeline.prepare.plan import plan_preparation
from data_pipeline.prepare.run import prepare
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer
from eval import classification, cli, generation, language_modeling
from eval.classification import SCRATCH_ROW
from eval.finetune import Recipe, length_batches
from eval.results import read_result
from pretrain.checkpoint.export import unique_weights, weights_hash
from pretrain.model import build_model
from pretrain.model.attention import self_attention

# --- language modelling


@pytest.mark.parametrize("max_tokens", [None, 500])
def test_causal_numbers_equal_a_naive_float64_computation(
    causal: Path, shards: ShardSet, max_tokens: int | None
) -> None:
    subject = subject_of(causal, shards)
    length = 48
    outcome = language_modeling.run(subject, language_modeling.LMSettings(length, max_tokens))
    stream = [t for d in shards.documents() for t in [*d.tolist(), shards.eos_id]]
    assert len(stream) == shards.num_tokens
    if max_tokens is None:
        starts = list(range(0, len(stream) - 1, length))
    else:
        count, whole = max_tokens // length, (len(stream) - 1) // length
        starts = [i * whole // count * length for i in range(count)]
        assert starts[-1] > len(stream) // 2  # spread over the stream, not its beginning
    model = build_model(subject.loaded.model_config).double()
    model.load_state_dict(subject.model.state_dict())
    model.eval()
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

    tokenizer = shards.tokenizer()
    pieces: list[list[int]] = [[]]
    for (place, token), (after, _) in zip(targets, [*targets[1:], (None, 0)], strict=True):
        pieces[-1].append(token)
        if token == shards.eos_id or after != place + 1:
            pieces.append([])
    decoded = [tokenizer.decode(piece) for piece in pieces]
    size, words = sum(len(t.encode()) for t in decoded), sum(len(t.split()) for t in decoded)
    assert metrics["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-5)
    assert math.log(metrics["word_perplexity"]) == pytest.approx(nats / words, rel=1e-5)

    _, counts = np.unique([goal for _, goal in targets], return_counts=True)
    p = counts / n
    assert metrics["unigram_entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-9)
    series = outcome.series[0]
    first_bucket = [x for place, x in by_position if place < 8]
    assert series.y[0] == pytest.approx(np.mean(first_bucket), rel=1e-5)
    assert series.x == [3.5, 11.5, 23.5, 39.5]


def test_bytes_of_the_whole_stream_are_those_of_the_text(causal: Path, shards: ShardSet, texts: list[str]) -> None:
    outcome = language_modeling.run(subject_of(causal, shards), language_modeling.LMSettings(64))
    first = shards.tokenizer().decode([int(shards.read(np.array([0]), 1)[0, 0])])
    assert outcome.metrics["bits_per_byte"].n == sum(len(t.encode()) for t in texts) - len(first.encode())


def test_masked_numbers_equal_a_naive_float64_computation(masked: Path, shards: ShardSet) -> None:
    from data_pipeline.batches.loader import validation_batches
    from data_pipeline.batches.masking import Masking

    subject = subject_of(masked, shards)
    settings = language_modeling.LMSettings(seq_len=64, seed=3)
    outcome = language_modeling.run(subject, settings)
    model = build_model(subject.loaded.model_config).double()
    model.load_state_dict(subject.model.state_dict())
    model.eval()
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


# --- classification


@pytest.fixture(scope="module")
def labelled(root: Path) -> tuple[Path, Path]:
    """Texts whose label is which of two words they hold, among much else."""
    rng = np.random.default_rng(1)
    paths = (root / "train.jsonl", root / "test.jsonl")
    for path, count in zip(paths, (90, 40), strict=True):
        with path.open("w", encoding="utf-8") as file:
            for _ in range(count):
                label = int(rng.random() < 0.4)
                words = [*rng.choice(WORDS[2:], size=int(rng.integers(3, 25))), *[WORDS[label]] * 3]
                file.write(json.dumps({"text": " ".join(rng.permutation(words)), "label": label}) + "\n")
    return paths


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_classification_of_a_separable_set(
    kind: str, labelled: tuple[Path, Path], request: pytest.FixtureRequest, shards: ShardSet
) -> None:
    subject = subject_of(request.getfixturevalue(kind), shards)
    before = weights_hash(unique_weights(subject.model))
    data = classification.ClassifyData.read(*map(str, labelled), "text", "label")
    recipe = Recipe(epochs=5, batch_size=8, lr=3e-3)
    settings = classification.ClassifySettings(max_length=64, seeds=2, scratch_seeds=1, recipe=recipe)
    outcome = classification.run(subject, settings, data)
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
    again = classification.run(subject, replace(settings, seeds=1, scratch_seeds=0), data)
    first = [row for row in outcome.tables[1].rows if row[:2] == ["fine-tuned", 0]]
    assert again.tables[1].rows == first  # the same seed, the same numbers


def test_length_batches_hold_every_example_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=203)
    indices = np.arange(203)
    found = list(length_batches(lengths, indices, 8, np.random.default_rng(1)))
    assert sorted(np.concatenate(found)) == list(range(203))
    spread = np.mean([np.ptp(lengths[b]) for b in found])
    assert spread < 0.4 * np.mean([np.ptp(lengths[i : i + 8]) for i in range(0, 203, 8)])


# --- generation


def test_statistics_of_generated_text() -> None:
    assert generation.distinct([[1, 2, 3, 1]], 1) == 0.75
    assert generation.distinct([[1, 2], [1, 2]], 2) == 0.5
    assert generation.repetition([[1, 2, 3, 4, 1, 2, 3, 4]], 4) == pytest.approx(0.2)
    assert generation.repetition([[1, 2, 3]], 4) == 0.0


def test_continuations_and_their_control(causal: Path, shards: ShardSet) -> None:
    subject = subject_of(causal, shards)
    settings = generation.GenerateSettings(num_samples=3, prompt_tokens=8, max_new_tokens=12)
    outcome = generation.run(subject, settings)
    assert [s["kind"] for s in outcome.samples] == ["continuation"] * 3
    documents = [shards.tokenizer().decode(d) for d in shards.documents()]
    for sample in outcome.samples:
        assert any(sample["prompt"] + sample["real"] in text for text in documents)
    assert [row[0] for row in outcome.tables[0].rows] == ["model", "real continuation (control)"]
    assert generation.run(subject, settings).samples == outcome.samples
    own = generation.run(subject, generation.GenerateSettings(prompts=("a river",), max_new_tokens=4))
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
    outcome = generation.run(subject_of(masked, shards), generation.GenerateSettings(num_samples=2, max_new_tokens=16))
    documents = [shards.tokenizer().decode(d) for d in shards.documents()]
    for sample in outcome.samples:
        answers = [answer["right"] for answer in sample["answers"]] + [""]
        passage = "".join(p + a for p, a in zip(sample["parts"], answers, strict=True))
        assert any(passage in text for text in documents)
        assert all(len(answer["top"]) == 5 for answer in sample["answers"])
    with pytest.raises(UserError, match="causal"):
        generation.run(subject_of(masked, shards), generation.GenerateSettings(prompts=("x",)))


# --- the command line


def test_suites_write_results_and_are_not_run_again(causal: Path, shards: ShardSet, root: Path, capsys: Any) -> None:
    out = root / "out"
    command = ["lm", "generate", "--checkpoint", str(causal), "--out", str(out), "--max-new-tokens", "8"]
    assert cli.main(command) == 0
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    assert set(first) == {"validity.json", "lm.json", "generate.json"}
    assert "bits per byte" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert "already there" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    assert cli.main([*command, "--length", "32"]) == 0  # other settings, another key
    assert read_result(out / "lm.json").settings["seq_len"] == 32
    assert read_result(out / "generate.json").key == json.loads(first["generate.json"])["key"]


def test_failed_gate_blocks_unless_forced(
    causal: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(self_attention, "causal_nystrom_attention", no_mask)
    out = root / "blocked"
    command = ["lm", "--checkpoint", str(causal), "--out", str(out)]
    with pytest.raises(UserError, match="validity gate failed") as caught:
        cli.main(command)
    assert "prefix-only" in str(caught.value)
    assert not (out / "lm.json").exists()
    with pytest.raises(UserError, match="validity gate failed"):  # a failed result does not open the gate either
        cli.main(command)
    assert cli.main(["validity", "--checkpoint", str(causal), "--out", str(out)]) == 1
    assert cli.main([*command, "--force"]) == 0
    assert (out / "lm.json").exists()


def test_rejections(causal: Path, masked: Path, root: Path, labelled: tuple[Path, Path], capsys: Any) -> None:
    train, test = map(str, labelled)
    unseen = root / "unseen.jsonl"
    unseen.write_text('{"text": "a", "label": "purple"}\n')
    learned = root / "nowhere"
    at = ["--checkpoint", str(causal), "--out", str(root / "rejected")]
    for command, words in [
        (["lm", "--checkpoint", str(learned)], "does not exist"),
        (["lm", "--checkpoint", str(root)], "neither a run folder"),
        (["perplexity", *at], "no suite 'perplexity'"),
        (["classify", *at], "--train FILE --test FILE"),
        (["classify", *at, "--train", train, "--test", str(unseen)], "'purple'"),
        (["classify", *at, "--train", train, "--test", test, "--text-field", "body"], "no field 'body'"),
        (["classify", *at, "--train", train, "--test", str(root / "missing.csv")], "does not exist"),
        (["lm", *at, "--data", str(root / "missing")], "missing"),
        (["lm", *at, "--length", "0"], "--length 0"),
        (["lm", *at, "--device", "warp"], "--device warp"),
    ]:
        assert run_cli(cli.main, "nystrom eval", command) == 2, command
        error = capsys.readouterr().err
        assert words in error, (command, error)
        assert "Traceback" not in error


def test_shards_of_another_tokenizer_are_refused(causal: Path, root: Path, texts: list[str]) -> None:
    source = root / "other.jsonl"
    source.write_text(json.dumps({"text": texts[0]}) + "\n", encoding="utf-8")
    other: Tokenizer = train_tokenizer(texts[:3], 280)
    prepare(plan_preparation([str(source)], other), root / "other-shards")
    with pytest.raises(UserError, match="another tokenizer"):
        cli.main(["lm", "--checkpoint", str(causal), "--data", str(root / "other-shards"), "--out", str(root / "x")])


def test_learned_positions_bound_the_length(export: Callable[..., Path], shards: ShardSet) -> None:
    path = export("short", objective="mlm", positions="learned", max_positions=64)
    with pytest.raises(UserError, match="64 learned positions"):
        language_modeling.run(subject_of(path, shards), language_modeling.LMSettings(seq_len=128))


def test_results_of_an_older_checkpoint_do_not_replace_the_runs() -> None:
    run = Path("runs/a")
    assert cli.results_folder(run, run) == run / "eval"
    assert cli.results_folder(run / "export", run) == run / "eval"
    assert cli.results_folder(run / "checkpoints" / "step8", run) == run / "eval" / "step8"
    assert cli.results_folder(Path("elsewhere"), None) == Path("elsewhere/eval")
