"""`nystrom init`: it writes a file that config, plan and train take, and refuses with the commands that come first."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands_case import next_commands, parse
from processes_case import start_python
from training_case import metrics

from data_pipeline.prepare.plan import plan_preparation
from data_pipeline.prepare.run import prepare
from data_pipeline.tokenization.training import train_tokenizer
from launch import init, program
from pretrain.config import load_config
from pretrain.config.schema import run_schema
from pretrain.firstrun.speed import Measurer
from pretrain.model.config import ModelConfig
from pretrain.model.flops import forward_flops_per_token

MACHINE = ["--cpu", "--nproc", "1", "--peak-flops", "8e9", "--hours", "0.015"]
"""So little that a hundred steps are trained."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the shards ``train`` of 30,000 tokens and ``valid``, and the texts they are from."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(60)]
    texts = [" ".join(draw.choices(words, k=draw.randint(50, 200))) for _ in range(150)]
    tokenizer = train_tokenizer(texts, 300)
    for name, part in (("train", texts[:130]), ("valid", texts[130:])):
        text = folder / f"{name}.jsonl"
        text.write_text("".join(json.dumps({"text": each}) + "\n" for each in part))
        prepare(plan_preparation([text], tokenizer), folder / name)
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked fits: for what is not about memory, which takes the planner seconds."""
    fits = SimpleNamespace(peak=2**20, state=SimpleNamespace(lasting=0, lasting_on_device=0))
    monkeypatch.setattr("pretrain.planning.fit.MemoryBudget.peaks", lambda *_: [fits])


def words(shards: Path, *more: str) -> list[str]:
    return ["init", "--data", str(shards / "train"), "--valid", str(shards / "valid"), "--out", "first.yaml", *more]


@pytest.mark.usefixtures("roomy")
def test_the_file_is_written_and_taken(
    shards: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program.main(words(shards, *MACHINE)) == 0
    told = capsys.readouterr().err
    config = load_config("first.yaml")
    assert config.name == "first"
    assert config.data.train == str(shards / "train")
    assert config.model.hidden_size == 64
    text = (elsewhere / "first.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=nystrom.schema.json\n# Made by: nystrom init --data ")
    assert json.loads((elsewhere / "nystrom.schema.json").read_text(encoding="utf-8")) == run_schema()
    commands = next_commands(told)
    assert shlex.join(commands[0]).startswith("plan --config first.yaml --gpus 1 --gpu-memory ")
    assert commands[1:] == [["launch", "local", "--nproc", "1", "--config", "first.yaml"]]
    assert [parse(monkeypatch, command).config for command in commands] == ["first.yaml", "first.yaml"]
    assert program.main(["config", "--config", "first.yaml"]) == 0


@pytest.mark.usefixtures("roomy")
def test_gpus_elsewhere(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(words(shards, "--gpus", "8", "--gpu-memory", "80", "--hours", "24", "--name", "big")) == 0
    told, following = capsys.readouterr()
    assert "next: nystrom plan --config first.yaml --gpus 8 --gpu-memory 80 --gpu A100\n" in following
    assert "then: nystrom launch local --nproc 8 --config first.yaml\n" in following
    assert "the text ends it, not the time: more text helps" in told
    assert load_config("first.yaml").name == "big"


@pytest.mark.usefixtures("roomy")
def test_many_gpus_are_for_slurm(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = ["--gpus", "16", "--gpu-memory", "40", "--hours", "2.5", "--gpu", "a100", "--mfu", "0.4"]
    assert program.main(words(shards, *many)) == 0
    assert "nystrom launch slurm --nodes 2 --gpus-per-node 8 --time 3:00:00 --config first.yaml" in (
        capsys.readouterr().err
    )


@pytest.mark.usefixtures("roomy")
def test_an_existing_file_stays_unless_asked(shards: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "first.yaml").write_text("mine")
    assert program.main(words(shards, *MACHINE)) == 2
    assert "first.yaml exists: name another --out, or replace it with --overwrite" in capsys.readouterr().err
    assert (elsewhere / "first.yaml").read_text() == "mine"
    (elsewhere / "nystrom.schema.json").write_text("{}")
    assert program.main(words(shards, *MACHINE, "--overwrite")) == 2
    assert "is not a schema that this program wrote" in capsys.readouterr().err
    assert (elsewhere / "first.yaml").read_text() == "mine"
    (elsewhere / "nystrom.schema.json").unlink()
    assert program.main(words(shards, *MACHINE, "--overwrite")) == 0
    assert load_config("first.yaml").name == "first"


def printed(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The commands in a message, in words."""
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("nystrom ") and ": error:" not in line]


