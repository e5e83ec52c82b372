"""``nystrom launch status``: what a run does, from its files alone."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from training_case import settings, write_config

from data_pipeline.errors import UserError, run_cli
from launch import status
from launch.cli import main
from launch.status import RunStatus, read_run
from launch.status_text import text
from pretrain.checkpoint import commit
from pretrain.checkpoint.commit import Manifest, TrainState
from pretrain.checkpoint.lock import LOCK, Holder

NOW = 1_800_000_000.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of 8 steps, 256 tokens each, that stands at step 3 with a checkpoint of step 2."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder / "config.yaml", settings(tmp_path, tmp_path))
    rows = [
        {"kind": "train", "step": step, "tokens": 256 * step, "loss": 6.0 - step, "tokens_per_second": 100.0,
         "time": NOW - 10 + 4 * (step - 3), "seconds": 4.0 * step}
        for step in (1, 2, 3)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(folder / "metrics.jsonl", (NOW - 10, NOW - 10))
    checkpoint(folder, 2)
    start = {"time": NOW - 30, "command": ["/x/pretrain/__main__.py", "--local_rank=0", "--config", "a.yaml"]}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n" + json.dumps(start) + "\n")
    return folder


def checkpoint(folder: Path, step: int) -> Path:
    root = folder / "checkpoints"
    made = root / commit.tag_name(step)
    made.mkdir(parents=True)
    (made / "weights").write_bytes(b"12345")
    entry = commit.hash_file(made, "weights")
    commit.commit(root, Manifest(made.name, TrainState(step, 256 * step), {}, {"weights": entry}, created=NOW - 90))
    return made


def write_status(folder: Path, state: str, code: int | None, **more: Any) -> None:
    body = {"state": state, "code": code, "step": 3, "tokens": 768, "launch_id": "first", "time": NOW - 8, **more}
    (folder / "status.json").write_text(json.dumps(body))
    os.utime(folder / "status.json", (NOW - 8, NOW - 8))


def write_lock(folder: Path, age: float = 2.0, **more: Any) -> Holder:
    holder = dataclasses.replace(Holder.this_process(), since=NOW - 25, **more)
    (folder / LOCK).write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(folder / LOCK, (NOW - age, NOW - age))
    return holder


ELSEWHERE = {"machine": "another", "host": "node7", "pid": 4321}


def test_a_run_of_this_machine(run: Path) -> None:
    write_status(run, "running", None)
    write_lock(run)
    found = read_run(run, NOW)
    assert (found.state, found.host, found.pid) == ("running", socket.gethostname(), os.getpid())
    assert (found.step, found.steps, found.tokens, found.total_tokens) == (3, 8, 768, 2048)
    assert (found.loss, found.tokens_per_second) == (3.0, 100.0)
    assert found.seconds_left == pytest.approx((2048 - 768) / 64)  # 512 tokens in the 8 s between the lines
    assert found.checkpoint == {"step": 2, "seconds": 90.0, "folder": str(run / "checkpoints" / "step000000002")}
    assert found.starts == 2
    assert found.silent_seconds == 8.0
    shown = text(found)
    assert f"{run}: running on {socket.gethostname()}, process {os.getpid()}, since " in shown
    assert "step 3 of 8  768 tokens (37.5%)  loss 3.000  100 tok/s  about 20 s left" in shown
    assert "checkpoint: step 2, 90 s old, whole as far as sizes tell" in shown or "checkpoint: step 2, 2 min" in shown
    assert f"next: to save and stop: nystrom launch stop {run}" in shown


def test_the_pace_is_that_of_the_last_start(run: Path) -> None:
    write_status(run, "running", None)
    write_lock(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[0]["time"] -= 86_400  # a day passed before the second start
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(run, NOW).seconds_left == pytest.approx((2048 - 768) / 64)


def test_a_run_of_another_machine_is_judged_by_ages(run: Path) -> None:
    write_status(run, "running", None)
    write_lock(run, **ELSEWHERE)
    found = read_run(run, NOW)
    assert (found.state, found.host) == ("running", "node7")
    assert "process 4321 is on node7 and cannot be looked at from here. Its lock moved 2 s ago" in found.notes[0]
    write_lock(run, age=720, **ELSEWHERE)
    found = read_run(run, NOW)
    assert (found.state, found.tokens_per_second, found.seconds_left) == ("killed", None, None)
    assert "process 4321 on node7 is gone without a word; its lock is stale" in found.what
    assert "(the one with --config a.yaml) resumes from the checkpoint of step 2" in found.next
    write_lock(run, age=-3600, **ELSEWHERE)
    assert "the clocks of this machine and of the file server differ" in " ".join(read_run(run, NOW).notes)


def test_a_living_run_that_writes_nothing_is_silent(run: Path) -> None:
    write_status(run, "running", None)
    write_lock(run, age=-718)
    found = read_run(run, NOW + 720)
    assert found.state == "silent"
    assert "it has written nothing for 12 min" in found.what


def test_one_that_begins_is_starting(run: Path) -> None:
    write_status(run, "preempted", 75, time=NOW - 100)
    write_lock(run)
    found = read_run(run, NOW)
    assert (found.state, found.code) == ("starting", None)
    assert "building the model or reading a checkpoint" in found.what


def test_one_whose_process_is_gone_was_killed(run: Path) -> None:
    write_status(run, "running", None)
    write_lock(run, began=1.0)  # its number is another process's by now
    assert read_run(run, NOW).state == "killed"
    (run / LOCK).unlink()
    found = read_run(run, NOW)
    assert (found.state, "holds no lock" in found.what) == ("killed", True)
    # The process that told the end was not the one that held the lock.
    write_lock(run, began=1.0)
    write_status(run, "stalled", 77)
    assert read_run(run, NOW).state == "stalled"


@pytest.mark.parametrize(
    ("state", "code", "what", "then"),
    [
        ("done", 0, "its weights are exported", "nystrom eval validity lm --checkpoint"),
        ("preempted", 75, "saved and stopped (exit status 75)", "the command that started it"),
        ("not_saved", 74, "could not be written (exit status 74)", "free space; the command"),
        ("bad_steps", 76, "not finite (exit status 76)", "nystrom replay"),
        ("stalled", 77, "a process hung or was lost (exit status 77)", "resumes from the checkpoint of step 2"),
        ("crashed", 1, "ended with an error (exit status 1)", "mend the first error"),
        ("killed", 137, "it was killed (exit status 137)", "resumes from the checkpoint of step 2"),
    ],
)
def test_how_it_ended_and_what_to_do(run: Path, state: str, code: int, what: str, then: str) -> None:
    write_status(run, state, code)
    found = read_run(run, NOW)
    assert (found.state, found.code) == (state, code)
    assert what in found.what
    assert then in found.next
    assert found.seconds_left is None


def write_logs(run: Path, launch: str, age: float, last: str) -> Path:
    folder = run / "logs" / launch
    folder.mkdir(parents=True)
    for rank, line in ((0, "another process of this run went away"), (1, last)):
        (folder / f"rank-{rank}.log").write_text(f"step 1\n{line}\n")
        os.utime(folder / f"rank-{rank}.log", (NOW - age + rank, NOW - age + rank))
    return folder


def test_a_crash_shows_the_first_error(run: Path) -> None:
    write_status(run, "crashed", 1)
    folder = write_logs(run, "first", 8, "Traceback (most recent call last):\nRuntimeError: no paper")
    found = read_run(run, NOW)
    assert found.first_error is not None
    assert (found.first_error["rank"], found.first_error["file"]) == (1, str(folder / "rank-1.log"))
    assert found.first_error["lines"] == ["Traceback (most recent call last):", "RuntimeError: no paper"]
    shown = text(found)
    assert f"first error: rank 1 ({folder / 'rank-1.log'}):\n    Traceback (most" in shown
    assert f"logs: {folder}/rank-N.log (2 files)" in shown


def test_a_launch_that_has_not_come_to_train(run: Path) -> None:
    write_status(run, "preempted", 75)
    write_logs(run, "second", 3, "hello")
    os.utime(run / "logs" / "second" / "rank-0.log", (NOW - 3, NOW - 3))
    (run / "logs" / "second" / "rank-0.log").write_text("hello\n")
    os.utime(run / "logs" / "second" / "rank-0.log", (NOW - 3, NOW - 3))
    assert read_run(run, NOW).state == "starting"
    assert read_run(run, NOW + 900).state == "killed"
    (run / "logs" / "second" / "rank-1.log").write_text("nystrom train: error: no such file\n")
    os.utime(run / "logs" / "second" / "rank-1.log", (NOW - 3, NOW - 3))
    found = read_run(run, NOW)
    assert (found.state, found.launch_id) == ("crashed", "second")
    assert "launch second failed before it began to train" in found.what
    assert found.first_error is not None


def test_a_requeued_job_waits(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_status(run, "preempted", 75, launch_id="slurm-17-0-0")
    asked = []

    def squeue(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(words)
        return subprocess.CompletedProcess(words, 0, "PENDING|Resources\n", "")

    monkeypatch.setattr(status.subprocess, "run", squeue)
    found = read_run(run, NOW)
    assert (found.state, found.slurm_job) == ("waiting", "17")
    assert found.what == "in the queue as Slurm job 17: Resources"
    assert asked[0][:4] == ["squeue", "--noheader", "--jobs", "17"]

    # One that was submitted and never ran has left nothing else.
    (run / "logs").mkdir()
    (run / "logs" / "slurm.job").write_text("18\n")
    assert read_run(run, NOW).slurm_job == "18"

    def missing(words: list[str], **options: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(status.subprocess, "run", missing)
    assert read_run(run, NOW).state == "preempted"


def answer(monkeypatch: pytest.MonkeyPatch, said: str, code: int = 0, error: str = "") -> None:
    """Have squeue answer so."""
    done = subprocess.CompletedProcess([], code, said, error)
    monkeypatch.setattr(status.subprocess, "run", lambda words, **options: done)


def test_a_requeued_job_that_slurm_holds_is_explained(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_status(run, "preempted", 75, launch_id="slurm-17-0-0")
    answer(monkeypatch, "PENDING|BeginTime\n")
    assert read_run(run, NOW).what.endswith(
        "job 17: BeginTime (Slurm waits up to two minutes before it starts a requeued job)"
    )


@pytest.mark.parametrize(
    ("said", "code", "error", "state"),
    [
        ("", 0, "", "killed"),  # it ended some minutes ago
        ("", 1, "slurm_load_jobs error: Invalid job id specified", "killed"),  # Slurm has forgotten it
        ("", 1, "slurm_load_jobs error: Unable to contact slurm controller", "starting"),
        ("RUNNING|None", 0, "", "starting"),
    ],
)
def test_a_job_that_ended_before_the_run_began_is_not_starting(
    run: Path, monkeypatch: pytest.MonkeyPatch, said: str, code: int, error: str, state: str
) -> None:
    """As with a library that cannot be imported on the node: no rank came to write a log."""
    write_status(run, "preempted", 75, launch_id="slurm-17-0-0")
    (run / "logs" / "slurm-18-0-0").mkdir(parents=True)
    os.utime(run / "logs" / "slurm-18-0-0", (NOW - 3, NOW - 3))
    answer(monkeypatch, said, code, error)
    found = read_run(run, NOW)
    assert found.state == state
    if state == "killed":
        assert found.what == f"Slurm job 18 ended before the run began: see {run}/logs/slurm-18.log"
        assert (found.code, found.next[:17]) == (None, "look at its log; ")


def test_the_job_of_the_process_is_named_and_not_a_second_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_status(run, "running", None, launch_id="slurm-17-0-0")
    write_lock(run)
    for job, age in ((17, 100), (18, 3)):
        (run / "logs" / f"slurm-{job}-0-0").mkdir(parents=True)
        os.utime(run / "logs" / f"slurm-{job}-0-0", (NOW - age, NOW - age))
    answer(monkeypatch, "RUNNING|None\n")
    found = read_run(run, NOW)
    assert (found.state, found.slurm_job, found.logs) == ("running", "17", str(run / "logs" / "slurm-17-0-0"))
    assert found.what.endswith(", Slurm job 17")
    assert found.next == "to save and stop: scancel --batch --signal=TERM 17"
    assert found.notes == ["Slurm job 18 is of this run too, and cannot train while job 17 does"]
    answer(monkeypatch, "")  # the second one has ended
    assert read_run(run, NOW).notes == []


def test_a_run_of_slurm_is_resumed_by_its_batch_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_status(run, "preempted", 75, launch_id="slurm-17-0-0")
    answer(monkeypatch, "")
    assert read_run(run, NOW).next.startswith("the command that started it")
    (run / "slurm").mkdir()
    (run / "slurm" / "train.sbatch").touch()
    assert read_run(run, NOW).next == f"sbatch {run}/slurm/train.sbatch resumes from the checkpoint of step 2"


def test_torn_and_missing_files_are_no_traceback(run: Path) -> None:
    whole = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write_status(run, "running", None)
    write_lock(run)
    whole |= {path: path.read_bytes() for path in (run / "status.json", run / LOCK)}
    for path, data in whole.items():
        for part in (
            None,
            b"",
            data[: len(data) // 2],
            b"\xff\x00{[",
            b"[1, 2]",
            b'{"state": [], "step": "x", "time": "y"}',
        ):
            path.write_bytes(data)
            path.unlink() if part is None else path.write_bytes(part)
            found = read_run(run, NOW)
            assert isinstance(json.loads(json.dumps(dataclasses.asdict(found)))["state"], str)
            assert text(found)
        path.write_bytes(data)


def test_a_newer_checkpoint_that_is_torn_is_said(run: Path) -> None:
    write_status(run, "preempted", 75)
    (checkpoint(run, 3) / "weights").write_bytes(b"1")
    found = read_run(run, NOW)
    assert found.checkpoint is not None
    assert found.checkpoint["step"] == 2
    assert found.torn == "step000000003: weights has 1 bytes, the manifest says 5"


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_status(run, "done", 0)
    assert main(["status", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run}: done: its weights are exported\n")
    other = tmp_path / "other"
    other.mkdir()
    write_status(other, "crashed", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    assert main(["status", *map(str, sorted(tmp_path.iterdir()))]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "step", "done", "loss", "tok/s", "left", "checkpoint", "where"]
    assert [row.split()[:3] for row in rows] == [[str(other), "crashed", "3"], [str(run), "done", "3"]]
    assert main(["status", "--json", str(run), str(other)]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["state"], first["checkpoint"]["step"], second["state"]) == ("done", 2, "crashed")
    assert set(first) == {field.name for field in dataclasses.fields(RunStatus)}


@pytest.mark.parametrize("words", [["none"], ["empty"], ["empty", "none"]])
def test_what_is_no_run_is_refused(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run_cli(main, "nystrom launch", ["status", *(str(tmp_path / word) for word in words)]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_now_is_now(run: Path) -> None:
    write_status(run, "done", 0)
    os.utime(run / "status.json")
    found = read_run(run)
    assert found.silent_seconds is not None
    assert found.silent_seconds < 60
    with pytest.raises(UserError):
        main(["status", str(run / "nothing")])
