"""The demo's bookkeeping: what is there is not done again, and a failing step ends it with its status."""

from __future__ import annotations

import fcntl
import json
from itertools import pairwise
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from launch import demo, program
from pretrain.config import load_config


def outputs(folder: Path, command: list[str]) -> list[Path]:
    """The files that a command of the demo leaves and the demo looks at."""
    words = dict(pairwise(command))
    if command[0] == "data":
        name = {"stdlib": "classify-test.jsonl", "tokenizer": "tokenizer.json", "prepare": "manifest.json"}[command[1]]
        return [Path(words["--out"]) / name]
    if command[0] == "launch":
        return [folder / "runs" / Path(words["--config"]).stem / "export" / "export.json"]
    if command[0] == "eval":
        return [Path(words["--checkpoint"]) / "eval" / f"{suite}.json" for suite in demo.SUITES]
    return [Path(words["--out"])]


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
    return commands


def test_a_second_time_does_only_what_is_missing(
    tmp_path: Path, ran: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--dir", str(tmp_path)]) == 0
    steps = demo.demo_steps(tmp_path, 2)
    assert ran == [step.command for step in steps]
    out = capsys.readouterr().out
    assert "1.5 ± 0.250" in out
    assert out.splitlines()[-1] == str(tmp_path / "report.html")

    ran.clear()
    assert demo.main(["--dir", str(tmp_path)]) == 0
    assert ran == []
    assert capsys.readouterr().out.count("\n      already there") == len(steps)

    (tmp_path / "runs/demo-clm/eval/lm.json").unlink()
    assert demo.main(["--dir", str(tmp_path)]) == 0
    assert [command[0] for command in ran] == ["eval", "report"]
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
