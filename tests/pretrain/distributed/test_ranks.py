"""The server of forked ranks: what it forks ends with it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import ranks
from processes_case import family, start_python, survivors, wait_until


def sleep() -> None:
    """Runs in a forked rank."""
    Path(f"ready{os.environ['RANK']}").touch()
    time.sleep(600)


def test_forked_ranks_end_with_their_server(tmp_path: Path) -> None:
    request = {"function": "sleep", "kwargs": {}, "world_size": 2, "port": 1, "out": str(tmp_path)}
    paths = [str(Path(file).parent) for file in (ranks.__file__, family.__code__.co_filename)]
    code = f"""
import sys, time
sys.path += {paths!r}
import ranks
[ranks._fork({ {**request, "script": __file__}!r}, rank) for rank in range(2)]
time.sleep(600)
"""
    top = start_python(code, tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("ready*"))) == 2, top)
    children = family(top)
    assert len(children) == 2
    top.kill()
    top.wait(60)
    assert survivors(children) == []
