"""Files of the user's that hide the project's packages are named, in one message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import shadowing
from launch.program import main

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALLED = ["-P", "-c", "import sys; sys.argv[0] = 'nystrom'; from nystrom_pretrain import entry; entry()"]
"""As the console script: neither the working directory nor a script's folder is searched."""


def run(start: list[str], words: list[str], cwd: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, REPOSITORY)))}
    return subprocess.run(
        [sys.executable, *start, *words], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def test_a_file_in_the_working_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "eval.py").write_text("raise ImportError('not meant to be imported')\n")
    done = run(["-m", "launch.program"], ["eval", "list"], tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"nystrom: error: 'eval' is found in {tmp_path}/eval.py, which hides nystrom's own package {REPOSITORY}/eval: "
        "rename eval.py, or run the command from another folder\n"
    )


def test_another_package_launch_is_named(tmp_path: Path) -> None:
    """As of ROS, whose ``launch`` is in PYTHONPATH after its set-up script."""
    other = tmp_path / "ros" / "launch"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    done = run(INSTALLED, ["--help"], tmp_path, tmp_path / "ros")
    assert done.returncode == 2
    assert done.stderr.startswith(f"nystrom: error: 'launch' is found in {other}, which hides nystrom's own package")
    assert "take that folder out of PYTHONPATH" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_only_other_processes_would_find_is_named_where_they_are_started(tmp_path: Path) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "__init__.py").touch()
    done = run(INSTALLED, ["launch", "local", "--config", "no/such.yaml"], tmp_path)
    assert done.returncode == 2
    assert f"'pretrain' is found in {tmp_path}/pretrain" in done.stderr


@pytest.mark.parametrize(
    ("words", "file", "hidden"),
    [
        (["data", "verify"], "eval.py", False),
        (["train"], "eval.py", False),
        (["train"], "pretrain.py", True),
        (["report"], "eval.py", True),
        (["launch", "local", "--", "eval"], "eval.py", True),
        (["launch", "local"], "eval.py", False),
        (["demo"], "eval.py", True),
        (["demo"], "evaluate.py", False),
        (["data"], "launch/__init__.py", True),
        (["demo"], "configs/__init__.py", False),  # which nothing imports
    ],
)
def test_only_what_a_command_needs_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], file: str, hidden: bool
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    message = shadowing.message(words)
    assert (message is not None) == hidden
    assert not hidden or str(tmp_path) in str(message)


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    assert shadowing.message(["data"]) == (
        f"the package 'launch' is missing from {shadowing.HOME}: install nystrom-pretrain again"
    )


def test_libraries_in_pythonpath_that_hide_those_of_the_environment_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after ``module load python`` on a cluster whose module has a numpy of its own."""
    site, alone = tmp_path / "site", tmp_path / "alone"
    (site / "numpy").mkdir(parents=True)
    (site / "yaml.py").touch()
    alone.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(alone), str(site)]))
    note = shadowing.foreign_libraries()
    assert note is not None
    assert note.startswith(f"PYTHONPATH has {site}: its numpy, yaml hides what the environment {sys.prefix} has. ")
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    assert capsys.readouterr().err.startswith(f"nystrom: warning: {note}\n")
    # What the environment does not have itself is meant.
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(shadowing.sysconfig, "get_path", lambda name: str(tmp_path / "empty"))
    assert shadowing.foreign_libraries() is None
    monkeypatch.undo()
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert shadowing.foreign_libraries() is None
