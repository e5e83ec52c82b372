"""Looking after the processes of a launch, with stand-ins for DeepSpeed's launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes_case import leftovers

from launch import restarts, watch
from launch.places import local

# The process tree that DeepSpeed makes: runner -> launch -> workers; a worker may have a helper of its own.
STAND_IN = """
import json, os, signal, subprocess, sys, time
role, run, mode = sys.argv[1:4]
def child(role, **env):
    return subprocess.Popen([sys.executable, __file__, role, run, mode], env={**os.environ, **env})
def mark(name):
    open(f"{run}/{name}", "w").close()
def status(code):
    with open(f"{run}/status.tmp", "w") as f:
        json.dump({"launch_id": os.environ["NYSTROM_LAUNCH_ID"], "code": code}, f)
    os.replace(f"{run}/status.tmp", f"{run}/status.json")
if role == "runner":
    if mode == "forgets":
        sys.exit(0)
    code = child("launch").wait()
    sys.exit(0 if code < 0 else code)  # DeepSpeed's own mistake
if role == "launch":
    if mode == "slow to start":
        mark("starting")
        time.sleep(0.7)
    workers = [child("worker", RANK=str(rank)) for rank in range(2)]
    if mode in ("launch dies", "runner dies"):
        while not (os.path.exists(f"{run}/ready0") and os.path.exists(f"{run}/ready1")):
            time.sleep(0.02)
        os.kill(os.getpid() if mode == "launch dies" else os.getppid(), signal.SIGKILL)
    sys.exit(max(worker.wait() % 256 for worker in workers))
rank = os.environ.get("RANK")
if role == "helper":
    signal.signal(signal.SIGTERM, lambda *_: mark("helper-signalled"))
    mark("helper-ready")
    while os.getppid() != 1 and not os.path.exists(f"{run}/saved"):
        time.sleep(0.02)
    sys.exit(0)
if mode == "done":
    status(0)
    sys.exit(0)
if mode in ("crashes", "gets on"):
    if rank == "0":
        attempts = len(open(f"{run}/metrics.jsonl").readlines()) if os.path.exists(f"{run}/metrics.jsonl") else 0
        if mode == "gets on":
            status(0 if attempts == 3 else None)
            with open(f"{run}/metrics.jsonl", "a") as f:
                f.write(json.dumps({"kind": "train", "step": 10 * (attempts + 1)}) + "\\n")
            sys.exit(0 if attempts == 3 else 1)
    sys.exit(1 if mode == "crashes" else 0)
if mode == "loses one":
    if rank == "1":
        mark("ready1")
        time.sleep(0.5)
        sys.exit(0)
    signal.signal(signal.SIGTERM, lambda *_: None)
    time.sleep(3600)
if mode == "killed":
    if rank == "0":
        status(None)
        with open(f"{run}/metrics.jsonl", "w") as f:
            f.write(json.dumps({"kind": "train", "step": 7, "tokens": 70}) + "\\n")
        mark("running")
    while rank == "1" and not os.path.exists(f"{run}/running"):
        time.sleep(0.02)
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(0)
asked = []
signal.signal(signal.SIGTERM, lambda *_: None if mode == "stubborn" else asked.append(1))
if rank == "0":
    child("helper")
    while not os.path.exists(f"{run}/helper-ready"):
        time.sleep(0.02)
mark("ready" + rank)
while not asked:
    time.sleep(0.02)
time.sleep(0.3)
if rank == "0":
    status(75)
    mark("saved")
sys.exit(75)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)

    def launch(mode: str, stop_timeout: float = 20, max_restarts: int = 0, words: Sequence[str] = ()) -> int:
        def command(nproc: int, words: Sequence[str], *more: Any) -> list[str]:
            with open(tmp_path / "words", "a") as record:
                record.write(" ".join(words) + "\n")
            return [sys.executable, str(script), "runner", str(tmp_path), mode]

        monkeypatch.setattr(local, "runner_command", command)
        code = local.launch_local(2, words, tmp_path, stop_timeout=stop_timeout, max_restarts=max_restarts)
        assert leftovers(str(script)) == []
        return code

    return launch


