"""The program `nystrom`: dispatch, help, and mistakes without tracebacks."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from launch import program


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in program.COMMANDS)


@pytest.mark.parametrize(
    ("word", "meant"), [("trian", "train"), ("classify", "eval classify"), ("preparre", "data prepare"), ("xyz", None)]
)
def test_unknown_command(word: str, meant: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([word]) == 2
    said = capsys.readouterr().err
    assert f"no command '{word}'" in said
    assert ("did you mean" in said) == (meant is not None)
    assert meant is None or f"did you mean `nystrom {meant}`?" in said


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nystrom {program.version()}\n"


@pytest.mark.parametrize("command", list(program.COMMANDS))
def test_each_command_explains_itself_without_torch(command: str) -> None:
    code = (
        "import sys; from launch import program\n"
        "try: program.main([sys.argv[1], '--help'])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules, 'help imported torch'"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"nystrom {command}" in done.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["data", "prepare", "--input", "no/such.jsonl", "--tokenizer", "no", "--out", "o"], "no"),
        (["train", "--config", "no/such.yaml"], "no/such.yaml does not exist"),
        (["launch", "local", "--nproc", "2", "--config", "no/such.yaml"], "no/such.yaml does not exist"),
        (["eval", "lm", "--checkpoint", "no/such/run"], "no/such/run"),
        (["report", "no/such/run", "--out", "r.html"], "no/such/run"),
    ],
)
def test_missing_files_end_with_status_2_and_one_message(argv: list[str], message: str) -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "launch.program", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 60
