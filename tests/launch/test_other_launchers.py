"""Other launchers start a run too, and it comes to the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes_case import REPOSITORY, leftovers
from ranks import run_ranks, values
from training_case import numbers, settings, write_config, write_corpus

from launch.watch import free_port

TORCHRUN = ["-m", "torch.distributed.run"]
SECONDS = 150.0


def train(config: str) -> int:
    """Runs in forked ranks: the command itself."""
    from data_pipeline.errors import run_cli
    from pretrain.cli import main

    return run_cli(main, "nystrom train", ["--config", config])


def commands(way: str) -> list[tuple[list[str], dict[str, str]]]:
    """What is started at the same time, without ``-m pretrain`` and its arguments, each with variables of its own."""
    port = str(free_port())
    if way == "torchrun":
        return [([*TORCHRUN, "--standalone", "--nproc_per_node", "2", "-m"], {})]
    if way == "two nodes":
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "first"]
        return [([*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", *meeting, "-m"], {})] * 2
    if way == "deepspeed":
        runner = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port, "--module"]
        return [(runner, {})]
    address = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [(["-m"], {**address, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]


@pytest.mark.slow
def test_they_come_to_the_same_numbers(tmp_path: Path) -> None:
    """All ways at the same time: most of it is importing, and waiting for each other."""
    write_corpus(tmp_path)
    ways = {"torchrun": "a", "two nodes": "b", "deepspeed": "c", "variables": "d"}
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    started = []
    for way, name in ways.items():
        config = write_config(tmp_path / f"{name}.yaml", settings(tmp_path, tmp_path, zero_stage=2, name=name))
        for words, variables in commands(way):
            process = subprocess.Popen(
                [sys.executable, *words, "pretrain", "--config", config],
                env={**environment, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            started.append((way, process))
    try:
        for way, process in started:
            said = process.communicate(timeout=SECONDS)[0]
            assert process.returncode == 0, f"{way}:\n{said}"
    finally:
        for _, process in started:
            process.kill()
    whole = write_config(tmp_path / "whole.yaml", settings(tmp_path, tmp_path, zero_stage=2, name="whole"))
    assert values(run_ranks(train, 2, config=whole)) == [0, 0]
    expected = numbers(tmp_path / "whole")
    for way, name in ways.items():
        assert numbers(tmp_path / name) == expected, way
    assert leftovers(f"{tmp_path}/") == []
