"""The demo's bookkeeping: what is there is not done again, and a failing step ends it with its status."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from commands_case import next_commands
from processes_case import family, start_python, survivors, wait_until

from data_pipeline.errors import UserError
from launch import demo, demo_estimate, program
from launch.demo_estimate import Cost, Speed, duration
from pretrain.config import load_config


def outputs(folder: Path, command: list[str]) -> list[Path]:
    """The files that a command of the demo leaves and the demo looks at."""
    words = dict(pairwise(command))
    if command[0] == "data":
        name = {"stdlib": "classify-test.jsonl", "tokenizer": "tokenizer.json", "prepare": "manifest.json"}[command[1]]
        return [Path(words["--out"]) / name]
    if "--config" in command:
        return [folder / "runs" / Path(words["--config"]).stem / "export" / "export.json"]
    if "eval" in command:
        return [Path(words["--checkpoint"]) / "eval" / f"{suite}.json" for suite in demo.SUITES]
    return [Path(words["--out"])]


SPEED = Speed(import_seconds=4.0, tokens_per_second=5000.0, precision="fp32", threads=1)


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that the demo runs, each replaced by writing its files."""
    commands: list[list[str]] = []

    def run(command: list[str]) -> int:
        commands.append(command)
        for path in outputs(tmp_path, command):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"metrics": {"loss": {"value": 1.5, "std": 0.25}}}))
        return 0

    monkeypatch.setattr(demo, "_run", run)
    monkeypatch.setattr(demo, "measure", lambda processes: SPEED)
    return commands


def test_a_second_time_does_only_what_is_missing(
    tmp_path: Path, ran: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--dir", str(tmp_path)]) == 0
    steps = demo.demo_steps(tmp_path, 2)
    assert ran == [step.command for step in steps]
    out, following = capsys.readouterr()
    clm = str(tmp_path / "runs" / "demo-clm")
    assert next_commands(following) == [["generate", "--checkpoint", clm, "--prompt", "import "]]
    assert out.startswith("This takes about ")
    assert "1.5 ± 0.250" in out
    assert out.splitlines()[-1] == str(tmp_path / "report.html")

    ran.clear()
    assert demo.main(["--dir", str(tmp_path)]) == 0
    assert ran == []
    out = capsys.readouterr().out
    assert out.count("\n      already there") == len(steps)
    assert "This takes" not in out

    (tmp_path / "runs/demo-clm/eval/lm.json").unlink()
    assert demo.main(["--dir", str(tmp_path)]) == 0
    assert [command[0] for command in ran] == ["launch", "report"]
    assert "eval" in ran[0]
    assert "demo-clm" in " ".join(ran[0])


def test_a_failing_step_ends_the_demo_with_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        demo, "_run", lambda command: seen.append(command[1]) or (75 if command[1] == "tokenizer" else 0)
    )
    assert demo.main(["--dir", str(tmp_path)]) == 75
    assert seen == ["stdlib", "tokenizer"]


def test_two_demos_in_one_folder_do_not_run_at_once(tmp_path: Path, ran: list[list[str]]) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another demo is at work"):
            demo.main(["--dir", str(tmp_path)])
        assert ran == []
    assert demo.main(["--dir", str(tmp_path)]) == 0


def test_every_command_of_the_demo_exists_and_its_configurations_are_what_the_steps_say(tmp_path: Path) -> None:
    for step in demo.demo_steps(tmp_path, 2):
        assert step.command[0] in program.COMMANDS
    for path in demo.CONFIGS.glob("demo-*.yaml"):
        config = load_config(path)
        assert (len(config.curriculum), config.precision, config.zero_stage) == (3, "auto", 2)
        assert config.model.objective == path.stem.removeprefix("demo-")


# A step of the demo. One that "saves" notes the signals it gets, takes a while, and ends with status 75.
STAND_IN = """
import os, signal, sys, time
mode, heard = sys.argv[1], []
open("inner", "w").write(os.environ["NYSTROM_INNER"])  # without which it would name next commands
if mode == "exits":
    sys.exit(3)
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mode in ("saves", "finishes"):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: heard.append(signal.Signals(number).name))
open("ready", "w").close()
while not heard:
    time.sleep(0.02)
time.sleep(0.5)
open("heard", "w").write(" ".join(heard))
sys.exit(75 if mode == "saves" else 0)
"""


def start_step(folder: Path, mode: str) -> subprocess.Popen[str]:
    (folder / "stand_in.py").write_text(STAND_IN)
    code = f"""
import sys
from launch import demo
demo.PROGRAM = "stand_in"
step = demo.Step("One", ["{mode}"], lambda: False)
demo.demo_steps = lambda *_: [step, step]
sys.exit(demo.main([]))
"""
    return start_python(code, folder)


@pytest.mark.parametrize("to_the_group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_step_save_once(tmp_path: Path, number: signal.Signals, to_the_group: bool) -> None:
    process = start_step(tmp_path, "saves")
    wait_until((tmp_path / "ready").exists, process)
    for _ in range(2):  # the impatient press Ctrl-C twice
        (os.killpg if to_the_group else os.kill)(process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert (tmp_path / "heard").read_text() == "SIGTERM"
    assert "step 1 ended with status 75; what was done stays, and the same command resumes there" in output


@pytest.mark.parametrize("mode", ["dies", "finishes"])
def test_a_stopped_demo_says_so_whatever_became_of_the_step(tmp_path: Path, mode: str) -> None:
    process = start_step(tmp_path, mode)
    wait_until((tmp_path / "ready").exists, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert "[2/2]" not in output


def test_kill_9_of_the_demo_is_a_request_to_stop(tmp_path: Path) -> None:
    process = start_step(tmp_path, "saves")
    wait_until((tmp_path / "ready").exists, process)
    (child,) = family(process)
    process.kill()
    process.wait(60)
    assert survivors([child]) == []
    assert (tmp_path / "heard").read_text() == "SIGTERM"


@pytest.mark.parametrize(("mode", "status"), [("exits", 3), ("killed", 137)])
def test_a_step_s_own_status_is_the_demo_s(tmp_path: Path, mode: str, status: int) -> None:
    process = start_step(tmp_path, mode)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == status, output


def test_the_expected_time_follows_from_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_estimate, "available_cores", lambda: 2)
    assert SPEED.seconds(Cost(starts=2.0, tokens=100_000), 2) == 2 * 4.0 + 100_000 / 10_000
    assert SPEED.seconds(Cost(starts=0.0, tokens=100_000, seconds=3.0), 4) == 3 + 10  # four processes share two cores
    assert [duration(seconds) for seconds in (3, 44, 119, 200, 401)] == [
        *("10 seconds", "40 seconds", "120 seconds", "3.5 minutes", "6.5 minutes")
    ]


def test_no_process_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--nproc 0: at least one process"):
        demo.main(["--dir", str(tmp_path), "--nproc", "0"])


def test_a_speed_that_cannot_be_measured_keeps_nobody_waiting(
    tmp_path: Path, ran: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_estimate.sys, "executable", "/bin/false")
    monkeypatch.setattr(demo, "measure", demo_estimate.measure)
    assert demo.main(["--dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("How long this takes could not be measured.")
