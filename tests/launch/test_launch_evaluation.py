"""Evaluations on several processes: statuses, signals, nobody left behind; then (slow) the real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from processes_case import family, start_python, survivors, wait_until

from data_pipeline.errors import run_cli
from launch import evaluation
from launch.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]

STAND_IN = """
import os, signal, subprocess, sys, time
rank, folder, mode = os.environ["RANK"], sys.argv[1], sys.argv[2]
def mark(name):
    open(f"{folder}/{name}", "w").close()
if mode == "done":
    mark("world" + os.environ["WORLD_SIZE"] + "-" + rank)
if mode == "mistake":  # known to all; process 0 says it a moment after the other is gone
    time.sleep(0.5 if rank == "0" else 0)
    mark("said" + rank)
    sys.exit(2)
if mode == "crash" and rank == "1":
    sys.exit(3)
if mode == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if mode in ("crash", "killed", "works", "stubborn"):
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", __file__], start_new_session=True)
    mark("ready" + rank)
    time.sleep(600)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(evaluation, "LAST_WORDS_SECONDS", 1.5)
    monkeypatch.setattr(evaluation, "KILL_SECONDS", 1.0)

    def launch(mode: str) -> int:
        monkeypatch.setattr(evaluation, "command", lambda words: [sys.executable, str(script), str(tmp_path), mode])
        code = evaluation.launch_evaluation(2, [])
        assert leftovers(str(script)) == []
        return code

    return launch


def leftovers(word: str) -> list[list[str]]:
    found = []
    for process in psutil.process_iter():
        try:
            if word in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
        except psutil.Error:
            continue
    return found


def test_all_done(stand_in: Callable[[str], int], tmp_path: Path) -> None:
    assert stand_in("done") == 0
    assert {path.name for path in tmp_path.glob("world*")} == {"world2-0", "world2-1"}


def test_a_mistake_is_said_before_the_end(stand_in: Callable[[str], int], tmp_path: Path) -> None:
    assert stand_in("mistake") == 2
    assert (tmp_path / "said0").exists()


@pytest.mark.parametrize(("mode", "status"), [("crash", 3), ("killed", 137)])
def test_a_crash_ends_all(
    stand_in: Callable[[str], int], capfd: pytest.CaptureFixture[str], mode: str, status: int
) -> None:
    assert stand_in(mode) == status
    assert ("process 1 was killed by signal 9" in capfd.readouterr().err) == (mode == "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("mode", ["works", "stubborn"])
def test_a_request_to_stop_ends_all(
    stand_in: Callable[[str], int], tmp_path: Path, mode: str, number: signal.Signals
) -> None:
    def ask() -> None:
        while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask, daemon=True).start()
    assert stand_in(mode) == 128 + number


@pytest.mark.parametrize("nproc", [1, 2])
def test_nobody_outlives_a_launcher_that_is_killed(tmp_path: Path, nproc: int) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/__init__.py").touch()
    stand_in = "import os, time\nopen('ready' + os.environ['RANK'], 'w').close()\ntime.sleep(600)\n"
    (tmp_path / "eval/__main__.py").write_text(stand_in)
    code = f"from launch.evaluation import launch_evaluation\nlaunch_evaluation({nproc}, [])"
    top = start_python(code, tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("ready*"))) == nproc, top)
    children = family(top)
    assert len(children) == nproc
    top.kill()
    top.wait(60)
    assert survivors(children) == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nproc", "0", "--", "eval", "lm", "--checkpoint", "x"], "--nproc 0"),
        (["--"], "`eval SUITE ...`, and not nothing"),
        (["--", "train", "--config", "x"], "and not 'train --config'"),
        (["--", "eval", "list"], "`eval list` is for one process"),
        (["--", "nystrom", "eval", "compare", "a", "b"], "`eval compare` is for one process"),
        (["--", "eval", "lmm", "--checkpoint", "x"], "no suite 'lmm': did you mean 'lm'?"),
        (["--", "eval", "lm"], "say which with --checkpoint RUN"),
    ],
)
def test_a_mistake_in_the_command_is_told_before_anything_starts(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("something was started"))
    assert run_cli(main, "nystrom launch", ["local", *argv]) == 2
    assert words in capsys.readouterr().err


