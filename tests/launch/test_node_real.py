"""Two nodes of a run, played by two agents on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes_case import REPOSITORY, leftovers, wait_until
from ranks import run_ranks, values
from training_case import metrics, numbers, settings, write_config, write_corpus

from launch.watch import free_port


def start_nodes(config: str, launch_id: str) -> list[subprocess.Popen[str]]:
    port = str(free_port())
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-m", "launch", "node", "--nodes", "2", "--node-rank", "NODE", "--nproc", "1"]
    words += ["--master-addr", "127.0.0.1", "--master-port", port, "--launch-id", launch_id, "--", "--config", config]
    return [
        subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**env, "NODE": str(node)}
        )
        for node in range(2)
    ]


def train(config: str) -> int:
    """Runs in forked ranks: the command itself."""
    from data_pipeline.errors import run_cli
    from pretrain.cli import main

    return run_cli(main, "nystrom train", ["--config", config])


@pytest.mark.slow
def test_two_nodes_stop_together_resume_and_end_as_one_machine_does(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config = write_config(tmp_path / "run.yaml", settings(tmp_path, tmp_path, zero_stage=2, precision="bf16"))
    run = tmp_path / "run"
    nodes = start_nodes(config, "first")
    wait_until(lambda: (run / "metrics.jsonl").exists() and metrics(run), nodes[0])
    nodes[1].send_signal(signal.SIGTERM)  # one is enough: the ranks agree at the next step
    said = [node.communicate(timeout=90)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [75, 75], said
    nodes = start_nodes(config, "second")
    said = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "Resumes from" in said[0]
    assert leftovers(config) == []
    whole = write_config(
        tmp_path / "whole.yaml", settings(tmp_path, tmp_path, zero_stage=2, precision="bf16", name="w")
    )
    assert values(run_ranks(train, 2, config=whole)) == [0, 0]
    assert numbers(run) == numbers(tmp_path / "w")
    # One log for each rank of each start.
    assert sorted(str(path.relative_to(run / "logs")) for path in (run / "logs").glob("*/*")) == [
        f"{start}/rank-{rank}.log" for start in ("first", "second") for rank in range(2)
    ]


@pytest.mark.slow
def test_local_keeps_a_log_for_each_rank_and_moves_only_the_old_run_aside(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config = write_config(tmp_path / "run.yaml", settings(tmp_path, tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old.txt").touch()
    command = [sys.executable, "-m", "launch", "local", "--nproc", "2", "--config", config, "--rank-logs"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([*command, "--resume", "never"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "run" / "logs").glob("*/*")) == ["rank-0.log", "rank-1.log"]
    assert sorted(path.name for path in (tmp_path / "run.old-1").iterdir()) == ["logs", "old.txt"]
    log = next((tmp_path / "run" / "logs").glob("*/rank-0.log")).read_text()
    assert "Done. Weights for use" in log
    assert log == done.stdout


@pytest.mark.slow
def test_the_first_error_is_on_top(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config = write_config(tmp_path / "run.yaml", settings(tmp_path, tmp_path, model={"vocab_size": 7}))
    nodes = start_nodes(config, "wrong")
    said = [node.communicate(timeout=90)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], said
    assert "the first error is that of rank 0" in said[0]
    assert "does not match the shards" in said[0]
