"""Running a competitor in a process of its own, and watching the memory of all its processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from data_pipeline.errors import UserError
from data_pipeline.processes import child_command


@dataclass(frozen=True)
class Run:
    """One call of one method."""

    seconds: float
    tokens: int
    peak_bytes: int  # proportional set size (shared pages divided), of the process and its children together


def run_method(method: str, corpus: Path, tokenizer: Path, workers: int, work: Path) -> Run:
    """Run ``method`` once; raises :class:`UserError` with the end of its output if it fails."""
    out = Path(tempfile.mkdtemp(dir=work))
    words = [method, str(corpus), str(tokenizer), str(out / "out"), str(workers)]
    (out / "out").mkdir()
    with open(out / "log", "w+") as log:
        child = subprocess.Popen(
            child_command("benchmarks.tokenization.methods", *words),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        peak = 0
        try:
            while child.poll() is None:
                peak = max(peak, _memory(child.pid))
                time.sleep(0.1)
        finally:
            child.kill()  # at Ctrl-C it would write into a folder that is being removed
            child.wait()
        assert child.stdout is not None
        text = child.stdout.read()
        log.seek(0)
        errors = log.read()
    shutil.rmtree(out)
    if child.returncode:
        raise UserError(f"{method} failed with status {child.returncode}: {errors[-800:]}")
    result = json.loads(text.strip().splitlines()[-1])
    return Run(result["seconds"], result["tokens"], peak)


def _memory(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                full = process.memory_full_info()
                total += getattr(full, "pss", full.rss)
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return total