# --- the real one -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of an evaluation of a tiny causal model."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from data_pipeline.prepare.plan import plan_preparation
    from data_pipeline.prepare.run import prepare
    from data_pipeline.tokenization.training import train_tokenizer
    from pretrain.checkpoint.load import unique_weights, weights_hash
    from pretrain.config import RunConfig
    from pretrain.model import ModelConfig, build_model

    root = tmp_path_factory.mktemp("launched")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["river", "stone", "cloud", "lamp"], size=40)) for _ in range(30)]
    source = root / "text.jsonl"
    source.write_text("".join(json.dumps({"text": t, "label": t[0]}) + "\n" for t in texts))
    shards = prepare(plan_preparation([str(source)], train_tokenizer(texts, 280)), root / "shards").shards
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=shards.vocab_size, objective="clm", hidden_size=32, num_layers=1, num_heads=2, num_landmarks=8,
        segment_length=8, conv_kernel=5,
    )  # fmt: skip
    weights = unique_weights(build_model(config))
    run = RunConfig.model_validate(
        {
            "name": "tiny",
            "model": config.model_dump(),
            "data": {"train": str(shards.path), "valid": str(shards.path)},
            "curriculum": [{"until_tokens": 1024, "seq_len": 64, "micro_batch": 2}],
            "batch_tokens": 128,
        }
    )
    export = root / "tiny"
    export.mkdir()
    save_file(weights, export / "model.safetensors")
    (export / "config.yaml").write_text(run.to_yaml())
    shards.tokenizer().save(export)
    (export / "export.json").write_text(json.dumps({"weights_hash": weights_hash(weights), "tokens": 1024, "step": 8}))
    words = ["eval", "lm", "classify", "--checkpoint", str(export), "--train", str(source), "--test", str(source)]
    return [*words, "--seeds", "2", "--scratch-seeds", "1", "--epochs", "1", "--max-length", "32"]


def python(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, check=False, timeout=170, env=environment
    )


@pytest.mark.slow
def test_two_processes_compute_what_one_computes(labelled_run: list[str], tmp_path: Path) -> None:
    def numbers(folder: str) -> dict[str, Any]:
        found = {}
        for path in sorted((tmp_path / folder).glob("*.json")):
            raw = json.loads(path.read_text())
            found[path.name] = {k: v for k, v in raw.items() if k not in ("seconds", "created", "environment")}
        assert set(found) == {"validity.json", "lm.json", "classify.json"}
        return found

    one = python(*labelled_run, "--out", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    two = python("launch", "local", "--nproc", "2", "--", *labelled_run, "--out", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    assert numbers("two") == numbers("one")

    def said(text: str) -> list[str]:
        """Without the progress of the fits, of which the first process tells its own."""
        return [line for line in text.splitlines() if ", seed " not in line.partition(":")[0]]

    assert said(two.stdout) == said(one.stdout.replace(str(tmp_path / "one"), str(tmp_path / "two")))  # said once
    again = python("launch", "local", "--nproc", "2", "--", *labelled_run, "--out", str(tmp_path / "two"))
    assert "classify: already there" in again.stdout


@pytest.mark.slow
def test_a_mistake_is_said_once_and_the_status_is_2(labelled_run: list[str], tmp_path: Path) -> None:
    words = [*labelled_run, "--out", str(tmp_path), "--text-field", "body"]
    done = python("launch", "local", "--nproc", "2", "--", *words)
    assert done.returncode == 2
    assert done.stderr.count("1 of 2 suites could not be run\nclassify: ") == 1
    assert "no field 'body'" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "lm.json").exists()  # the other suite was run


def test_a_killed_process_is_named_before_one_that_lost_it() -> None:
    def ended(*codes: int | None) -> list[SimpleNamespace]:
        return [SimpleNamespace(returncode=code) for code in codes]

    for codes, first in (((1, -9), 1), ((0, 1, 2), 1), ((-15, -9), 0)):
        processes = ended(*codes)
        assert evaluation._first_failure(processes) is processes[first]  # type: ignore[arg-type]
    assert evaluation._first_failure(ended(0, None)) is None  # type: ignore[arg-type]
