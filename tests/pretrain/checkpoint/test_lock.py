"""Two starts on one run folder: the second is refused, unless the first is gone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ranks import run_ranks, values
from training_case import settings, write_config

from data_pipeline.errors import UserError
from pretrain.checkpoint import lock
from pretrain.checkpoint.lock import Holder, RunLock

HOLD = """
import sys, pathlib, pretrain.checkpoint.lock
pretrain.checkpoint.lock.RunLock(pathlib.Path(sys.argv[1])).take()
print(flush=True)
sys.stdin.readline()
"""


def leave_lock(run_dir: Path, **changes: object) -> Holder:
    """The lock of some other process."""
    holder = dataclasses.replace(Holder.this_process(), **changes)
    (run_dir / lock.LOCK).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def test_a_living_holder_is_named_and_keeps_it(tmp_path: Path) -> None:
    held = RunLock(tmp_path)
    held.take()
    with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on .*, since 20.*kill {os.getpid()}"):
        RunLock(tmp_path).take()
    held.release()
    again = RunLock(tmp_path)
    again.take()
    held.release()  # not its own any more
    assert (tmp_path / lock.LOCK).exists()
    again.release()
    assert not list(tmp_path.iterdir())


def test_one_whose_process_is_gone_is_taken_over(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path.cwd()
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=f"is in use by process {other.pid} on"):
            RunLock(tmp_path).take()
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie, which signal 0 would find
        mine = RunLock(tmp_path)
        mine.take()
        mine.release()
    leave_lock(tmp_path, began=1.0)  # the number is another process's by now
    mine.take()
    mine.release()


def test_from_another_machine_only_signs_of_life_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its process numbers nor its clock mean anything here."""
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.5)
    path = tmp_path / lock.LOCK
    for clock in (0, time.time() + 9e6):
        leave_lock(tmp_path, machine="elsewhere", host="elsewhere")
        os.utime(path, (clock, clock))
        mine = RunLock(tmp_path)
        mine.take()
        mine.release()
    leave_lock(tmp_path, machine="elsewhere", host="elsewhere", pid=17)
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match="is in use by process 17 on elsewhere"):
            RunLock(tmp_path).take()
    finally:
        stop.set()
        thread.join()
    path.write_text('{"ho')  # in the making, on a file system without hard links; it stays so
    mine.take()
    mine.release()


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", fail)
    held = RunLock(tmp_path)
    held.take()
    with pytest.raises(UserError, match="is in use by"):
        RunLock(tmp_path).take()
    held.release()
    assert not list(tmp_path.iterdir())


def test_it_shows_life_and_comes_back_if_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    held, lost = RunLock(tmp_path), threading.Event()
    monkeypatch.setattr(held, "_exit_without_lock", lost.set)
    held.take()
    path = tmp_path / lock.LOCK
    os.utime(path, (0, 0))
    wait_for(lambda: path.stat().st_mtime > 0)
    path.unlink()
    wait_for(path.exists)
    assert not lost.is_set()
    leave_lock(tmp_path, machine="elsewhere")
    wait_for(lost.is_set)
    held.release()
    assert path.exists()  # the other's


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_of_many_who_find_a_stale_one_exactly_one_takes_it(tmp_path: Path) -> None:
    for attempt in range(20):
        leave_lock(tmp_path, began=1.0)
        locks, taken, barrier = [RunLock(tmp_path) for _ in range(4)], [], threading.Barrier(4)

        def try_it(mine: RunLock, taken: list[RunLock] = taken, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                mine.take()
                taken.append(mine)
            except UserError:
                pass

        threads = [threading.Thread(target=try_it, args=(mine,)) for mine in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1, attempt
        taken[0].release()
    assert not list(tmp_path.iterdir())


def test_a_late_start_never_takes_a_new_lock_away(tmp_path: Path) -> None:
    """It read the stale lock before another start took that over: a moment without a lock would let a third one in."""
    leave_lock(tmp_path, began=1.0)
    stale = (tmp_path / lock.LOCK).read_text()
    held, over, missing = RunLock(tmp_path), threading.Event(), []
    held.take()

    def watch() -> None:
        while not over.is_set():
            if not held.path.exists():
                missing.append(time.monotonic())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(300):
        RunLock(tmp_path)._clear(stale)
    over.set()
    watcher.join()
    assert not missing
    held.release()
    assert not list(tmp_path.iterdir())


def test_a_start_that_was_killed_while_taking_over_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.3)
    leave_lock(tmp_path, began=1.0)
    name = hashlib.sha256((tmp_path / lock.LOCK).read_bytes()).hexdigest()[:16]
    (tmp_path / f"{lock.LOCK}.clear-{name}").touch()
    with pytest.raises(UserError, match=r"remove .*run\.lock\.clear-.* and try again"):
        RunLock(tmp_path).take()
    (tmp_path / f"{lock.LOCK}.clear-{name}").unlink()
    mine = RunLock(tmp_path)
    mine.take()
    mine.release()


def start(config: str, words: list[str]) -> int:
    """Runs in the ranks."""
    from data_pipeline.errors import run_cli
    from pretrain.cli import main

    return run_cli(main, "nystrom train", ["--config", config, *words])


@pytest.mark.parametrize("words", [[], ["--resume", "never"]])
def test_a_second_start_writes_nothing_and_names_the_first(corpus: Path, tmp_path: Path, words: list[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    held = RunLock(run)
    held.take()
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path))
    try:
        ended = run_ranks(start, 2, config=config, words=words, grace=1)
    finally:
        held.release()
    assert ended[0].value == 2
    assert f"is in use by process {os.getpid()} on" in ended[0].output
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]
    if not words:
        assert values(run_ranks(start, 1, config=config, words=[])) == [0]
        assert not (run / lock.LOCK).exists()


def load_while_rotating(run: str, path: str) -> str:
    """Runs in a rank: the run removes the first checkpoint as soon as its weights are to be read."""
    from pretrain.checkpoint import commit, load

    consolidate, victims = load.consolidate, []

    def rotated(folder: Path, state: str = "fp32") -> dict[str, object]:
        if not victims:
            victims.append(folder)
            commit.remove(folder)
        return consolidate(folder, state)

    load.consolidate = rotated  # type: ignore[assignment]
    (Path(run) / "export" / "export.json").unlink(missing_ok=True)
    try:
        return load.load_model(path).path.name
    except UserError as error:
        return str(error)


def test_a_reader_takes_the_next_checkpoint_if_rotation_takes_its_own(
    corpus: Path, tmp_path: Path, whole: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (said,) = values(run_ranks(load_while_rotating, 1, run=str(run), path=str(run)))
    assert said == "step000000006"
    folder = run / "checkpoints" / "step000000006"
    (said,) = values(run_ranks(load_while_rotating, 1, run=str(run), path=str(folder)))
    assert said.startswith(f"checkpoint {folder} has no manifest: its save did not finish, or the run has removed it")
