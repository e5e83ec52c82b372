"""Trainings in processes of their own that step in turns, so that one machine is shared fairly and timed exactly."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.processes import die_with_parent

JOIN_SECONDS = 60.0


class TurnTaker:
    """In one of the processes: waits for a turn, lets its steps pass, reports their seconds, waits for the next one.

    A step's seconds begin where the step before it ended, or the turn began: its data are part of it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._left = 0
        self._times: list[float] = []
        self._since = 0.0

    def begin(self) -> None:
        """Called once, before the first step: say that this process is there, and wait for its first turn."""
        self.report()
        self._wait()

    def step_done(self) -> None:
        """Called after each step; waits where the turn is over. When no further turn comes, the process ends."""
        now = time.perf_counter()
        self._times.append(now - self._since)
        self._since = now
        self._left -= 1
        if not self._left:
            self.report()
            self._wait()

    def report(self) -> None:
        """Send the seconds of the steps that have not been reported."""
        self._connection.send(self._times)
        self._times = []

    def _wait(self) -> None:
        try:
            self._left = self._connection.recv()
        except EOFError:
            self._left = 0
        if not self._left:
            os._exit(0)
        self._since = time.perf_counter()


Serve = Callable[[dict[str, Any], TurnTaker], None]
_takers: list[TurnTaker] = []
"""Of this process: a run makes its callbacks itself, from names."""


def _serve(serve: Serve, config: dict[str, Any], connection: Connection, log: Path) -> None:
    die_with_parent()
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    taker = TurnTaker(connection)
    serve(config, taker)
    taker.report()


class StepInTurn:
    """The callback of a run that takes turns (``pretrain/callbacks.py``)."""

    def on_start(self, event: object) -> None:
        """Wait for the first turn."""
        _takers[-1].begin()

    def on_step(self, event: object) -> None:
        """A step is done; what follows it, as a validation, falls into the next one's time."""
        _takers[-1].step_done()


def serve_run(raw: dict[str, Any], taker: TurnTaker) -> None:
    """``nystrom train``, with data, telemetry and everything, whose steps are taken in turns."""
    from pretrain.config import parse_config
    from pretrain.distributed.world import Rank, quiet_libraries
    from pretrain.run import train

    quiet_libraries()
    _takers.append(taker)
    train(parse_config({**raw, "callbacks": [f"{__name__}:{StepInTurn.__name__}"]}), Rank())


class Turns:
    """The processes, by name."""

    def __init__(self, context: SpawnContext, folder: Path) -> None:
        self._context, self._folder = context, folder
        self._lines: dict[str, Connection] = {}
        self._processes: list[Any] = []

    def __enter__(self) -> Turns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in self._lines.values():
            line.close()
        for process in self._processes:
            process.join(timeout=JOIN_SECONDS if error is None else 0)
            process.kill()

    def start(self, name: str, serve: Serve, config: dict[str, Any]) -> None:
        """Start a process and wait until it stands before its first step."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(serve, config, theirs, self._folder / f"{name}.log"), daemon=True
        )
        process.start()
        theirs.close()
        self._processes.append(process)
        self._lines[name] = ours
        self._receive(name)

    def turn(self, name: str, steps: int) -> list[float]:
        """Let it take ``steps`` steps; the seconds of each.

        Fewer if the training ended.
        """
        self._lines[name].send(steps)
        return self._receive(name)

    def stop(self, name: str) -> None:
        """End it before its next step."""
        self._lines[name].send(0)

    def _receive(self, name: str) -> list[float]:
        try:
            return list(self._lines[name].recv())
        except EOFError:
            log = (self._folder / f"{name}.log").read_text(errors="replace")
            raise UserError(f"{name} ended early; the end of its log:\n{log[-2000:]}") from None
