"""Runs that are struck at a named place: what the tests of saving and of stopping share."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import Ended
from training_case import numbers, settings, weights_hash

from data_pipeline.errors import run_cli

# Where a run can be struck: the place's name and the function at whose beginning it is.
PLACES = {
    "joining": "pretrain.distributed.world:World.__init__",
    "building": "pretrain.engine.training:TrainingEngine.__init__",
    "loading": "pretrain.checkpoint.store:Checkpoints.load",
    "validating": "pretrain.trainer:validate",
    "sampling": "pretrain.model.generation:generate",
    "writing": "pretrain.engine.state.writing:Writes.save",  # inside DeepSpeed's own save, once for each file
    "hashing": "pretrain.checkpoint.store:Checkpoints._hash",  # between the files and the manifest
    "pointing": "pretrain.checkpoint.commit:write_latest",  # between the manifest and `latest`
    "pruning": "pretrain.checkpoint.commit:shutil.rmtree",  # an old checkpoint has lost its manifest, not its files
    "exporting": "safetensors.torch:save_file",
}


def train(config: str) -> int:
    """Runs in the ranks: the command itself."""
    from pretrain.cli import main

    return run_cli(main, "nystrom train", ["--config", config])


def wrap(place: str, before: Callable[[], Any]) -> None:
    """Have the function behind a place call ``before`` first."""
    import importlib

    module, _, path = place.partition(":")
    *outer, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        before()
        return original(*args, **kwargs)

    setattr(owner, name, struck)


def train_struck(
    config: str, place: str, number: int, ranks: list[int], clock: str, call: int = 1, again: int = 0
) -> int:
    """Runs in the ranks: as :func:`train`, but ``ranks`` get a signal when their first one arrives at a place for the
    ``call``-th time.

    ``again``: how many more of them follow, 10 ms apart. ``clock``: a file that is written at the first.
    """
    me, arrivals = int(os.environ["RANK"]), 0
    pids = [Path(f"{clock}.{rank}") for rank in range(int(os.environ["WORLD_SIZE"]))]
    wrap("pretrain.run:ImmediateExit.__enter__", lambda: pids[me].write_text(str(os.getpid())))

    def send() -> None:
        for rank in reversed(ranks):  # this process last: it may be gone at once
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pids[rank].read_text()), number)

    def strike() -> None:
        nonlocal arrivals
        arrivals += 1
        if arrivals == call and me == ranks[0]:
            while not all(path.exists() and path.read_text() for path in pids):  # before its handlers are there,
                time.sleep(0.01)  # a process would not be struck but killed
            Path(clock).touch()
            for i in range(again):
                threading.Timer(0.01 * (i + 1), send).start()
            send()

    wrap(PLACES[place], strike)
    return train(config)


def run_settings(corpus: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """Checkpoints at steps 2, 4, 6, 8; dropout and validation, in which a lost generator or position would show."""
    base: dict[str, Any] = {
        "model": {"dropout": 0.2},
        "data": {"valid": str(corpus / "valid")},
        "validation": {"every_tokens": 512, "tokens": 1024, "samples": 0},
        "checkpoint": {"every_tokens": 512},
        "zero_stage": 2,
    }
    return settings(corpus, runs, **{**base, **changes})


def exit_codes(ended: list[Ended]) -> list[int]:
    """How the processes exited: what the command returned, or what ended the process before."""
    return [end.code if end.value is None else end.value for end in ended]


def steps(run: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step")) for folder in (run / "checkpoints").glob("step*"))


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def assert_equal_runs(run: Path, whole: Path) -> None:
    assert numbers(run) == numbers(whole)
    assert weights_hash(run) == weights_hash(whole)
