"""Looking after the processes of a launch, with DeepSpeed's own launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes_case import REPOSITORY, family, leftovers, start_python, survivors
from ranks import run_ranks, values
from training_case import events, metrics, numbers, settings, weights_hash, write_config, write_corpus


def start(config: str, *words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "launch", "local", "--nproc", "2", "--config", config, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and any(row["step"] >= step for row in metrics(run)):
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"the run did not reach step {step}:\n{process.communicate()[0]}")


def long_run(folder: Path, **changes: Any) -> dict[str, Any]:
    curriculum = [
        {"until_tokens": 25_600, "seq_len": 32, "micro_batch": 4},
        {"until_tokens": 51_200, "seq_len": 64, "micro_batch": 2},
    ]
    model = {"objective": "clm", "dropout": 0.1}
    return settings(folder, folder, zero_stage=2, precision="bf16", curriculum=curriculum, model=model, **changes)


@pytest.mark.slow
def test_sigterm_saves_and_the_resumed_run_equals_plain_deepspeed_s(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config = write_config(tmp_path / "run.yaml", long_run(tmp_path, checkpoint={"every_tokens": 10_240}))
    process = start(config)
    wait_for_step(tmp_path / "run", 50, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert events(tmp_path / "run")[-1] == "preempted"
    assert leftovers(config) == []
    process = start(config)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    assert "Resumes from" in output

    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29731"]
    subprocess.run(
        [*deepspeed, "--module", "pretrain", "--config", config, "--set", "name=plain"],
        check=True,
        timeout=180,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert numbers(tmp_path / "run") == numbers(tmp_path / "plain")
    assert not list(Path("/dev/shm").glob("deepspeed_*"))


def find_worker(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """A training process of this launch."""
    children = psutil.Process(process.pid).children(recursive=True)
    (worker,) = [child for child in children if child.environ().get("RANK") == str(rank)]
    return worker


@pytest.mark.slow
def test_kill_9_of_a_worker_ends_everything_in_seconds(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config = write_config(tmp_path / "run.yaml", long_run(tmp_path))
    process = start(config)
    wait_for_step(tmp_path / "run", 3, process)
    find_worker(process, 1).kill()
    began = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - began < 30
    assert process.returncode == 137, output
    assert "a process was killed by signal 9 (SIGKILL); the run is not finished" in output
    assert "process 0: another process of this run went away; ending" in output
    assert "Traceback" not in output
    assert leftovers(config) == []


def train(config: str) -> int:
    """Runs in forked ranks: the command itself."""
    from data_pipeline.errors import run_cli
    from pretrain.cli import main

    return run_cli(main, "nystrom train", ["--config", config])


@pytest.mark.slow
def test_after_kill_9_of_a_worker_the_restarted_run_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config = write_config(tmp_path / "run.yaml", long_run(tmp_path, checkpoint={"every_tokens": 10_240}))
    process = start(config, "--max-restarts", "1")
    wait_for_step(tmp_path / "run", 50, process)
    find_worker(process, 1).kill()
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    assert "nystrom launch: attempt 1 of 2 was killed by signal 9 at step" in output
    assert "from the checkpoint of step" in output
    whole = write_config(tmp_path / "whole.yaml", long_run(tmp_path, name="whole"))
    assert values(run_ranks(train, 2, config=whole)) == [0, 0]
    assert weights_hash(tmp_path / "run") == weights_hash(tmp_path / "whole")
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_to_the_demo_alone_lets_training_save(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config = write_config(tmp_path / "run.yaml", long_run(tmp_path))
    words = ["launch", "local", "--nproc", "2", "--config", config]
    process = start_python(
        f"""
import sys
from launch import demo
demo.demo_steps = lambda *_: [demo.Step("Pretrain", {words!r}, lambda: False)]
sys.exit(demo.main([]))
""",
        tmp_path,
    )
    wait_for_step(tmp_path / "run", 3, process)
    children = family(process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    assert survivors(children) == []
    assert leftovers(config) == []
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "preempted"
    assert "the same command resumes" in output


@pytest.mark.slow
def test_a_stopped_worker_is_named_and_killed(tmp_path: Path) -> None:
    rank = 0  # which holds the others' store; tests of the watchdog stop the other one
    write_corpus(tmp_path)
    config = write_config(tmp_path / "run.yaml", long_run(tmp_path, stall_seconds=20))  # importing DeepSpeed takes 10
    process = start(config)
    wait_for_step(tmp_path / "run", 3, process)
    worker = find_worker(process, rank)
    worker.suspend()
    began = time.monotonic()
    output = process.communicate(timeout=120)[0]
    assert time.monotonic() - began < 20 + 60
    assert process.returncode == 77, output
    assert output.count(f"stalled: process {rank} (host ") == 1
    assert f"pid {worker.pid}" in output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stalled"
    assert leftovers(config) == []
    assert not list(Path("/dev/shm").glob("deepspeed_*"))


@pytest.mark.slow
@pytest.mark.parametrize(("nproc", "which"), [(2, "itself"), (1, "itself"), (2, "runner"), (2, "launch")])
def test_kill_9_of_a_launcher_leaves_nobody_behind(tmp_path: Path, nproc: int, which: str) -> None:
    write_corpus(tmp_path)
    config = write_config(tmp_path / "run.yaml", long_run(tmp_path))
    process = start(config, "--nproc", str(nproc))
    wait_for_step(tmp_path / "run", 3, process)
    victim = psutil.Process(process.pid)
    for child in victim.children(recursive=True):
        if which != "itself" and f"deepspeed.launcher.{which}" in child.cmdline():
            victim = child
            break
    victim.kill()
    began = time.monotonic()
    output = process.communicate(timeout=60)[0]
    while leftovers(config) and time.monotonic() - began < 60:
        time.sleep(0.2)
    assert leftovers(config) == []
    assert process.returncode == (-9 if which == "itself" else 75), output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "preempted"


@pytest.mark.slow
def test_a_mistake_found_by_the_workers_is_told_once(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config = write_config(tmp_path / "run.yaml", settings(tmp_path, tmp_path, model={"vocab_size": 7}))
    process = start(config)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert output.count("does not match the shards") == 1
    assert "Traceback" not in output