def test_the_run_s_own_word_is_the_exit_status(stand_in: Callable[[str], int]) -> None:
    assert stand_in("done") == 0


def test_a_launcher_s_zero_is_not_believed(stand_in: Callable[[str], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert stand_in("forgets") == 1
    assert "the run did not finish" in capsys.readouterr().err


def test_a_status_of_another_launch_does_not_count(stand_in: Callable[[str], int], tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"launch_id": "earlier", "code": 0}))
    assert stand_in("forgets") == 1


def test_the_launcher_corrects_the_status_of_a_run_that_was_killed(
    stand_in: Callable[[str], int], tmp_path: Path
) -> None:
    code = stand_in("killed")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["code"], status["step"], status["tokens"]) == ("killed", code, 7, 70)
    assert code == 137
    (tmp_path / "status.json").write_text(json.dumps({"launch_id": "earlier", "code": None, "state": "running"}))
    assert watch.exit_status(1, tmp_path, "id") == 1
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"  # another start's


@pytest.mark.parametrize("mode", ["launch dies", "runner dies"])
def test_workers_whose_launcher_died_are_asked_to_save(
    stand_in: Callable[[str], int], tmp_path: Path, mode: str
) -> None:
    assert stand_in(mode) == 75
    assert not (tmp_path / "helper-signalled").exists()


