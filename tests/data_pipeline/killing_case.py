"""Runs of preparing that are killed at chosen writes, and started again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prepare_case import contents

from data_pipeline.tokenization.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
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
