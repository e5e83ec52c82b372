"""The ablation compares what it says: the tasks' answers, equal beginnings, every form, no run twice, the table."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention_ablation import __main__ as cli
from benchmarks.attention_ablation import study
from benchmarks.attention_ablation.books import Books
from benchmarks.attention_ablation.forms import FORMS, configure, entries_read, select, window_tokens
from benchmarks.attention_ablation.measure import interleaved, memory
from benchmarks.attention_ablation.mqar import MultiQueryRecall
from benchmarks.attention_ablation.passkey import Passkey
from benchmarks.attention_ablation.report import report
from benchmarks.attention_ablation.study import Record, Results
from benchmarks.attention_ablation.tasks import Shape
from benchmarks.attention_ablation.training import Recipe, TrainStep, evaluate, initial_model, train
from data_pipeline.batches import IGNORE
from data_pipeline.batches.loader import TrainLoader
from data_pipeline.batches.masking import Masking
from data_pipeline.batches.mixture import TrainingData
from data_pipeline.batches.order import Plan, StageSpec
from data_pipeline.errors import UserError, run_cli
from data_pipeline.prepare.plan import plan_preparation
from data_pipeline.prepare.run import prepare
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.training import train_tokenizer
from pretrain.model.attention.registry import form_of
from pretrain.model.config import ModelConfig

TINY: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "segment_length": 4,
    "num_landmarks": 8,
    "conv_kernel": 9,
}
RECIPE = Recipe(tokens=256, batch_tokens=128, seq_len=32, lr=1e-2, bf16=False, device="cpu")
SHAPE = Shape(seq_len=32, batch_tokens=128, held_out_tokens=256)
SMALL = ["--tokens", "256", "--batch-tokens", "128", "--seq-len", "32", "--held-out-tokens", "256", "--device", "cpu"]
SMALL += ["--pairs", "3", "--gap", "9", "--timing-rounds", "1"]
CHAINS = ["--chains", "2", "--hops", "2"]
SETS = [f"--set={name}={value}" for name, value in TINY.items()]


def base(objective: str = "clm", **changes: Any) -> ModelConfig:
    return configure(TINY | {"objective": objective} | changes, "test")


def recall(pairs: int = 3, gap: int = 9, shape: Shape = SHAPE) -> MultiQueryRecall:
    return MultiQueryRecall(shape, vocab_size=48, pairs=pairs, gap=gap, window=8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    texts = [f"row {i} of {i * 7919 % 1000} " * (1 + i % 4) for i in range(120)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(plan_preparation([folder / "a.jsonl"], train_tokenizer(texts, 270)), folder / "shards")
    return folder / "shards"


# --- books


def test_the_loss_on_books_is_given_by_the_last_occurrence(shards: Path) -> None:
    task = Books.open(shards, shards, "clm", SHAPE, 1024, window=2)
    assert task.groupings["windows since the last occurrence"] == ("0-1", "1-4", "4-16", "16-64", "never")
    assert "window" not in task.settings  # the model's keys say it: results of earlier versions are still found
    seen: set[int] = set()
    for batch in task.held_out():
        bins = batch.groups["windows since the last occurrence"]
        for inputs, labels, found in zip(batch.input_ids.tolist(), batch.labels.tolist(), bins, strict=True):
            for at, (goal, bin_) in enumerate(zip(labels, found, strict=True)):
                before = [at + 1 - i for i in range(at + 1) if inputs[i] == goal]
                edges = [2, 8, 32, 128]
                assert goal == IGNORE or bin_ == (sum(before[-1] >= edge for edge in edges) if before else 4)
        seen |= set(bins.ravel())
    assert seen == {0, 1, 2, 4}  # rows of 16 windows
    assert set(Books.open(shards, shards, "mlm", SHAPE, 1024, window=2).groupings) == set()


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_books_are_the_rows_of_pretraining(shards: Path, objective: Any) -> None:
    task = Books.open(shards, shards, objective, SHAPE, 1024, window=8)
    batches = list(task.train_batches(5))
    plan = Plan([StageSpec(32, 1024)], block_length=32, batch_tokens=128)
    data = TrainingData.stream(ShardSet.open(shards), 32)
    loader = TrainLoader(data, plan, objective=objective, seed=5, masking=Masking())
    assert len(batches) == 8
    for ours, theirs in zip(batches, loader, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.labels, theirs.labels)
    if objective == "clm":
        assert task.far is not None
        assert task.groupings["position"] == ("0-3", "4-7", "8-11", "12-15", "16-19", "20-23", "24-27", "28-31")
        assert [task.groupings["position"][i] for i in task.far.bins] == ["24-27", "28-31"]


# --- forms


def test_a_form_changes_its_keys_and_nothing_else() -> None:
    for objective, forms in FORMS.items():
        origin = base(objective)
        for variant in select([form.name for form in forms], origin):
            changed = {k for k, v in variant.config.model_dump().items() if v != origin.model_dump()[k]}
            assert changed <= set(variant.changes), variant.name
    found = {variant.name: variant for variant in select(None, base())}
    assert window_tokens(found["segment-half"].config) == window_tokens(found["segment-double"].config) == 8
    assert window_tokens(found["window-double"].config) == 16
    assert (found["segment-half"].config.segment_length, found["segment-double"].config.segment_length) == (2, 8)
    assert (
        found["gamma-0.55"].config.gamma_init,
        "gamma" in form_of(found["gamma-0.55"].config).given({}, None, torch.device("cpu")),
    ) == (0.55, True)
    assert found["window"].describe() == "attention window"


def test_entries_read_are_what_tokens_see() -> None:
    found = {v.name: v.config for v in select(["softmax", "window", "nystrom", "window/softmax"], base())}
    window = [min(t + 1, t % 4 + 5) for t in range(32)]  # its own segment up to itself, and one whole one before
    landmarks = [max(0, t // 4 - 1) for t in range(32)]
    assert entries_read(found["softmax"], 32) == 16.5
    assert entries_read(found["window"], 32) == sum(window) / 32
    assert entries_read(found["window/softmax"], 32) == (16.5 + sum(window) / 32) / 2
    made = 6 * 4 * 6 / (4 * 32)  # six landmarks of four tokens
    assert entries_read(found["nystrom"], 32) == pytest.approx((sum(window) + sum(landmarks)) / 32 + made)


def test_all_forms_are_all_different_and_named_ones_as_named() -> None:
    for objective, same in (("clm", "pooled"), ("mlm", "inverse")):
        every = select(None, base(objective))
        assert same not in [variant.name for variant in every]  # the default already
        assert len({variant.config for variant in every}) == len(every)
        assert [variant.name for variant in select([same, "nystrom", same], base(objective))] == [same, "nystrom"]
    both = select(["softmax+conv-none"], base())[0]
    assert (both.config.attention, both.config.conv_kernel) == ("softmax", 0)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_forms_start_from_the_same_weights(objective: str) -> None:
    origin = base(objective)
    names = [form.name for form in FORMS[objective]] + ["softmax+conv-none", "softmax+conv-5"]
    models = [initial_model(variant.config, origin, 4) for variant in select(names, origin)]
    weights = [dict(model.named_parameters()) for model in models]
    for one, other in itertools.combinations(weights, 2):
        for name in one.keys() & other.keys():
            if one[name].shape == other[name].shape:
                assert torch.equal(one[name], other[name]), name
    assert len({len(w) for w in weights}) > 1  # they do not all have the same parameters
    again = dict(initial_model(origin, origin, 5).named_parameters())
    assert not torch.equal(again["layers.0.attention.query.weight"], weights[0]["layers.0.attention.query.weight"])


# --- training and measuring


@torch.no_grad()
def test_scores_are_those_of_the_models_own_loss() -> None:
    task = recall()
    step = TrainStep(initial_model(base(), base(), 0), RECIPE)
    scores = evaluate(step.model, task, RECIPE)
    outs = [step.model(batch.input_ids, batch.labels) for batch in task.held_out()]
    targets = sum(int(out.num_targets) for out in outs)
    assert scores.overall.targets == targets == 24
    assert scores.overall.loss == pytest.approx(sum(float(out.loss_sum) for out in outs) / targets, rel=1e-5)
    right = sum(int((step.model(batch.input_ids).logits.argmax(-1) == batch.labels).sum()) for batch in task.held_out())
    assert scores.overall.accuracy == right / targets
    bins = [part for part in scores.groups["distance in windows"] if part.targets]
    assert sum(part.targets for part in bins) == targets
    assert sum(part.loss * part.targets for part in bins) == pytest.approx(scores.overall.loss * targets)


def test_training_is_a_function_of_the_seed_and_learns() -> None:
    task = Passkey(Shape(16, 512, 512), "clm", vocab_size=24, digits=1, window=8)
    recipe = Recipe(tokens=40 * 512, batch_tokens=512, seq_len=16, lr=2e-2, bf16=False, device="cpu")
    origin = base(vocab_size=24, init_std=0.2)
    curves = [train(TrainStep(initial_model(origin, origin, 1), recipe), task.train_batches(1)).curve for _ in range(2)]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == list(range(1, 41))
    assert curves[0][-1][1] < 0.8 * math.log(10) < curves[0][0][1]


def test_learning_rate_rises_and_falls_to_zero() -> None:
    recipe = Recipe(tokens=2000, batch_tokens=100, seq_len=50, lr=1.0, bf16=False, device="cpu")
    rates = [recipe.lr_at(step) for step in range(recipe.steps)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0 - 1 / 18])
    assert rates[-1] == 0.0
    assert len(rates) == 20


def test_memory_and_time_of_a_step() -> None:
    task = recall()
    variants = select(["softmax", "nystrom"], base())
    steps = {v.name: TrainStep(initial_model(v.config, base(), 0), RECIPE) for v in variants}
    batch = next(task.train_batches(0))
    half = batch._replace(input_ids=batch.input_ids[:2], labels=batch.labels[:2])
    kept = [memory(steps["nystrom"], part).bytes for part in (half, batch)]
    assert 1.5 < kept[1] / kept[0] < 2.0  # by rows, but for what they share
    assert kept[1] > batch.input_ids.numel() * 2 * 4 * 16 * 4  # more than q, k, v and one state of each layer

    before = [parameter.clone() for parameter in steps["nystrom"].model.parameters()]
    times = interleaved(steps, batch, "softmax", 3)
    assert times["softmax"].ratio == 1.0
    assert all(step.seconds > 0 and step.ratio > 0 for step in times.values())
    after = steps["nystrom"].model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- the command


@pytest.mark.parametrize(("task", "objective"), [("mqar", "clm"), ("mqar", "mlm"), ("passkey", "mlm")])
def test_every_form_trains_and_is_in_the_table(
    task: str, objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "results.json"
    assert cli.main(["--task", task, "--objective", objective, "--out", str(out), *SMALL, *SETS]) == 0
    content, printed = json.loads(out.read_text()), capsys.readouterr().out
    names = {variant.name for variant in select(None, base(objective))}
    runs, (timing,) = content["runs"].values(), content["timings"].values()
    assert {run["form"] for run in runs} == set(timing["forms"]) == names
    for run in runs:
        assert len(run["training"]["curve"]) == 2
        assert run["memory"]["bytes"] > 0
        assert run["model"]["objective"] == run["base"]["objective"] == objective
        assert run["recipe"]["tokens"] == 256
        assert {"command", "date", "commit", "torch", "cpu", "gpu", "threads"} <= run["provenance"].keys()
        (line,) = [x for x in printed.splitlines() if x.startswith(f"| {run['form']} |") and "MiB" not in x][:1]
        assert f"{100 * run['score']['accuracy']:.1f}" in line
        assert f"{run['score']['loss']:.4f}" in line
        assert f"| {timing['forms'][run['form']]['ratio']:.2f} |" in line
    assert "chance" in printed


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_books(objective: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--task", "books", "--objective", objective, "--train", str(shards), "--valid", str(shards), *SMALL]
    arguments += [part for part in SETS if "vocab_size" not in part] + ["--forms", "softmax,nystrom", "--bf16"]
    assert cli.main([*arguments, "--out", str(tmp_path / "r.json")]) == 0
    printed = capsys.readouterr().out
    runs = {run["form"]: run for run in json.loads((tmp_path / "r.json").read_text())["runs"].values()}
    losses = {form: run["score"]["loss"] for form, run in runs.items()}
    assert f"| {losses['nystrom']:.4f} | {100 * (losses['nystrom'] / losses['softmax'] - 1):+.2f}% |" in printed
    assert "Without recall: unigram entropy" in printed
    if objective == "clm":
        parts = runs["nystrom"]["groups"]["position"]
        assert sum(part["loss"] for part in parts) / 8 == pytest.approx(losses["nystrom"])
        assert f"| {(parts[6]['loss'] + parts[7]['loss']) / 2:.4f} |" in printed


@pytest.mark.parametrize(("task", "label"), [("mqar-spread", "distance in windows"), ("variables", "hops")])
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_tasks_of_spread_facts(
    task: str, label: str, objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--task", task, "--objective", objective, "--forms", "softmax", "--out", str(tmp_path / "r.json")]
    assert cli.main([*asked, *SMALL, *SETS, *CHAINS, "--gap", "2", "--timing-rounds", "0"]) == 0
    printed = capsys.readouterr().out
    (run,) = json.loads((tmp_path / "r.json").read_text())["runs"].values()
    assert run["task"]["name"] == task
    assert sum(part["targets"] for part in run["groups"][label]) == run["score"]["targets"] > 0
    assert f"| accuracy, % by {label} |" in printed


def test_several_numbers_of_pairs_and_longer_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = ["--forms", "softmax", *SMALL, *SETS, "--timing-rounds", "0", "--batch-tokens", "2048"]
    spread = ["--task", "mqar-spread", "--lead-in", "16", "--lead-in-tokens", "100", "--gap", "2", "--pairs", "4,2"]
    passkey = ["--task", "passkey", "--test-seq-lens", "64,32", "--digits", "1"]
    for asked, label, bins in ((spread, "pairs", "2 | 4"), (passkey, "tokens of the row", "32 | 64")):
        out = tmp_path / f"{asked[1]}.json"
        assert cli.main([*every, *asked, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        (run,) = json.loads(out.read_text())["runs"].values()
        parts = run["groups"][label]
        assert sum(part["targets"] for part in parts) == run["score"]["targets"]
        assert all(part["targets"] for part in parts)
        assert f"| accuracy, % by {label} | {bins} |" in printed
        assert f"| {100 * parts[0]['accuracy']:.1f} | {100 * parts[1]['accuracy']:.1f} |" in printed


def test_a_result_without_a_grouping_is_left_out_of_its_table(shards: Path) -> None:
    """Results from before books were grouped by the last occurrence are still in the other tables."""
    task, variants = Books.open(shards, shards, "clm", SHAPE, 1024, window=8), select(["softmax", "nystrom"], base())
    part = {"loss": 2.0, "accuracy": 0.5, "targets": 8}
    since = "windows since the last occurrence"
    rest = {"parameters": 1234, "memory": {"bytes": 2**20, "kind": "kept"}, "training": {"mean_loss": 2.5}}
    old: Record = {"score": part, "groups": {"position": [part] * 8}, **rest}
    new: Record = old | {"groups": {"position": [part] * 8, since: [part, part | {"targets": 0}, part, part]}}
    lines = report(task, variants, {"softmax": {0: old}, "nystrom": {0: new}}, None, 32).splitlines()
    at = lines.index(f"| loss, nats by {since} | 0-1 | 4-16 | never |")
    assert lines[at + 2 : at + 4] == ["| softmax | - | - | - |", "| nystrom | 2.0000 | 2.0000 | 2.0000 |"]
    lines = report(task, variants, {"softmax": {0: old}, "nystrom": {0: old}}, None, 32).splitlines()
    assert not any(since in line for line in lines)


def test_what_is_there_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--task", "mqar", "--out", str(tmp_path / "r.json"), *SMALL, *SETS]
    trained: list[str] = []

    def counted(step: TrainStep, batches: Any) -> Any:
        trained.append(step.model.config.attention)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return train(step, batches)

    monkeypatch.setattr(study, "train", counted)
    cli.main([*arguments, "--forms", "softmax,window"])
    first = capsys.readouterr().out.split("\n\n", 1)[1]
    assert trained == ["softmax", "window"]
    cli.main([*arguments, "--forms", "softmax,window"])
    again = capsys.readouterr().out
    assert len(trained) == 2
    assert again.split("\n\n", 1)[1] == first  # the times too
    assert again.count("already there") == 2

    with pytest.raises(KeyboardInterrupt):  # the third run is kept, the fourth is not
        cli.main([*arguments, "--forms", "softmax,window", "--seeds", "0,1"])
    cli.main([*arguments, "--forms", "softmax,window", "--seeds", "0,1"])
    assert trained[2:] == ["softmax", "window", "window"]
    cli.main([*arguments, "--forms", "softmax", "--lr", "0.5"])  # other settings: another result
    cli.main([*arguments, "--forms", "softmax", "--pairs", "2"])
    assert len(trained) == 7
    assert len(json.loads((tmp_path / "r.json").read_text())["runs"]) == 6


def test_the_table_has_means_spreads_and_paired_differences() -> None:
    task, variants = recall(), select(["softmax", "nystrom"], base())

    def record(accuracy: float, loss: float | None) -> Record:
        part = {"loss": loss, "accuracy": accuracy, "targets": 10}
        groups = {"distance in windows": [{"loss": None, "accuracy": None, "targets": 0}, part, part]}
        rest = {"parameters": 1234, "memory": {"bytes": 2**20, "kind": "kept"}, "training": {"mean_loss": 2.5}}
        return {"score": part, "groups": groups, **rest}

    runs = {
        "softmax": {0: record(0.50, 1.0), 1: record(0.80, 2.0)},
        "nystrom": {0: record(0.40, 1.5), 1: record(0.80, None)},
    }
    timing = {"rounds": 3, "forms": {"softmax": {"seconds": 0.1, "ratio": 1.0}}}
    lines = report(task, variants, runs, timing, 32).splitlines()
    softmax = "| softmax | attention softmax | 65.0 (30.0) | +0.00% (0.00%) | 1.5000 (1.0000) | 2.5000 (0.0000) |"
    nystrom = "| nystrom | - | 60.0 (40.0) | -10.00% (20.00%) | not finite | 2.5000 (0.0000) |"
    read = f"{entries_read(variants[1].config, 32):.1f}"
    assert lines[2:4] == [
        softmax + " 1,234 | 16.5 | 1.0 | 100.0 | 1.00 |",
        nystrom + f" 1,234 | {read} | 1.0 | - | - |",
    ]
    assert "| accuracy, % by distance in windows | 1-2 | 2-4 |" in lines  # the bin without targets is left out
    assert "| chance: one of the row's values | 33.3 | 33.3 |" in lines
    assert "| held-out targets | 10 | 10 |" in lines
    assert any("seeds 0, 1, in brackets largest minus smallest" in line for line in lines)


def test_a_number_that_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json")
    results.add_run("a", {"score": {"loss": math.nan}, "curve": [(1, math.inf)]})
    assert Results(tmp_path / "r.json").runs == {"a": {"score": {"loss": None}, "curve": [[1, None]]}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forms", "softmax,reformer"], "no form 'reformer' for objective clm; there are softmax, window"),
        (["--forms", "landmarks-half"], "no form 'landmarks-half' for objective clm"),
        (["--forms", ","], "names no form"),
        (["--forms", "segment-double", "--set", "window_segments=3"], "window_segments 3 does not halve"),
        (["--forms", "segment-half", "--set", "segment_length=2"], "form segment-half: segment_length"),
        (["--pairs", "17", "--seq-len", "128"], "--set vocab_size=50 or more"),
        (["--pairs", "8"], "no room for 8 queries"),
        (["--gap", "-1"], "no negative gap"),
        (["--seq-len", "8"], "all attention would be exact"),
        (["--set", "hiden_size=32"], "did you mean 'hidden_size'?"),
        (["--set", "num_heads=3"], "not divisible by num_heads"),
        (["--set", "num_heads"], "write it as key=value"),
        (["--set", "attention=window"], "choose with --forms"),
        (["--seeds", "a"], "write whole numbers"),
        (["--lr", "0"], "--lr 0.0: must be a positive number"),
        (["--tokens", "0"], "must be at least 1"),
        (["--device", "abacus"], "--device abacus"),
        (["--task", "passkey", "--set", "vocab_size=20"], "has no filler"),
        (["--task", "passkey", "--digits", "16", "--set", "vocab_size=200"], "no room for a needle"),
        (["--task", "mqar-spread", "--spread", "1.5"], "a spread between 0 and 1"),
        (["--task", "mqar-spread", "--lead-in", "8,16"], "--lead-in 8,16: lengths from 16 to 32"),
        (["--task", "mqar-spread", "--lead-in", "16", "--set", "vocab_size=22"], "the 3 keys and values"),
        (["--task", "mqar-spread", "--lead-in", "16", "--lead-in-tokens", "0"], "must be at least 1"),
        (["--task", "variables", "--lead-in", "64"], "--lead-in 64: lengths from 16 to those of the rows, 32"),
        (["--task", "mqar-spread", "--pairs", "2,x"], "--pairs 2,x: write whole numbers"),
        (["--lead-in", "16"], "--lead-in is for tasks mqar-spread and variables"),
        (["--pairs", "1,2"], "several are for task mqar-spread"),
        (["--test-seq-lens", "64"], "--test-seq-lens is for task passkey"),
        (["--task", "passkey", "--test-seq-lens", "4,64"], "rows of 4 tokens have no room for a needle"),
        (["--task", "mqar-spread", "--pairs", "9"], "no room for 9 keys with 1 value(s)"),
        (["--task", "mqar-spread", "--pairs", "9", "--values", "2"], "--set vocab_size=54 or more"),
        (["--task", "variables", "--chains", "1"], "at least two chains"),
        (["--task", "variables", "--chains", "4", "--hops", "4"], "--set vocab_size=56 or more"),
        (["--task", "variables", "--chains", "4", "--hops", "2"], "--seq-len 48 or more"),
        (["--task", "books"], "vocab_size: task books takes it from the shards"),
    ],
)
def test_refusals(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = ["--task", "mqar", "--out", str(tmp_path / "r.json"), *SMALL, *SETS, *arguments]
    assert run_cli(cli.main, "ablation", every) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_refusals_of_files(tmp_path: Path, shards: Path) -> None:
    books = ["--task", "books", "--out", str(tmp_path / "r.json"), "--seq-len", "256"]
    with pytest.raises(UserError, match="--train SHARDS --valid SHARDS"):
        cli.main(books)
    with pytest.raises(UserError, match="nowhere"):
        cli.main([*books, "--train", str(tmp_path / "nowhere"), "--valid", str(shards)])
    with pytest.raises(UserError, match="less than one"):
        cli.main([*books, "--train", str(shards), "--valid", str(shards), "--seq-len", "8192"])
    with pytest.raises(UserError, match="not a multiple of --seq-len"):
        cli.main([*books, "--train", str(shards), "--valid", str(shards), "--batch-tokens", "1000"])
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(UserError, match="holds no results of this benchmark"):
        cli.main(["--task", "passkey", "--out", str(tmp_path / "r.json")])
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(UserError, match="not a readable file of results"):
        cli.main(["--task", "passkey", "--out", str(tmp_path / "r.json")])
