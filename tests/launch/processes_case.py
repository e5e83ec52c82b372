"""What the tests of launching, and of ending what was launched, share."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def leftovers(word: str) -> list[str]:
    """Command lines of living processes that mention ``word``."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if word in line and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(line)
        except psutil.Error:
            continue
    return found


def start_python(code: str, folder: Path, **env: str) -> subprocess.Popen[str]:
    """Run ``code`` in ``folder``, whose modules it can import, in a process group of its own.

    It hears SIGINT and SIGHUP also where these tests run in the background of a script, or under ``nohup``.
    """
    heard = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); s.signal(s.SIGHUP, s.SIG_DFL)\n"
    path = os.pathsep.join([str(folder), str(REPOSITORY)])
    return subprocess.Popen(
        [sys.executable, "-c", heard + code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 90) -> None:
    """Wait for ``condition``, of something that ``process`` does; fails with what it said if that does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it did not come to that (status {process.returncode}):\n{process.communicate()[0]}")
        time.sleep(0.02)


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """What it started, and what they started."""
    return psutil.Process(process.pid).children(recursive=True)


def survivors(processes: list[psutil.Process], seconds: float = 30) -> list[str]:
    """Those that live after up to ``seconds``, which are killed then."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if _lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    found = [" ".join(process.cmdline()) for process in left]
    for process in left:
        process.send_signal(signal.SIGKILL)
    for process in processes:  # this process inherits them once a test in it has launched something
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, 0)
    return found


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
