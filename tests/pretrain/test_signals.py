"""The request to stop is a flag."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pretrain.distributed.signals import LAUNCHER_PID, StopFlag


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_it_and_says_nothing(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    stop = StopFlag()
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop()
    assert capfd.readouterr() == ("", "")


def test_a_launcher_that_is_gone_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setenv(LAUNCHER_PID, str(launcher.pid))
    stop, alone = StopFlag(launched=True), StopFlag(launched=False)
    assert not stop()
    launcher.communicate(b"\n")
    assert stop()
    assert not alone()


def test_another_parent_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopFlag(launched=True)
    assert not stop()
    another = os.getppid() + 1  # not 1, which in a container is the parent from the start
    monkeypatch.setattr(os, "getppid", lambda: another)
    assert stop()
