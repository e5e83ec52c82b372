"""The wheel has every file of the packages, its commands are found without a checkout, and its types by a checker."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from launch import program
from tools.install import CHECKOUT

PACKAGES = ("configs", "data_pipeline", "eval", "launch", "pretrain", "nystrom_pretrain")
NOT_IN_IT = "launch/containers/"
"""Recipes that build an image from a checkout."""
USER = """\
import nystrom_pretrain as nystrom

model = nystrom.load("runs/first")
reveal_type(model)
nystrom.report("runs/first", outt="page")
"""


@pytest.mark.slow
def test_the_wheel_has_what_the_packages_have(tmp_path: Path) -> None:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed here, and without a network pip can't fetch it")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to the packages")
    tracked = [name for name in listed.stdout.split("\0") if (CHECKOUT / name).is_file()]
    source = tmp_path / "source"  # of its own, since a folder build/ in the checkout would go into the wheel
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path]
    done = subprocess.run([*build, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    # In both directions: nothing left out, and nothing of the tests or benchmarks taken along.
    assert held == {name for name in tracked if name.split("/")[0] in PACKAGES and not name.startswith(NOT_IN_IT)}
    assert {f"{package}/py.typed" for package in PACKAGES if package != "configs"} <= held

    code = "import launch.program; print(launch.program.__file__); raise SystemExit(launch.program.main(['--help']))"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = "from nystrom_pretrain import entry; entry()"
    preset = ["-c", script, "config", "--config", "books-clm"]
    for argv in (["-c", code], ["-c", script, "eval", "list"], preset):
        done = subprocess.run(
            [sys.executable, *argv],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        if argv[1] == code:
            assert done.stdout.startswith(str(site))
            assert all(command in done.stdout for command in program.COMMANDS)
        elif argv is preset:
            assert "books-clm" in done.stdout  # found without a folder configs/ here
        else:
            assert "listops-small" in done.stdout  # a suite of configs/suites
    check_types(wheel, tmp_path)


def check_types(wheel: Path, folder: Path) -> None:
    """A checker reads the types of the installed wheel (PEP 561), as in a user's project."""
    if importlib.util.find_spec("mypy") is None:
        return
    venv.create(folder / "venv")
    (packages,) = (folder / "venv").glob("lib/python3*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (folder / "user").mkdir()
    (folder / "user" / "first.py").write_text(USER)
    words = ["--python-executable", folder / "venv" / "bin" / "python", "--cache-dir", folder / "types"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words, "first.py"],
        cwd=folder / "user",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'Revealed type is "eval.model.Model"' in done.stdout
    assert 'Unexpected keyword argument "outt" for "report"' in done.stdout
    assert "Found 1 error in 1 file" in done.stdout
