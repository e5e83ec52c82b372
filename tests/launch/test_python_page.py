"""The programs of docs/python.md run, in order, as one notebook would run them."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


@pytest.mark.slow
def test_the_blocks_of_the_page_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 5
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    drawn, torch_drawn = random.getstate(), torch.random.get_rng_state()
    names: dict[str, object] = {}
    modules = set(sys.modules)
    said = []
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
        said.append(capsys.readouterr().out)
    assert said[0].split()[0] == "360"
    assert "runs/first done" in said[1]
    assert "saved checkpoint" in said[1] or "step 32" in said[1]  # the output of the run itself
    assert "torch.Size([" in said[2]
    assert "(2, 32)" in said[2]
    assert len(said[3].splitlines()) > 3
    assert "perplexity" in said[4]
    assert (tmp_path / "report.html").is_file()

    import nystrom_pretrain as nystrom

    run = names["run"]
    assert isinstance(run, nystrom.Run)
    # log 300 = 5.7 is what knowing nothing costs.
    assert run.loss is not None
    assert run.loss < 5.0
    before = run.metrics()
    assert [row["step"] for row in before] == list(range(4, 33, 4))
    # Done already: nothing is trained, computed or written again.
    again = nystrom.train(names["config"], optimizer__lr=5e-3)  # type: ignore[arg-type]
    assert "finished" in capsys.readouterr().out
    assert again.metrics() == before
    with pytest.raises(nystrom.UserError, match=r"optimizer\.lr|changed|differs"):
        nystrom.train(names["config"], batch_tokens=1024)  # type: ignore[arg-type]
    # Nothing of the process is changed.
    assert [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    ] == handlers
    same = random.getstate() == drawn, torch.equal(torch.random.get_rng_state(), torch_drawn)
    assert same == (True, True)  # not the states themselves: pytest takes minutes to show how they differ
    assert "deepspeed" not in set(sys.modules) - modules
    assert not torch.distributed.is_initialized()


INTERRUPTED = """
import signal, nystrom_pretrain as nystrom
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it
nystrom.prepare(["the river runs under the stone bridge"] * 200, "shards", vocab_size=300)
config = {
    "name": "long", "output_dir": "runs", "data": {"train": "shards"}, "batch_tokens": 512, "zero_stage": 0,
    "model": {"objective": "clm", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "segment_length": 8},
    "curriculum": [{"until_tokens": 100_000_000, "seq_len": 64, "micro_batch": 8}],
    "telemetry": {"wandb": "disabled", "log_every_steps": 1},
}
try:
    nystrom.train(config)
except KeyboardInterrupt:
    print("interrupted", nystrom.load("runs/long").subject.loaded.tokens > 0)
"""


@pytest.mark.slow
def test_an_interrupt_saves_and_is_raised(tmp_path: Path) -> None:
    root = str(PAGE.parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as program:
        metrics, deadline = tmp_path / "runs" / "long" / "metrics.jsonl", time.monotonic() + 150
        while not (metrics.is_file() and '"train"' in metrics.read_text()):
            assert program.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        program.send_signal(signal.SIGINT)
        output, _ = program.communicate(timeout=120)
    assert program.returncode == 0, output
    assert output.splitlines()[-1] == "interrupted True"
    assert json.loads((metrics.parent / "status.json").read_text())["state"] == "preempted"
