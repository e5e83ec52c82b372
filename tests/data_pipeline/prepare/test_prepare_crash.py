"""kill -9 at any moment, run again: the bytes of an uninterrupted run, whatever the number of processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from killing_case import ENVIRONMENT, kill_at
from prepare_case import contents

from data_pipeline.tokenization.tokenizer import Tokenizer


def test_killed_at_any_write_it_ends_with_the_same_bytes(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    kill_at([i / 12 for i in range(12)] + [0.96, 0.98, 1.0], inputs, small_tokenizer, tmp_path)


@pytest.mark.slow
def test_killed_at_every_single_write(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    kill_at([i / 1000 for i in range(1001)], inputs, small_tokenizer, tmp_path)


OUTSIDE = textwrap.dedent(
    """
    import sys, time
    import data_pipeline.prepare.plan as p
    from data_pipeline.prepare.run import PrepareOptions, prepare
    from data_pipeline.tokenization.tokenizer import Tokenizer
    if __name__ == "__main__":
        p.unit_bytes = lambda size: 5000
        plan = p.plan_preparation([sys.argv[1]], Tokenizer.load(sys.argv[2]), p.Settings(shard_tokens=500))
        print("started", flush=True)
        prepare(plan, sys.argv[3], PrepareOptions(workers=int(sys.argv[4])), on_text=lambda size: time.sleep(0.3))
    """
)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_from_outside_at_random_moments(
    workers: int, inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    small_tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "outside.py").write_text(OUTSIDE)

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "outside.py", str(inputs), "tokenizer", out, str(workers)]
        process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    killed = 0
    for attempt in range(8):
        process = start("out")
        time.sleep(0.02 + 0.15 * attempt)  # six units of 0.3 s; another process joins after 0.7 s
        process.kill()
        killed += process.wait() != 0
    assert killed > 3
    assert start("out").wait() == 0
    assert start("whole").wait() == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
