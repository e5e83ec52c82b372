"""Callbacks that the tests name in a run's configuration."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

from pretrain.callbacks import METHODS, Callback, Started, Stepped, StopRun


class Recorder:
    """Writes every event to ``folder/rank.jsonl`` and moves every generator; derived from nothing."""

    every_process = True

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / f"{os.environ['RANK']}.jsonl"
        self.write("made", None)

    def write(self, method: str, event: Any) -> None:
        import numpy as np
        import torch

        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        facts = {} if event is None else dataclasses.asdict(event)
        with self.path.open("a") as stream:
            stream.write(json.dumps([method, facts], default=str) + "\n")


for _method in METHODS:
    setattr(Recorder, _method, lambda self, event, name=_method: self.write(name, event))


class First(Callback):
    """On the first process only; notes that it is there."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_start(self, event: Started) -> None:
        (self.folder / f"first-{event.rank}-of-{event.world_size}").touch()


class Faulty(Callback):
    """Fails in the second step, in a way that ``except Exception`` does not see."""

    def on_step(self, event: Stepped) -> None:
        if event.step >= 2:
            raise SystemExit(f"cannot count to {event.step}")

    def on_end(self, event: Any) -> None:
        raise RuntimeError("called although disabled")


class Stopper(Callback):
    """Asks for the end after a step, on one process of several."""

    every_process = True

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.mine = step, os.environ["RANK"] == str(rank)

    def on_step(self, event: Stepped) -> None:
        if self.mine and event.step == self.step:
            raise StopRun("enough")


class Unmakeable(Callback):
    """Cannot be made on the second process."""

    every_process = True

    def __init__(self) -> None:
        if os.environ["RANK"] == "1":
            raise OSError("no such device")

    def on_end(self, event: Any) -> None:
        """Nothing."""


class Misspelt:
    """Has a method that nothing calls."""

    def on_steps(self, event: Any) -> None:
        """Nothing."""


class TwoArguments:
    """Wants more than it gets."""

    def on_step(self, event: Any, loss: float) -> None:
        """Nothing."""


class Async:
    """Would never be awaited."""

    async def on_step(self, event: Any) -> None:
        """Nothing."""


class Idle(Callback):
    """Does nothing at all."""


function = print