@pytest.mark.usefixtures("roomy")
def test_text_is_told_the_commands_that_come_first(
    shards: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "my text").mkdir()
    for name in ("train", "valid"):
        (elsewhere / "my text" / f"{name}.jsonl").write_bytes((shards / f"{name}.jsonl").read_bytes())
    asked = ["init", "--data", "my text/train.jsonl", "--valid", "my text/valid.jsonl", "--out", "first.yaml", *MACHINE]
    assert program.main(asked) == 2
    commands = printed(capsys)
    assert [command[:2] for command in commands] == [
        ["data", "tokenizer"],
        ["data", "prepare"],
        ["data", "prepare"],
        ["init", "--data"],
    ]
    assert commands[0][-4:] == ["--vocab-size", "4096", "--out", "tokenizer"]
    for command in commands:  # they run as they are
        assert program.main(command) == 0
    assert load_config("first.yaml").data.train == "shards/train"


@pytest.mark.usefixtures("roomy")
def test_held_out_text_is_prepared_with_the_tokenizer_of_the_shards(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = words(shards, *MACHINE)
    asked[asked.index(str(shards / "valid"))] = str(shards / "valid.jsonl")
    assert program.main(asked) == 2
    commands = printed(capsys)
    assert len(commands) == 2
    assert commands[0][4:] == ["--tokenizer", str(shards / "train"), "--out", "shards/valid"]
    for command in commands:
        assert program.main(command) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpus", "8"], "--gpus and --gpu-memory belong together"),
        (["--gpus", "0", "--gpu-memory", "80"], "--gpus 0: must be a positive number"),
        (["--gpus", "1", "--gpu-memory", "80", "--cpu"], "leave out one of them"),
        (["--gpus", "1", "--gpu-memory", "80", "--gpu", "X9"], "--gpu X9: its peak is not known"),
        (["--gpu", "H100"], "--gpu names the kind of --gpus"),
        (["--hours", "nan"], "--hours nan: must be a positive number"),
        (["--mfu", "2"], "--mfu 2.0: must be above 0"),
        (["--name", "a b"], "'a b' can't name a run"),
        (["--out", "first"], "name a file that ends in .yaml"),
        (["--data", "not/there"], "shard folder not/there does not exist"),
        (["--gpus", "64", "--gpu-memory", "80"], "tokens: too few for any first run on 64 process"),
    ],
)
def test_mistakes_are_named(
    more: list[str], message: str, shards: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(words(shards, *more)) == 2
    assert message in capsys.readouterr().err
    assert not list(elsewhere.iterdir())


@pytest.mark.usefixtures("roomy")
def test_without_held_out_text_it_says_what_that_means(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["init", "--data", str(shards / "train"), "--out", "first.yaml", *MACHINE]
    assert program.main(asked) == 0
    assert "without --valid there is no held-out loss" in capsys.readouterr().out
    assert load_config("first.yaml").data.valid is None


def test_proposed_vocabularies_grow_with_the_text() -> None:
    limits, sizes = zip(*init.VOCABULARIES, strict=True)
    assert list(limits) == sorted(limits)
    assert list(sizes) == sorted(sizes)


@pytest.mark.slow
def test_this_machine_is_measured_and_the_run_trains(
    shards: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelConfig(objective="mlm", vocab_size=300, hidden_size=64, num_layers=2, num_heads=2, conv_kernel=5)
    with Measurer(2, 1) as measurer:
        speed = measurer.flops(model, 2, 64)
        assert 1e6 < speed < 1e13
        assert measurer.flops(model, 4, 64) > 0  # it serves several questions
    assert 3 * forward_flops_per_token(model, 64) * 2 * 64 / speed < 60  # seconds of a step
    assert program.main(words(shards, *MACHINE)) == 0
    (plan,) = (words for words in next_commands(capsys.readouterr().err) if words[0] == "plan")
    assert program.main([*plan, "--no-search"]) == 0  # the plan that is printed says that it fits
    assert "It fits in" in capsys.readouterr().out
    code = "from pretrain.cli import main\nraise SystemExit(main(['--config', 'first.yaml']))"
    process = start_python(code, elsewhere)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    run = elsewhere / "runs" / "first"
    losses = [row["loss"] for row in metrics(run)]
    assert losses[-1] < losses[0] - 0.5
    assert metrics(run, "valid")
