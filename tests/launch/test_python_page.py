"""The programs of docs/python.md run, in order, as one notebook would run them."""

from __future__ import annotations

import random
import re
import signal
import sys
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
