"""A run through interruptions: resume to the bit, torn checkpoints, lost processes, and what is refused."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks, values
from training_case import STAGES, events, metrics, numbers, settings, weights_hash, write_config

from data_pipeline.errors import UserError, run_cli

DROPOUT = {"dropout": 0.2}  # so that a generator that is not restored changes the losses


def train(config: str, *words: str) -> int:
    """Runs in the ranks: the command itself."""
    from pretrain.cli import main

    return run_cli(main, "nystrom train", ["--config", config, *words])


def train_until(config: str, step: int, how: str) -> int:
    """Runs in the ranks: as :func:`train`, but the last rank gets a signal in a step, a validation or a save."""
    import os
    import signal

    from pretrain import trainer
    from pretrain.engine.training import TrainingEngine

    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    number = signal.SIGKILL if how == "kill" else signal.SIGTERM
    count = {"steps": 0}

    def strike() -> None:
        if last and count["steps"] == step:
            os.kill(os.getpid(), number)

    take_step, validate, save = TrainingEngine.step, trainer.validate, TrainingEngine.save

    def counting_step(self: Any, lr: float) -> Any:
        count["steps"] += 1
        if how in ("step", "kill"):
            strike()
        return take_step(self, lr)

    def struck_validation(*args: Any, **kwargs: Any) -> Any:
        if how == "validation":
            strike()
        return validate(*args, **kwargs)

    def struck_save(self: Any, folder: Path, tag: str) -> None:
        if how == "saving":
            strike()
        save(self, folder, tag)

    TrainingEngine.step, TrainingEngine.save = counting_step, struck_save  # type: ignore[method-assign]
    trainer.validate = struck_validation
    return train(config)


def pretend_to_be_a_rank(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    """The first process of a launch, as far as mistakes that are found before the process group are concerned."""
    env = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))


def resumable(corpus: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """A run with validation, checkpoints and dropout, in which a lost generator or position would show."""
    base: dict[str, Any] = {
        "model": DROPOUT,
        "data": {"valid": str(corpus / "valid")},
        "validation": {"every_tokens": 512, "tokens": 1024, "samples": 0},
        "checkpoint": {"every_tokens": 768},
    }
    return settings(corpus, runs, **{**base, **changes})


@pytest.mark.parametrize(
    ("zero_stage", "precision", "objective", "stop_at", "how"),
    [
        (0, "fp32", "mlm", 4, "step"),  # at the curriculum's edge
        pytest.param(1, "bf16", "mlm", 3, "step", marks=pytest.mark.slow),  # in the middle of a stage
        pytest.param(2, "bf16", "clm", 5, "step", marks=pytest.mark.slow),
        (2, "fp32", "mlm", 4, "validation"),
        pytest.param(2, "bf16", "mlm", 3, "saving", marks=pytest.mark.slow),
        (3, "bf16", "clm", 5, "step"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    corpus: Path, tmp_path: Path, zero_stage: int, precision: str, objective: str, stop_at: int, how: str
) -> None:
    model = {**DROPOUT, "objective": objective}
    if (zero_stage, objective) == (2, "clm"):
        model["attention"] = ["nystrom", "softmax"]  # layers of unlike forms
    common = {"zero_stage": zero_stage, "precision": precision, "model": model}
    whole = write_config(tmp_path / "whole.yaml", resumable(corpus, tmp_path, name="whole", **common))
    parts = write_config(tmp_path / "parts.yaml", resumable(corpus, tmp_path, name="parts", **common))
    assert values(run_ranks(train, 2, config=whole)) == [0, 0]
    assert values(run_ranks(train_until, 2, config=parts, step=stop_at, how=how)) == [75, 75]
    run = tmp_path / "parts"
    assert events(run)[-1] == "preempted"
    assert json.loads((run / "status.json").read_text())["code"] == 75
    assert max(row["step"] for row in metrics(run)) == stop_at
    assert values(run_ranks(train, 2, config=parts)) == [0, 0]
    assert "resume" in events(run)
    assert len(metrics(run, "valid")) == 4  # each once, also the one that was cut short
    assert numbers(run) == numbers(tmp_path / "whole")
    assert weights_hash(run) == weights_hash(tmp_path / "whole")


def test_a_lost_process_ends_the_others_and_the_next_start_repeats_what_was_lost(corpus: Path, tmp_path: Path) -> None:
    whole = write_config(tmp_path / "whole.yaml", resumable(corpus, tmp_path, name="whole", zero_stage=2))
    parts = write_config(tmp_path / "parts.yaml", resumable(corpus, tmp_path, name="parts", zero_stage=2))
    assert values(run_ranks(train, 2, config=whole)) == [0, 0]
    began = time.monotonic()
    first, second = run_ranks(train_until, 2, config=parts, step=5, how="kill", timeout=60)
    assert time.monotonic() - began < 50
    assert second.code == -9
    assert (first.code, first.value) == (0, 1)  # the command returned 1
    assert "another process of this run went away" in first.output
    assert "Traceback" not in first.output
    run = tmp_path / "parts"
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["code"], status["step"]) == ("crashed", None, 4)
    assert max(row["step"] for row in metrics(run)) == 4  # beyond the checkpoint of step 3
    assert values(run_ranks(train, 2, config=parts)) == [0, 0]
    assert numbers(run) == numbers(tmp_path / "whole")


@pytest.mark.parametrize(
    "damage",
    [pytest.param("truncated", marks=pytest.mark.slow), "flipped", pytest.param("no manifest", marks=pytest.mark.slow)],
)
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(corpus: Path, tmp_path: Path, damage: str) -> None:
    config = write_config(tmp_path / "run.yaml", resumable(corpus, tmp_path, zero_stage=1))
    assert values(run_ranks(train, 2, config=config)) == [0, 0]
    run = tmp_path / "run"
    before, digest = numbers(run), weights_hash(run)
    newest = run / "checkpoints" / "step000000008"
    victim = next(newest.glob("*rank_1_*optim_states.pt"))
    contents = victim.read_bytes()
    if damage == "truncated":
        victim.write_bytes(contents[:-100])
    elif damage == "flipped":
        victim.write_bytes(contents[:-100] + bytes([contents[-100] ^ 1]) + contents[-99:])
    else:
        (newest / "manifest.json").unlink()
    (run / "export" / "export.json").unlink()
    ended = run_ranks(train, 2, config=config)
    assert values(ended) == [0, 0]
    assert f"{newest} is not used:" in ended[0].output
    assert "step 6, 1,536 tokens" in ended[0].output  # where it resumes
    assert (numbers(run), weights_hash(run)) == (before, digest)


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_when_no_checkpoint_is_whole_it_says_so_and_changes_nothing(corpus: Path, tmp_path: Path, how: str) -> None:
    """Files cut short were taken for saves that had not finished: it trained from step 1 and cut the metrics."""
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, checkpoint={"every_tokens": 1024}))
    assert values(run_ranks(train, 1, config=config)) == [0]
    run = tmp_path / "run"
    for folder in (run / "checkpoints").glob("step*"):
        file = folder / "rng_rank_00000.pt"
        size = file.stat().st_size
        file.write_bytes(b"\0" * size if how == "flipped" else file.read_bytes()[:-1])
    (run / "export" / "export.json").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (end,) = run_ranks(train, 1, config=config)
    assert end.value == 2
    assert "no whole checkpoint is left" in end.output
    what = "does not match its checksum" if how == "flipped" else "bytes, the manifest says"
    assert end.output.count(what) == 2
    assert "start over with --resume never" in end.output
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_run_folder_explains_itself_and_a_finished_run_says_so(corpus: Path, tmp_path: Path) -> None:
    from pretrain.config import load_config

    changes = {"model": {"objective": "clm"}, "validation": {"samples": 1}, "zero_stage": 3}
    config = write_config(tmp_path / "run.yaml", resumable(corpus, tmp_path, **changes))
    assert values(run_ranks(train, 2, config=config)) == [0, 0]
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert names == {
        "README.txt", "config.yaml", "deepspeed.json", "environment.json", "starts.jsonl", "metrics.jsonl",
        "status.json", "checkpoints", "samples", "export", "tokenizer",
    }  # fmt: skip
    umask = os.umask(0o022)
    os.umask(umask)
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix != ".py"]  # DeepSpeed's can be run
    assert [path for path in files if path.stat().st_mode & 0o777 != 0o666 & ~umask] == []
    assert load_config(run / "config.yaml").model.vocab_size == 300
    assert json.loads((run / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 3
    assert (run / "checkpoints" / "latest").read_text() == "step000000008"
    assert len(list((run / "checkpoints").glob("step*"))) == 2
    assert len(list((run / "samples").iterdir())) == 2  # at the ends of the two stages
    assert events(run) == ["start", "stage", "checkpoint", "stage", "checkpoint", "checkpoint", "done"]
    ended = run_ranks(train, 2, config=config)
    assert values(ended) == [0, 0]
    assert [end.output.count("is finished (2,048 tokens); nothing to do") for end in ended] == [1, 0]
    assert len(metrics(run)) == 8


def extend(config: str) -> int:
    """Runs in the ranks."""
    return train(config, "--resume", "extend")


def test_a_finished_run_is_extended_only_when_asked(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common: dict[str, Any] = {"zero_stage": 2, "data": {"valid": str(corpus / "valid")}}
    first = settings(corpus, tmp_path, **common, validation={"tokens": 512})
    config = write_config(tmp_path / "run.yaml", first)
    assert values(run_ranks(train, 1, config=config)) == [0]
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    longer = [STAGES[0], {**STAGES[1], "until_tokens": 2560, "micro_batch": 4}]
    write_config(
        tmp_path / "run.yaml", settings(corpus, tmp_path, **common, curriculum=longer, optimizer={"lr": 0.005})
    )
    assert train(config) == 2
    error = capsys.readouterr().err
    assert "is finished after 2,048 tokens, and this configuration trains to 2,560." in error
    assert "To train the 512 more and replace export/: --resume extend" in error
    assert "If it is extended, the learning rate rises from 0.001 to 0.005" in error
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (ended,) = run_ranks(extend, 1, config=config)
    assert ended.value == 0
    assert (
        "the learning rate rises from 0.001 to 0.005 in one step: that is where wsd over 2,560 tokens" in ended.output
    )
    assert "extends a finished run of 2,048 tokens to 2,560; export/ holds the weights of step 8" in ended.output
    assert "changed since: curriculum.1.until_tokens from 2048 to 2560\n" in ended.output
    assert "changed since: curriculum.1.micro_batch from 2 to 4\n" in ended.output
    assert [row["step"] for row in metrics(run)] == list(range(1, 11))
    (resume,) = [row for row in metrics(run, "event") if row["event"] == "resume"]
    assert resume["changed"]["optimizer.lr"] == [0.01, 0.005]
    # The held-out text is as long as before, though nothing says so any more: losses before and after compare.
    assert set(resume["changed"]) == {"curriculum", "optimizer.lr"}
    assert [row["step"] for row in metrics(run, "valid")] == [4, 8, 10]
    assert metrics(run, "valid")[1]["targets"] == metrics(run, "valid")[2]["targets"]


def test_what_a_resume_refuses(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.yaml"
    config = write_config(path, settings(corpus, tmp_path))
    assert values(run_ranks(train, 1, config=config)) == [0]
    shorter = [{**STAGES[0], "until_tokens": 512}, STAGES[1]]
    for changes, words in [
        ({"seed": 4}, "seed was 3 and is now 4"),
        ({"batch_tokens": 512}, "batch_tokens was 256 and is now 512"),
        ({"model": {"hidden_size": 32}}, "model.hidden_size was 16 and is now 32"),
        ({"optimizer": {"kind": "lion"}}, "optimizer.kind was 'adamw' and is now 'lion'"),
        ({"curriculum": shorter}, "curriculum differs in its past"),
        ({"curriculum": STAGES[:1]}, "block_length was 64 and is now 32"),
        ({"data": {"masking": {"rate": 0.3}}}, "data.masking.rate was 0.15 and is now 0.3"),
        ({"data": {"train": str(corpus / "valid")}}, "are not those that the run was started with"),
    ]:
        write_config(path, settings(corpus, tmp_path, **changes))
        assert train(config) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "--resume never" in error
    write_config(path, settings(corpus, tmp_path))
    pretend_to_be_a_rank(monkeypatch, world_size=3)
    assert train(config) == 2
    assert "3 processes cannot share evenly" in capsys.readouterr().err


def train_anew(config: str) -> int:
    """Runs in the ranks."""
    return train(config, "--resume", "never")


def test_resume_never_moves_the_old_run_aside(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path))
    assert values(run_ranks(train, 1, config=config)) == [0]
    write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, seed=4))
    assert values(run_ranks(train_anew, 2, config=config)) == [0, 0]
    assert weights_hash(tmp_path / "run") != weights_hash(tmp_path / "run.old-1")


def load(path: str) -> tuple[str, int, str, float]:
    """Runs in a rank: what an evaluation sees of a checkpoint."""
    import torch

    from pretrain.checkpoint.load import load_model

    loaded = load_model(path)
    ids = torch.arange(64)[None] % loaded.model_config.vocab_size
    loss = float(loaded.model(ids, labels=ids).loss_sum)
    assert not loaded.model.training
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())
    assert loaded.run_dir is not None
    return loaded.weights_hash, loaded.tokens, loaded.tokenizer.hash, loss


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "bf16")])
def test_load_model_finds_the_same_weights_everywhere(
    corpus: Path, tmp_path: Path, zero_stage: int, precision: str
) -> None:
    config = settings(corpus, tmp_path, zero_stage=zero_stage, precision=precision, checkpoint={"every_tokens": 1024})
    assert values(run_ranks(train, 2, config=write_config(tmp_path / "run.yaml", config))) == [0, 0]
    run = tmp_path / "run"
    seen = [
        values(run_ranks(load, 1, path=str(run / place)))[0] for place in ("", "export", "checkpoints/step000000008")
    ]
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][:2] == (weights_hash(run), 2048)
    (older,) = values(run_ranks(load, 1, path=str(run / "checkpoints/step000000004")))
    assert older[0] != seen[0][0]
    assert older[1] == 1024


def test_load_model_says_what_is_wrong(tmp_path: Path) -> None:
    from pretrain.checkpoint.load import load_model

    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "none")
    with pytest.raises(UserError, match="neither a run folder"):
        load_model(tmp_path)
    runs = tmp_path / "runs"
    (runs / "one" / "checkpoints").mkdir(parents=True)
    (runs / "other").mkdir()
    with pytest.raises(UserError, match=f"export folder: it holds {runs / 'one'}, give one of these"):
        load_model(runs)
    with pytest.raises(UserError, match=f"export folder: give its run, {runs / 'one'}$"):
        load_model(runs / "one" / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no whole checkpoint yet"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"train": "nowhere"}}, "shard folder nowhere does not exist"),
        ({"model": {"vocab_size": 200}}, "model.vocab_size 200 does not match the shards"),
        ({"curriculum": [{**STAGES[0], "seq_len": 65536}], "batch_tokens": 65536}, "less than one block of 65536"),
        ({"data": {"valid": "nowhere"}}, "shard folder nowhere does not exist"),
        ({"deepspeed": {"gradient_clippin": 1}}, "did you mean 'gradient_clipping'"),
        ({"precision": "bf16"}, "zero_stage 0 with bf16 is refused"),
        ({"nme": "x"}, "unknown key 'nme'"),
    ],
)
def test_mistakes_are_told_without_a_traceback_before_torch_is_imported(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, **changes))
    assert train(config) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_rows_must_divide_among_processes(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path))
    pretend_to_be_a_rank(monkeypatch, world_size=3)
    assert train(config) == 2
    error = capsys.readouterr().err
    assert "3 processes cannot share evenly: use 1 or 2 or 4 processes, or batch_tokens 384" in error


PAIR = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "0"}, "not 'WORLD_SIZE'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK 2 does not fit WORLD_SIZE 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "must be whole numbers"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR"),
        ({**PAIR, "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc': it must be the number of a port, 1 to 65535"),
        ({**PAIR, "MASTER_PORT": "99999"}, "MASTER_PORT is '99999'"),
    ],
)
def test_a_wrong_environment_is_named(env: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.distributed.world import read_rank

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        read_rank()
