"""Where the time of a training step goes: tokens a second, waiting for data, and which process is the slow one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Rates(NamedTuple):
    """Of the steps since the last logged one, on this process."""

    tokens_per_second: float  # of all processes
    data_wait: float  # share of the time
    step_seconds: float  # mean of a step


class StepClock:
    """Adds up the steps since the last logged one; validation and saving do not count.

    Every step ends with all processes, for they wait for each other's gradients: by the clock on the wall a slow
    process cannot be told from those that wait for it. So each also adds up what it does before it meets the others:
    waiting for data, and the forward passes (on a GPU between two events, which costs no waiting). That is
    :meth:`own_seconds`. Under ZeRO-3 the layers of a forward pass gather their weights from all processes and so wait
    for the slowest too: there only slow data is told apart.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        self._start()

    def watch(self, on_forward: Callable[[Callable[[], None], Callable[[], None]], None]) -> None:
        """Have the engine call when a forward pass begins and when it has ended."""
        on_forward(self._mark, self._mark)

    def add(self, tokens: int, began: float, waited: float) -> None:
        """Count a step of the global batch that began at this ``time.monotonic()`` and waited so long for data."""
        self._steps += 1
        self._tokens += tokens
        self._seconds += time.monotonic() - began
        self._waited += waited

    def own_seconds(self) -> float:
        """Mean seconds a step that this process spent before it met the others."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if self._on_gpu:
            if pairs:
                pairs[-1][1].synchronize()
            forward = sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        else:
            forward = sum(end - begin for begin, end in pairs)
        return (self._waited + forward) / max(1, self._steps)

    def take(self) -> Rates:
        """The rates of the steps counted, and start anew."""
        seconds = max(self._seconds, 1e-9)
        rates = Rates(self._tokens / seconds, self._waited / seconds, self._seconds / max(1, self._steps))
        self._start()
        return rates

    def _start(self) -> None:
        self._steps, self._tokens, self._seconds, self._waited = 0, 0, 0.0, 0.0
        self._marks.clear()

    def _mark(self) -> None:
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)
