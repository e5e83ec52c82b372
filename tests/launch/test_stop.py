"""``nystrom launch stop``: the run in this folder, and no other."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import UserError, run_cli
from launch.cli import main
from pretrain.checkpoint.lock import LOCK, Holder
from pretrain.finish import STATUS

RUN = """
import json, pathlib, signal, sys
from pretrain.checkpoint.lock import RunLock
folder, code = pathlib.Path(sys.argv[1]), int(sys.argv[2])
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
lock = RunLock(folder)
lock.take()
print(flush=True)
signal.sigwait([signal.SIGTERM])
(folder / "status.json").write_text(json.dumps({"state": "over", "code": code, "step": 12}))
lock.release()
"""
"""Stands in for the first process of a run."""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two runs at work: in ``0`` one that will save, in ``1`` one that will not be able to."""
    started = []
    for name, code in (("0", 75), ("1", 74)):
        (tmp_path / name).mkdir()
        words = [sys.executable, "-c", RUN, str(tmp_path / name), str(code)]
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()))
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_it_ends_the_run_of_the_folder_and_no_other(
    tmp_path: Path, runs: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stop", str(tmp_path / "0")]) == 0
    out = capsys.readouterr().out
    assert f"asked process {runs[0].pid} on " in out
    assert "0 has stopped at step 12 with all it trained saved; the command that started it resumes" in out
    assert runs[0].wait(timeout=10) == 0
    assert runs[1].poll() is None
    assert main(["stop", str(tmp_path / "1")]) == 74  # its own status
    assert "not as asked: status.json says 'over'" in capsys.readouterr().out


def test_what_cannot_be_stopped_from_here_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(run: Path, *words: str) -> str:
        assert run_cli(main, "nystrom launch", ["stop", str(run), *words]) == 2
        return capsys.readouterr().err

    assert "there is no run folder" in error(tmp_path / "none")
    (tmp_path / STATUS).write_text("{}")
    assert "nothing is training in" in error(tmp_path)
    gone = dataclasses.replace(Holder.this_process(), began=1.0)  # its number is another process's by now
    (tmp_path / LOCK).write_text(json.dumps(dataclasses.asdict(gone)))
    assert "nothing is training in" in error(tmp_path)
    elsewhere = dataclasses.replace(gone, machine="m", host="node7", pid=4321)
    (tmp_path / LOCK).write_text(json.dumps(dataclasses.asdict(elsewhere)))
    assert "process 4321 on node7" in (said := error(tmp_path))
    assert "give the command there, or kill -TERM 4321" in said
    assert "scancel" not in said
    (tmp_path / STATUS).write_text('{"launch_id": "slurm-17-0-0"}')
    assert "than this: scancel --batch --signal=TERM 17 has Slurm stop it; or give the command there" in error(tmp_path)


def test_one_that_does_not_end_in_time_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    own = Holder.this_process()
    (tmp_path / LOCK).write_text(json.dumps(dataclasses.asdict(own)))
    signals = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append(pid))
    with pytest.raises(UserError, match=f"process {own.pid} on .* is still there after 0.3 s: look at its log"):
        main(["stop", str(tmp_path), "--timeout", "0.3"])
    assert main(["stop", str(tmp_path), "--timeout", "0"]) == 0  # does not wait
    assert signals == [own.pid, own.pid]
