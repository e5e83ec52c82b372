"""kill -9 at any moment, run again: the bytes of an uninterrupted run, whatever the number of processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from prepare_case import contents

from data_pipeline.tokenization.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/data_pipeline'}"}

# Runs in a process of its own: one import, then for each point a forked child that kills itself there with SIGKILL.
KILLER = """
import os, signal, sys, traceback
from pathlib import Path
import pyarrow
import data_pipeline.prepare.plan as p
from data_pipeline.prepare.run import prepare
from data_pipeline.quality.duplicates import Dedup
from data_pipeline.tokenization.tokenizer import Tokenizer

p.unit_bytes = lambda size: 5000
inputs, tokenizer, out, points = sys.argv[1], Tokenizer.load(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
settings = p.Settings(shard_tokens=500, dedup=Dedup.parse("exact"))

def forked(action):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def run(folder, kill_at):
    calls = 0
    def counted(real):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)
        return call
    os.fsync, os.replace, os.rmdir = counted(os.fsync), counted(os.replace), counted(os.rmdir)
    os.unlink = counted(os.unlink)
    prepare(p.plan_preparation([inputs], tokenizer, settings), folder)
    (folder.parent / "calls").write_text(str(calls))

prepare(p.plan_preparation([inputs], tokenizer, settings), out / "warm")  # late imports, for all
assert forked(lambda: run(out / "whole", None)) == 0
total = int((out / "calls").read_text())
for point in sorted({min(total, 1 + int(float(point) * total)) for point in points}):
    folder = out / f"killed-{point}"
    codes = [forked(lambda: run(folder, kill)) for kill in (point, 5, None)]  # killed again soon after the restart
    assert codes[0] == -signal.SIGKILL and codes[1] in (-signal.SIGKILL, 0) and codes[2] == 0, (point, codes)
print(total)
"""


def kill_at(points: list[float], inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    out = tmp_path / "out"
    out.mkdir()
    arguments = [str(inputs), str(tmp_path / "tokenizer"), str(out), *map(str, points)]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole = contents(out / "whole")
    folders = sorted(out.glob("killed-*"))
    assert folders
    for folder in folders:
        assert contents(folder) == whole, folder.name


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
