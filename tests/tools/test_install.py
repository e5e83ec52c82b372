"""What `make` does first: the installer's decisions, with a stand-in for pip and a checkout in a path with spaces."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import install

PIP = """\
import os, sys, time
if sys.argv[1:2] == ["--version"]: sys.exit()
print("Collecting torch>=2.11", "  Downloading torch-2.13.0-cp311-cp311-any.whl (190.5 MB)", sep="\\n")
print("WARNING: Location 'file:///x/' is ignored: it is neither a file nor a directory.")
print(os.environ.get("SAYS", ""))
if "SLEEPS" in os.environ: time.sleep(float(os.environ["SLEEPS"]))
with open("pip.txt", "a") as log: print(*sys.argv[1:], file=log)
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with an environment whose pip only writes down what it is asked for."""
    folder = tmp_path / "a check out"
    venv = folder / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    packages = next(venv.glob("lib/python3.*/site-packages"))
    (packages / "pip.py").write_text(PIP)
    shutil.copytree(install.CHECKOUT / "tools", folder / "tools")
    for name in (install.PYPROJECT, install.CONSTRAINTS, "Makefile"):
        shutil.copy(install.CHECKOUT / name, folder / name)
    return folder


def start(checkout: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tools.install", "--venv", ".venv", *words],
        cwd=checkout,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(checkout: Path, *words: str, **env: str) -> tuple[int, str, str]:
    process = start(checkout, *words, **env)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def asked(checkout: Path) -> list[str]:
    """What pip was asked to install, once for each time."""
    path = checkout / "pip.txt"
    return [line.rsplit(" -e ", 1)[1] for line in path.read_text().splitlines()] if path.exists() else []


def test_it_says_what_it_does_and_does_it_once(checkout: Path) -> None:
    status, out, err = run(checkout)
    assert (status, err) == (0, "")
    assert out.startswith("Installing into .venv (Python 3.")
    assert "GB to download" in out
    assert out.splitlines()[-1].startswith("Installed in ")
    assert "WARNING" not in out
    assert run(checkout) == (0, "", "")
    assert asked(checkout) == ["."]

    assert run(checkout, "--extra", "dev")[0] == 0
    assert run(checkout) == (0, "", "")  # who has the tests' packages has the demo's
    (checkout / "pyproject.toml").touch()  # as a checkout of another branch and back does
    assert run(checkout) == (0, "", "")
    assert asked(checkout) == [".", ".[dev]"]

    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    status, out, _ = run(checkout)
    assert out.startswith("Bringing .venv")
    assert asked(checkout) == [".", ".[dev]", ".[dev]"]


def test_a_failure_shows_what_pip_said_and_is_tried_again(checkout: Path) -> None:
    status, out, err = run(checkout, STATUS="1", SAYS="ProxyError('Cannot connect to proxy.')")
    assert status == 1
    assert "Installed" not in out
    assert "Collecting torch" in err
    assert "ProxyError" in err
    assert "WARNING" not in err
    assert "HTTPS_PROXY" in err
    assert "PIP_INDEX_URL" in err
    _, _, err = run(checkout, STATUS="1", SAYS="OSError: [Errno 28] No space left on device")
    assert "A disk is full" in err
    assert "HTTPS_PROXY" not in err
    assert run(checkout)[0] == 0
    assert run(checkout) == (0, "", "")


def test_an_interrupted_run_is_taken_up_again(checkout: Path) -> None:
    process = start(checkout, SLEEPS="30")
    log = checkout / ".venv" / install.LOG
    wait_for(lambda: log.exists() and "Collecting" in log.read_text())
    # What pip leaves of a package when it is killed in the middle of it, and of a whole one.
    packages = next((checkout / ".venv").glob("lib/python3.*/site-packages"))
    for name, files in (("half-1.0", ["METADATA", "RECORD"]), ("whole-1.0", ["METADATA", "RECORD", "INSTALLER"])):
        (packages / f"{name}.dist-info").mkdir()
        for file in files:
            (packages / f"{name}.dist-info" / file).touch()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "resumes here" in err
    assert asked(checkout) == []

    status, out, _ = run(checkout)
    assert status == 0
    assert "half was left half-installed" in out
    assert "whole" not in out
    assert not (packages / "half-1.0.dist-info").exists()
    assert (packages / "whole-1.0.dist-info").exists()


def test_the_second_of_two_waits_and_says_so(checkout: Path) -> None:
    with (checkout / ".venv" / install.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(checkout)
        assert process.stdout is not None
        assert process.stdout.readline() == "Another make is installing into .venv: waiting until it is done.\n"
        assert asked(checkout) == []
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert asked(checkout) == ["."]


def test_the_lock_is_kept_by_a_pip_whose_make_was_killed(checkout: Path) -> None:
    process = start(checkout, SLEEPS="3")
    wait_for(lambda: (checkout / ".venv" / install.LOG).exists())
    process.kill()
    process.communicate(timeout=10)
    status, out, _ = run(checkout)
    assert status == 0
    assert out.startswith("Another make is installing")
    assert asked(checkout) == [".", "."]


def test_another_python_than_the_environments_is_noticed(checkout: Path) -> None:
    other = checkout / "python3.99"
    other.write_text("#!/bin/sh\necho 3.99\n")
    other.chmod(0o755)
    status, _, err = run(checkout, "--python", str(other))
    assert status == 2
    assert "is Python 3.99" in err
    assert "VENV=.venv-3.99" in err
    assert run(checkout, "--python", sys.executable)[0] == 0


def test_a_folder_that_is_somebodys_is_left_alone(checkout: Path) -> None:
    (checkout / "mine").mkdir()
    (checkout / "mine" / "thesis.tex").touch()
    assert run(checkout, "--venv", "mine")[0] == 2
    assert run(checkout, "--venv", "Makefile")[0] == 2
    assert [path.name for path in (checkout / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_finds_its_way(checkout: Path) -> None:
    def make(*words: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV", "MAKEFLAGS")}
        return subprocess.run(["make", *words], cwd=checkout, env=env, capture_output=True, text=True, check=False)

    assert "make demo" in make("help").stdout
    done = make("installed")
    assert done.returncode == 0, done.stderr
    assert "Installed in" in done.stdout
    assert asked(checkout) == ["."]
    assert "no-such-python is not there: say which" in make("installed", "PYTHON=no-such-python").stderr
    (checkout / "my venv").mkdir()
    (checkout / ".venv").rename(checkout / "my venv" / "3")
    assert make("installed", "VENV=my venv/3").returncode == 0
    (checkout / "mine").mkdir()
    (checkout / "mine" / "thesis.tex").touch()
    assert make("clean", "VENV=mine", "DEMO=mine").returncode == 0
    assert (checkout / "mine" / "thesis.tex").exists()
    assert make("clean", "VENV=my venv/3").returncode == 0
    assert not (checkout / "my venv" / "3").exists()


def test_the_line_of_progress() -> None:
    now = [0.0]
    progress = install.Progress(terminal=False, columns=80, clock=lambda: now[0])
    progress.read("Collecting torch>=2\n  Downloading torch-2.13.0-cp311.whl (190.5 MB)\nCollec")
    assert (progress.packages, progress.megabytes, progress.doing) == (1, 190.5, "downloading torch, 190.5 MB")
    progress.read("ting numpy\nInstalling collected packages: a, b, c\n")
    assert (progress.packages, progress.doing) == (2, "unpacking 3 packages")


def wait_for(condition, seconds: float = 20.0) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
