"""What Tab offers, asked for as a shell does: the line in the environment, the answer on file descriptor 8."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest

from launch import program
from launch.completion import cli, finder, values

BREAKS = " \t\n\"'><=;|&(:"
"""COMP_WORDBREAKS of bash."""
SEPARATOR = "\n"
Tab = Callable[..., list[str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two runs, one with a checkpoint, and other folders."""
    step = tmp_path / "runs" / "first" / "checkpoints" / "step000000012"
    step.mkdir(parents=True)
    (step / "manifest.json").touch()
    (tmp_path / "runs" / "first" / "config.yaml").touch()
    (tmp_path / "runs" / "second" / "checkpoints").mkdir(parents=True)
    (tmp_path / "shards").mkdir()
    (tmp_path / "own.yaml").write_text("curriculum: [{}, {}, {}]\ndata: {train: [{}, {}]}\n")
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tab(monkeypatch: pytest.MonkeyPatch) -> Tab:
    """The words that are offered for a line."""

    def offered(line: str, shell: str = "fish") -> list[str]:
        monkeypatch.setenv("_ARGCOMPLETE", "1")
        monkeypatch.setenv("_ARGCOMPLETE_IFS", SEPARATOR)
        monkeypatch.setenv("_ARGCOMPLETE_SHELL", shell)
        monkeypatch.setenv("_ARGCOMPLETE_SUPPRESS_SPACE", "1")
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        stream, statuses = StringIO(), []
        finder.complete(program.COMMANDS, stream, statuses.append)
        assert statuses == [0]
        return stream.getvalue().split(SEPARATOR) if stream.getvalue() else []

    monkeypatch.setattr("argcomplete.CompletionFinder._init_debug_stream", lambda self: None)  # pytest's descriptor 9
    monkeypatch.setattr("argcomplete.finders._io.debug_stream", StringIO())
    return offered


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nystrom tra", ["train"]),
        ("nystrom nope tra", []),
        ("nystrom help ev", ["eval"]),
        ("nystrom help launch do", ["doctor"]),
        ("nystrom launch st", ["stop", "status"]),
        ("nystrom launch local --res", ["--resume"]),
        ("nystrom train --resume ", ["auto", "extend", "never"]),
        ("nystrom data prep", ["prepare"]),
        ("nystrom data prepare --filter gopher", ["gopher-quality", "gopher-repetition"]),
        ("nystrom data prepare --filter min-ch", ["min-chars="]),
        ("nystrom eval comp", ["compare"]),
        ("nystrom eval lm comp", []),
        ("nystrom eval compare --ig", ["--ignore"]),
        ("nystrom eval lm --set lm.stri", ["lm.stride="]),
        ("nystrom eval --set lm.stri", ["lm.stride="]),
        ("nystrom eval lm --record", ["--record-chars"]),
        ("nystrom eval classify --record", []),
        ("nystrom launch local --nproc 2 -- eval vali", ["validity"]),
        ("nystrom launch slurm --eval vali", ["validity"]),
        ("nystrom launch node --nodes 2 -- --verb", ["--verbose"]),
        ("nystrom launch array --out x -- data prep", ["prepare"]),
        ("nystrom config optimizer.l", ["optimizer.lr"]),
        ("nystrom completion ", ["--help", "bash", "zsh", "fish"]),
        ("nystrom plan --gpu H2", ["H200"]),
    ],
)
def test_words_of_the_program(tab: Tab, line: str, expected: list[str]) -> None:
    assert tab(line) == expected


def test_the_first_word_is_a_command(tab: Tab) -> None:
    assert tab("nystrom ") == ["--help", "--version", *program.COMMANDS, "help"]


def test_presets_and_files_of_a_run(tab: Tab, folder: Path) -> None:
    assert tab("nystrom train --config books") == ["books-16k", "books-clm", "books-mlm"]
    assert tab("nystrom launch local --config o") == ["own.yaml"]
    assert tab("nystrom config --config no") == []
    assert tab("nystrom data prepare --config ") != tab("nystrom train --config ")


