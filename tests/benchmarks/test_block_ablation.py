"""The ablation of blocks: equal beginnings, equal tokens, equal time, and what the table says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention_ablation.books import Books
from benchmarks.attention_ablation.forms import configure
from benchmarks.attention_ablation.study import Study
from benchmarks.attention_ablation.tasks import Shape
from benchmarks.attention_ablation.training import Recipe, TrainStep, initial_model
from benchmarks.block_ablation import __main__ as cli
from benchmarks.block_ablation.__main__ import steps_within
from benchmarks.block_ablation.blocks import BLOCKS, MODERN, select
from data_pipeline.errors import UserError, run_cli
from data_pipeline.prepare.plan import plan_preparation
from data_pipeline.prepare.run import prepare
from data_pipeline.tokenization.training import train_tokenizer
from pretrain.model.config import ModelConfig

TINY = {"hidden_size": 16, "num_layers": 4, "num_heads": 2, "segment_length": 4, "num_landmarks": 8, "conv_kernel": 9}
SETS = [f"--set={name}={value}" for name, value in TINY.items()]
SMALL = ["--tokens", "256", "--batch-tokens", "128", "--seq-len", "32", "--held-out-tokens", "256", "--device", "cpu"]
SHAPE = Shape(seq_len=32, batch_tokens=128, held_out_tokens=256)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    texts = [f"row {i} of {i * 7919 % 1000} " * (1 + i % 4) for i in range(120)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(plan_preparation([folder / "a.jsonl"], train_tokenizer(texts, 270)), folder / "shards")
    return folder / "shards"


def base(**changes: Any) -> ModelConfig:
    return configure({**TINY, "vocab_size": 48, **changes}, "test")


def test_each_key_alone_and_all_together() -> None:
    variants = {variant.name: variant for variant in select(None, base())}
    assert list(variants) == [*BLOCKS, "modern"]
    assert variants["published"].config == base()
    for name, variant in variants.items():
        changed = {key for key, value in variant.config.model_dump().items() if base().model_dump()[key] != value}
        assert changed | set(variant.training) == {key for part in _parts(name) for key in BLOCKS[part]}, name
    modern = variants["modern"]
    assert modern.config.ffn == "swiglu"
    assert modern.config.positions == ("rotary", "rotary", "rotary", "none")
    assert modern.training == {"z_loss": 1e-4}
    assert "z_loss 0.0001" in modern.describe()
    assert [v.name for v in select(["rmsnorm+swiglu"], base())] == ["published", "rmsnorm+swiglu"]


def _parts(name: str) -> tuple[str, ...]:
    return MODERN if name == "modern" else (name,)


def test_blocks_start_from_the_same_weights_and_scaled_ones_from_a_share_of_them() -> None:
    models = {v.name: dict(initial_model(v.config, base(), 3).named_parameters()) for v in select(None, base())}
    for name, weights in models.items():
        scaled = name in ("residual-scaled", "modern")
        for key, value in weights.items():
            expected = models["published"].get(key)
            if expected is None or expected.shape != value.shape:
                continue
            factor = 8**-0.5 if scaled and key.endswith("output.weight") else 1.0
            torch.testing.assert_close(value, expected * factor, rtol=1e-6, atol=0)
    assert models["swiglu"]["layers.0.feed_forward.gate.weight"].shape == (48, 16)


def test_the_loss_that_is_told_is_without_z_loss() -> None:
    recipe = Recipe(512, 128, 32, 1e-2, False, "cpu", z_loss=0.5)
    plain = Recipe(512, 128, 32, 1e-2, False, "cpu")
    steps = [TrainStep(initial_model(base(), base(), 0), each) for each in (recipe, plain)]
    ids = torch.randint(0, 48, (2, 32), generator=torch.Generator().manual_seed(0))
    batch: Any = type("Batch", (), {"input_ids": ids, "labels": ids})
    with_it, without = (float(step.loss(batch).detach()) for step in steps)
    assert with_it > without + 1
    assert [step(batch, 0.0) for step in steps] == pytest.approx([without] * 2, rel=1e-6)  # summed in another order


def test_more_steps_go_on_with_the_same_text(shards: Path) -> None:
    short, long = (Books.open(shards, shards, "mlm", SHAPE, tokens, window=8) for tokens in (512, 1024))
    first, second = list(short.train_batches(5)), list(long.train_batches(5))
    assert (len(first), len(second)) == (4, 8)
    for one, other in zip(first, second[:4], strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)


def test_steps_that_fit_into_a_time() -> None:
    assert steps_within(12.0, 0.5) == 24
    assert steps_within(12.4, 0.5) == 24
    assert steps_within(12.4999, 0.5) == 24
    assert steps_within(61 * 0.1, 0.1) == 61  # though the quotient is 60.99999
    assert steps_within(0.1, 5.0) == 1


def test_both_tables(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"published": 0.25, "swiglu": 0.5, "modern": 0.125}
    times = {name: {"seconds": value, "ratio": value / 0.25} for name, value in seconds.items()}
    monkeypatch.setattr(Study, "time", lambda self, rounds: {"rounds": rounds, "forms": times})
    out = tmp_path / "r.json"
    arguments = ["--train", str(shards), "--valid", str(shards), "--blocks", "swiglu,modern", "--out", str(out)]
    assert cli.main([*arguments, *SMALL, *SETS]) == 0
    printed = capsys.readouterr().out
    runs = list(json.loads(out.read_text())["runs"].values())
    assert len(runs) == 2 * 5  # the baseline trains once for both
    for run in runs:
        objective = run["model"]["objective"]
        assert run["recipe"]["tokens"] in {"published": (256,), "swiglu": (256, 128), "modern": (256, 512)}[run["form"]]
        assert run["recipe"]["z_loss"] == (1e-4 if run["form"] == "modern" else 0)
        assert run["model"]["bias"] == (run["form"] != "modern")
        section = printed.split(f"{objective}: ")[1].split("Held-out")[0]
        (line,) = [x for x in section.splitlines() if x.startswith(f"| {run['form']} |")]
        assert f"| {run['score']['loss']:.4f} |" in line
        assert f"| {times[run['form']]['ratio']:.2f} | {round(0.5 / seconds[run['form']])} |" in line
    assert "the steps that fit into 0.5 s by them" in printed
    share = ["--share", "0.5", "--equal", "time", "--objectives", "clm", "--optimizer", "muon"]
    assert cli.main([*arguments, *SMALL, *SETS, *share]) == 0
    printed = capsys.readouterr().out
    assert "All but published have 0.5 of that time." in printed
    added = list(json.loads(out.read_text())["runs"].values())[len(runs) :]
    assert {run["form"]: run["recipe"]["tokens"] for run in added} == {"published": 256, "swiglu": 128, "modern": 256}
    assert {run["recipe"]["optimizer"] for run in added} == {"muon"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "moe"], "no block 'moe'; there are published, geglu"),
        (["--blocks", "nope-4th", "--set=num_layers=2"], "no layer has none"),
        (["--objectives", "rlhf"], "--objectives: no 'rlhf'; there are mlm, clm"),
        (["--equal", "money"], "--equal: no 'money'; there are tokens, time"),
        (["--seconds", "0"], "--seconds 0.0: must be a positive number"),
        (["--share", "0"], "--share 0.0: must be a positive number"),
        (["--optimizer", "sgd"], "--optimizer sgd: there are adamw, lion, muon"),
        (["--seeds", "a"], "write whole numbers"),
        (["--set", "vocab_size=9"], "--objectives and the shards say that"),
        (["--set", "num_heads"], "write it as key=value"),
        (["--train", "nowhere"], "nowhere"),
    ],
)
def test_refusals(
    arguments: list[str], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--train", str(shards), "--valid", str(shards), "--out", str(tmp_path / "r.json"), *SMALL, *SETS]
    assert run_cli(cli.main, "blocks", [*given, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(UserError, match="no block 'moe'"):
        select(["rmsnorm+moe"], base())
