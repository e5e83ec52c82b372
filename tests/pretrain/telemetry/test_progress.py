"""Where a run says it stands: how often, and how long it says it will take."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pretrain.telemetry.progress import Progress, duration


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(seconds: list[float], tokens: int = 0, last_loss: float = 2.5) -> list[str]:
    """What is printed by a run of 8 steps of 100 tokens that stands at ``tokens``, of which each takes so long."""
    said: list[str] = []
    clock = Clock()
    progress = Progress("run", 800, tokens, 8, said.append, clock)
    for number, took in enumerate(seconds, tokens // 100 + 1):
        clock.now += took
        loss = math.nan if number == 1 else last_loss
        if number > 2:
            progress.tokens_per_second = 1234.5
        progress.step(number, 100 * number, loss=loss, lr=1e-3, seq_len=32)
    return said


def test_the_first_step_is_told_and_then_a_line_now_and_then() -> None:
    said = lines([60, 4, 4, 4, 4, 4, 4, 4])
    assert said == [
        "step 1 of 8 (12.5%)  lr 1.0e-03  len 32",
        "step 4 of 8 (50.0%)  loss 2.500  lr 1.0e-03  len 32  1,234 tok/s  about 20 s left",  # 16, and to tens
        "step 7 of 8 (87.5%)  loss 2.500  lr 1.0e-03  len 32  1,234 tok/s  about 4 s left",
        "step 8 of 8 (100.0%)  loss 2.500  lr 1.0e-03  len 32  1,234 tok/s",
    ]


def test_a_resumed_run_counts_from_where_it_stands() -> None:
    assert lines([20, 20, 20], tokens=500)[1:] == [
        "step 7 of 8 (87.5%)  loss 2.500  lr 1.0e-03  len 32  1,234 tok/s  about 20 s left",
        "step 8 of 8 (100.0%)  loss 2.500  lr 1.0e-03  len 32  1,234 tok/s",
    ]


def test_what_is_left_follows_the_pace_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.telemetry import progress as module

    monkeypatch.setattr(module, "RATE_STEPS", 3)
    clock = Clock()
    progress = Progress("run", 10_000, 0, None, lambda line: None, clock)
    assert progress.seconds_left(0) is None
    for number, took in enumerate([50, 50, 50, 1, 1], 1):
        clock.now += took
        progress.step(number, 100 * number, loss=1.0, lr=1.0, seq_len=8)
    assert progress.seconds_left(500) == pytest.approx(95)


def test_a_terminal_has_a_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import os
    import sys

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return terminal

    terminal = os.openpty()[1]  # 0 columns wide, as under `script`

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    said: list[Any] = []
    progress = Progress("run", 800, 0, 8, said.append)
    assert progress.bar is not None
    progress.bar.mininterval = 0
    progress.step(3, 300, loss=2.5, lr=1e-3, seq_len=32)
    progress.close()
    assert "step=3/8, loss=2.500" in screen.getvalue()
    assert said == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (7.4, "7 s"),
        (44, "40 s"),
        (91, "2 min"),
        (3500, "58 min"),
        (19_000, "5.3 h"),
        (27e4, "3.1 days"),
    ],
)
def test_durations_are_as_exact_as_an_estimate(seconds: float, words: str) -> None:
    assert duration(seconds) == words