def test_keys_and_their_values(tab: Tab, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tab("nystrom train --set optimizer.lr") == ["optimizer.lr="]
    assert tab("nystrom train --set model.objective=") == ["model.objective=mlm", "model.objective=clm"]
    assert tab("nystrom train --set optimizer.lr=") == []
    assert tab("nystrom train --set curriculum.1") == []
    assert "curriculum.2.seq_len=" in tab("nystrom train --config own.yaml --set curriculum.2")
    assert "curriculum.2.seq_len=" in tab("nystrom train --config=own.yaml --set curriculum.2")
    assert tab("nystrom train --config own.yaml --set curriculum.3") == []
    assert tab("nystrom train --config not-there --set optimizer.lr") == ["optimizer.lr="]
    # bash breaks a word at the equals sign and takes only what follows it
    monkeypatch.setenv("_ARGCOMPLETE_COMP_WORDBREAKS", BREAKS)
    assert tab("nystrom train --set model.objective=m", "bash") == ["mlm"]


@pytest.mark.parametrize("command", ["launch status", "launch stop", "report", "eval compare"])
def test_runs(tab: Tab, folder: Path, command: str) -> None:
    assert tab(f"nystrom {command} ru") == ["runs/"]
    assert tab(f"nystrom {command} runs/") == ["runs/first", "runs/second"]
    assert {"runs/first", "runs/second", "shards/"} <= set(tab(f"nystrom {command} "))


def test_checkpoints_and_other_folders(tab: Tab, folder: Path) -> None:
    line = "nystrom generate --checkpoint runs/first"
    assert tab(line) == ["runs/first", "runs/first/"]
    assert tab(f"{line}/") == ["runs/first/checkpoints/"]
    assert tab(f"{line}/checkpoints/") == ["runs/first/checkpoints/step000000012"]
    assert tab("nystrom convert to-hf runs/f") == ["runs/first"]
    assert tab("nystrom data verify s") == ["shards/"]
    assert tab("nystrom data verify none/") == []


def test_suites_of_ones_own(tab: Tab, folder: Path) -> None:
    (folder / "suites").mkdir()
    (folder / "suites" / "zebra.yaml").write_text("task: lm\n")
    assert tab("nystrom eval zeb") == []
    assert tab("nystrom eval --suite-path suites zeb") == ["zebra"]
    assert tab("nystrom eval suites/") == ["suites/zebra.yaml"]


def test_every_option_of_a_run_has_the_completer_that_its_name_asks_for() -> None:
    """`--config` and `--set` are the same everywhere, but in `data` (the hub's) and `eval` (settings)."""
    for command in program.COMMANDS:
        parser, _ = finder.parser_for([command], program.COMMANDS)
        for inner, action in finder.actions(parser):
            found = values.completer(command, inner, action, [command])
            if "--config" in action.option_strings:
                assert (found is values.presets) == (command != "data")
            if "--set" in action.option_strings or "--checkpoint" in action.option_strings:
                assert found is not None


def ask(line: str, code: str, folder: Path) -> str:
    """Run Python code with the variables that a shell sets, descriptor 8 being standard output."""
    env = {**os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": " "}
    done = subprocess.run(
        ["bash", "-c", 'exec "$0" -c "$1" 8>&1 9>/dev/null 1>/dev/null', sys.executable, code],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


HEAVY = ("torch", "deepspeed", "datasets", "transformers", "pandas", "pyarrow")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@needs_bash
@pytest.mark.parametrize("line", ["nystrom eval val", "nystrom launch sl", "nystrom train --set model.obj"])
def test_a_tab_imports_no_torch(line: str, folder: Path) -> None:
    code = (
        "import os, sys\nleave = os._exit\n"
        f"loaded = lambda: repr([n for n in {HEAVY} if n in sys.modules]).encode()\n"
        "os._exit = lambda status: (os.write(8, loaded()), leave(status))\n"
        "from launch import program\nprogram.entry()"
    )
    answer = ask(line, code, folder)
    assert answer.endswith("[]"), answer
    assert answer != "[]"


@needs_bash
def test_without_tab_argcomplete_is_not_imported() -> None:
    code = "import sys\nfrom launch import program\nprogram.main(['help'])\nassert 'argcomplete' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_the_code_to_source(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "nystrom" in out
    assert "_ARGCOMPLETE" in out
    assert ("commandline" in out) == (shell == "fish")


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        program.main(["completion", "zhs"])
    assert caught.value.code == 2
    assert "did you mean 'zsh'?" in capsys.readouterr().err


@needs_bash
def test_bash_itself_completes(folder: Path) -> None:
    """The code is sourced, and the function that it registers is called as bash calls it."""
    binary = folder / "bin" / "nystrom"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} -m launch.program "$@"\n')
    binary.chmod(0o755)
    script = """
        eval "$(nystrom completion bash)"
        complete -p nystrom
        answer() {
            COMP_LINE="$1" COMP_POINT=${#1} COMP_TYPE=9
            _python_argcomplete nystrom
            echo "${COMPREPLY[@]}"
        }
        answer "nystrom launch st"
        answer "nystrom report runs/f"
        answer "nystrom train --set model.objective=c"
    """
    repository = str(Path(program.__file__).parents[1])
    env = {**os.environ, "PATH": f"{binary.parent}:{os.environ['PATH']}", "PYTHONPATH": repository}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env=env, cwd=folder, capture_output=True, text=True, check=True
    )
    registered, places, runs, objective = done.stdout.splitlines()
    assert registered.endswith("-F _python_argcomplete nystrom")
    assert places.split() == ["stop", "status"]
    assert runs.split() == ["runs/first"]
    assert objective.split() == ["clm"]
