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


class Gate:
    """Called once before every step; lets the steps of a turn pass, reports their times, waits for the next turn."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._left = 0
        self._times: list[float] = []
        self._last = time.perf_counter()

    def __call__(self) -> None:
        """Return when the step may be taken; when no further turn comes, end the process."""
        now = time.perf_counter()
        if self._left:
            self._times.append(now - self._last)
            self._left -= 1
        if not self._left:
            self.report()
            self._left = self._connection.recv()
            if not self._left:
                os._exit(0)
            now = time.perf_counter()
        self._last = now

    def report(self) -> None:
        """Send the times of the turn's steps."""
        self._connection.send(self._times)
        self._times = []


Serve = Callable[[dict[str, Any], Gate], None]


def _serve(serve: Serve, config: dict[str, Any], connection: Connection, log: Path) -> None:
    die_with_parent()
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    gate = Gate(connection)
    serve(config, gate)
    gate.report()


def serve_run(raw: dict[str, Any], gate: Gate) -> None:
    """``nystrom train``, with data, telemetry and everything, that waits at the gate before each step."""
    from pretrain.config import parse_config
    from pretrain.distributed.world import Rank, quiet_libraries
    from pretrain.run import train
    from pretrain.trainer import Trainer

    quiet_libraries()
    step = Trainer._train_step

    def step_in_turn(self: Trainer, *args: Any) -> None:
        gate()
        step(self, *args)

    setattr(Trainer, "_train_step", step_in_turn)  # noqa: B010
    train(parse_config(raw), Rank())


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

        Fewer if the training ended: its last step has no time, for what follows is not another step but its end.
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