def test_workers_that_do_not_end_are_killed(
    stand_in: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pid = os.fork()
    if pid == 0:  # sends the request to stop, once the workers are up
        while not (tmp_path / "ready1").exists():
            time.sleep(0.02)
        os.kill(os.getppid(), signal.SIGTERM)
        os._exit(0)
    code = stand_in("stubborn", stop_timeout=1.0)
    os.waitpid(pid, 0)
    assert code != 0
    assert "are killed" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_workers_as_sigterm_and_not_their_helpers(
    stand_in: Callable[[str], int], tmp_path: Path, number: signal.Signals
) -> None:
    pid = os.fork()
    if pid == 0:
        while not ((tmp_path / "ready1").exists() and (tmp_path / "ready0").exists()):
            time.sleep(0.02)
        os.kill(os.getppid(), number)
        os._exit(0)
    assert stand_in("waits") == 75
    os.waitpid(pid, 0)
    assert not (tmp_path / "helper-signalled").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handlers are put back


def test_nohup_stays_in_force() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = watch.StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.number is None
        request.restore()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_before_there_are_workers_is_not_lost(stand_in: Callable[..., int], tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        while not (tmp_path / "starting").exists():
            time.sleep(0.02)
        os.kill(os.getppid(), signal.SIGTERM)
        os._exit(0)
    assert stand_in("slow to start", stop_timeout=10) == 75
    os.waitpid(pid, 0)


def test_nobody_outlives_a_lost_process_for_long(
    stand_in: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOSS_SECONDS", 0.6)
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.2)
    assert stand_in("loses one") == 137
    assert "still there 0.6 s after another one ended are killed" in capsys.readouterr().err


def test_a_crash_is_followed_by_another_attempt_while_the_run_gets_on(
    stand_in: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(restarts, "PAUSE_SECONDS", 0.1)
    assert stand_in("gets on", max_restarts=5, words=["--resume", "never"]) == 0
    said = capsys.readouterr().err
    assert "attempt 1 of 6 crashed with exit status 1 at step 10; the next starts in 0.1 s from the beginning" in said
    assert "attempt 3 of 6 crashed with exit status 1 at step 30" in said
    # The old run is moved aside once.
    assert (tmp_path / "words").read_text().split("\n") == ["--resume never", *["--resume auto"] * 3, ""]


def test_the_last_attempt_s_status_stands(
    stand_in: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "PAUSE_SECONDS", 0.1)
    assert stand_in("gets on", max_restarts=1) == 1
    assert "attempt 2 of 2 crashed with exit status 1 at step 20; it was the last" in capsys.readouterr().err


def test_a_run_that_crashes_at_once_is_given_up(
    stand_in: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(restarts, "PAUSE_SECONDS", 0.1)
    assert stand_in("crashes", max_restarts=5) == 1
    assert "attempt 2 of 6 crashed with exit status 1 at the start; 2 attempts in a row" in capsys.readouterr().err
    assert len((tmp_path / "words").read_text().splitlines()) == 2


def test_sigterm_between_two_attempts_ends_it_all(
    stand_in: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say = restarts.say

    def say_and_stop(text: str) -> None:
        say(text)
        if "the next starts" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(restarts, "say", say_and_stop)
    began = time.monotonic()
    assert stand_in("crashes", max_restarts=5) == 75
    assert time.monotonic() - began < 4.9  # less than the pause alone
    assert "asked to stop" in capsys.readouterr().err
    assert len((tmp_path / "words").read_text().splitlines()) == 1


@pytest.mark.parametrize("code", [0, 2, 74, 75, 76])
def test_what_would_end_the_same_way_is_not_started_again(tmp_path: Path, code: int) -> None:
    assert not restarts.Restarts(tmp_path, 5).wanted(code)
    assert not restarts.Restarts(tmp_path, 0).wanted(137)


@pytest.mark.parametrize("code", [1, 77, 137])
def test_getting_no_further_than_before_is_no_progress(
    tmp_path: Path, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def reach(step: int) -> None:
        rows = [{"kind": "train", "step": step}, {"kind": "valid", "step": 99}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr')

    reach(40)
    attempts = restarts.Restarts(tmp_path, 9)
    reach(50)
    assert attempts.wanted(code)
    reach(45)  # not as far as an earlier one
    assert attempts.wanted(code)
    reach(60)
    assert attempts.wanted(code)
    assert attempts.wanted(code)
    assert not attempts.wanted(code)
    assert "no further" in capsys.readouterr().err
    assert restarts.Restarts(tmp_path, 9, anew=True)._best == (0, 0)


def test_a_process_that_the_request_to_stop_killed_was_starting(tmp_path: Path) -> None:
    assert watch.exit_status(256 - signal.SIGTERM, tmp_path, "id", asked=True) == 75
    assert watch.exit_status(256 - signal.SIGTERM, tmp_path, "id") == 143
    assert watch.exit_status(256 - signal.SIGKILL, tmp_path, "id", asked=True) == 137


@pytest.mark.parametrize(("code", "expected"), [(247, 137), (-9, 137), (2, 2), (1, 1), (0, 1)])
def test_exit_status_without_a_word_from_the_run(tmp_path: Path, code: int, expected: int) -> None:
    assert watch.exit_status(code, tmp_path, "id") == expected


def test_visible_gpus_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    assert watch.count_gpus() == 3
    assert local.runner_command(2, [], 1, False)[4:8] == ["", "--include", "localhost:3,5", "--master_port"]
    with pytest.raises(local.UserError, match="names 3 GPU"):
        local.runner_command(4, [], 1, False)
    for value in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert "--num_accelerators" in local.runner_command(2, [], 1, False)


def test_shared_memory_of_this_launch_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(watch, "SHARED_MEMORY", tmp_path)
    user = os.getuid()
    mine, other = (
        tmp_path / f"deepspeed_allreduce_buffer_{user}_127.0.0.1_1234_0",
        tmp_path / "deepspeed_x_1_127.0.0.1_99_0",
    )
    mine.touch()
    other.touch()
    watch.remove_shared_memory(1234)
    assert (mine.exists(), other.exists()) == (False, True)


def test_a_mistake_in_the_configuration_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline.errors import run_cli
    from launch.cli import main

    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("something was started"))
    for argv, words in [
        (["local", "--config", str(tmp_path / "none.yaml")], "does not exist"),
        (["local", "--nproc", "0", "--config", "x"], "--nproc 0"),
        (["local", "--stop-timeout", "0", "--config", "x"], "--stop-timeout"),
        (["local", "--max-restarts", "-1", "--config", "x"], "--max-restarts -1"),
    ]:
        assert run_cli(main, "nystrom launch", argv) == 2
        assert words in capsys.readouterr().err
