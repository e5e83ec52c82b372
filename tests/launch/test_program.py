"""The program `nystrom`: dispatch, help, and mistakes without tracebacks."""

from __future__ import annotations

import argparse
import importlib
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


SLOW_TO_IMPORT = (
    *("torch", "deepspeed", "numpy", "datasets", "pyarrow", "tokenizers", "transformers", "pandas", "matplotlib"),
    *("huggingface_hub", "argcomplete", "pretrain.config.run"),
)


@pytest.mark.parametrize("command", [*program.COMMANDS, "eval lm", "eval compare"])
def test_each_command_explains_itself_without_what_is_slow_to_import(command: str) -> None:
    code = (
        "import sys; from launch import program\n"
        "try: program.main([*sys.argv[1].split(), '--help'])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        f"print([name for name in {SLOW_TO_IMPORT} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"nystrom {command.partition(' ')[0]}" in done.stdout
    loaded = done.stdout.splitlines()[-1]
    assert loaded == ("['pretrain.config.run']" if command == "config" else "[]")  # whose keys it is about


def subcommands(command: str) -> list[str]:
    """The command itself, and each of its subcommands."""
    module = importlib.import_module(program.COMMANDS[command][0])
    inner = [a.choices for a in module.build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    more = ["list", "compare", "lm"] if command == "eval" else []
    return [command, *(f"{command} {name}" for name in [*(inner[0] if inner else ()), *more])]


@pytest.mark.parametrize("command", list(program.COMMANDS))
@pytest.mark.parametrize("columns", [80, 100])
def test_every_help_fits_the_terminal(
    command: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in subcommands(command):
        with pytest.raises(SystemExit) as caught:
            program.main([*words.split(), "--help"])
        assert caught.value.code in (0, None)
        out = capsys.readouterr().out
        assert [line for line in out.splitlines() if len(line) > columns] == []
        assert "\nexamples:\n  " in out, words
        assert "\nexit status:\n  0 " in out, words
        assert "\x1b" not in out


@pytest.mark.parametrize("columns", [80, 100])
def test_the_program_s_own_help_fits_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert program.main([]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= columns


@pytest.mark.parametrize("words", ["data prepare", "eval compare", "launch doctor", "train"])
def test_help_before_a_command_is_help_behind_it(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        program.main(["help", *words.split()])
    assert caught.value.code in (0, None)
    before = capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main([*words.split(), "--help"])
    assert before == capsys.readouterr().out
    assert before.startswith(f"usage: nystrom {words} ")


def test_help_of_nothing_and_of_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["help"]) == 0
    assert capsys.readouterr().out == program.usage() + "\n"
    assert program.main(["help", "trian"]) == 2
    assert "did you mean `nystrom train`?" in capsys.readouterr().err


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
