"""The request to stop is a flag."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.distributed.signals import LAUNCHER_PID, STOP_SIGNALS, StopFlag


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in before:
        signal.signal(number, signal.SIG_DFL)  # whatever the tests themselves were told to ignore
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_it_and_says_nothing(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    stop = StopFlag()
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop()
    assert capfd.readouterr() == ("", "")


def test_what_nohup_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopFlag()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_a_shell_has_its_background_jobs_ignore_counts(number: int) -> None:
    signal.signal(number, signal.SIG_IGN)
    stop = StopFlag()
    os.kill(os.getpid(), number)
    assert stop()


def test_the_end_of_deepspeed_s_first_process_sets_it(tmp_path: Path) -> None:
    """SIGTERM ends it, and the second one, the parent of the workers, trains on."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys, time\nfrom pretrain.distributed.signals import StopFlag\nstop = StopFlag(launched=True)\n"
        "print(stop(), flush=True)\n"
        "while not stop():\n    time.sleep(0.02)\nprint('it is gone', flush=True)\n"
    )
    launch = tmp_path / "deepspeed" / "launcher" / "launch.py"
    launch.parent.mkdir(parents=True)
    for folder in (launch.parent, launch.parent.parent):
        (folder / "__init__.py").touch()
    wait = "import subprocess, sys\nsubprocess.run(["
    launch.write_text(f"{wait}sys.executable, {str(worker)!r}])\n")
    runner = tmp_path / "bin" / "deepspeed"
    runner.parent.mkdir()
    runner.write_text(f"{wait}sys.executable, '-u', '-m', 'deepspeed.launcher.launch'])\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    with subprocess.Popen(
        [sys.executable, str(runner)], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "False\n"
        process.terminate()
        assert process.stdout.readline() == "it is gone\n"


def test_a_launcher_that_is_gone_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setenv(LAUNCHER_PID, str(launcher.pid))
    stop, alone = StopFlag(launched=True), StopFlag(launched=False)
    assert not stop()
    launcher.communicate(b"\n")
    assert stop()
    assert not alone()


def test_a_killed_launcher_that_nobody_has_reaped_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent that waits for the end of the workers' output before it reaps would wait without end."""
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setenv(LAUNCHER_PID, str(launcher.pid))
    stop = StopFlag(launched=True)
    assert not stop()
    launcher.kill()
    os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    assert stop()
    launcher.communicate()
    assert StopFlag(launched=True)()  # gone before the flag was made


def test_the_training_loop_and_the_watchdogs_thread_may_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll object shared by two threads raises "concurrent poll() invocation" when they meet."""
    monkeypatch.setenv(LAUNCHER_PID, str(os.getppid()))
    stop = StopFlag(launched=True)
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(lambda: any(stop() for _ in range(5000))) for _ in range(4)]
    assert [one.result() for one in asked] == [False] * 4


def test_where_the_system_has_no_handles_of_processes_it_asks_with_signal_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    test_a_launcher_that_is_gone_sets_it(monkeypatch)


def test_another_parent_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopFlag(launched=True)
    assert not stop()
    another = os.getppid() + 1  # not 1, which in a container is the parent from the start
    monkeypatch.setattr(os, "getppid", lambda: another)
    assert stop()
