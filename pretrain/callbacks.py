"""Callbacks: classes of the user's, named in ``callbacks:``, that are called with what happened while a run trains.

Training does not depend on them. They see plain values and no engine, their draws of random numbers do not move those
of training, and what they raise disables them and nothing else. They must call no collective operation: the other
processes may not be there to answer it. This module imports no torch.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from data_pipeline.errors import UserError
from pretrain.config import CallbackConfig, RunConfig
from pretrain.distributed import watchdog
from pretrain.telemetry.lines import print_line

if TYPE_CHECKING:
    from pretrain.distributed.world import World


@dataclass(frozen=True)
class Started:
    """A start of the run, before its first step."""

    config: RunConfig  # with nothing left open
    run_dir: Path
    step: int  # where it stands; 0 at the first start
    tokens: int
    total_tokens: int
    rank: int  # of this process
    world_size: int


@dataclass(frozen=True)
class Stepped:
    """An optimizer step that was taken, or skipped."""

    step: int
    tokens: int  # of the run, this step's included
    stage: int
    seq_len: int
    lr: float
    grad_norm: float  # before clipping; inf if the step was skipped
    applied: bool
    loss: float | None  # mean over the targets of all processes; None in steps that are not logged or have none
    seconds: float  # of training, over all starts


@dataclass(frozen=True)
class Validated:
    """A measurement of the held-out loss."""

    step: int
    tokens: int
    stage: int
    seq_len: int
    loss: float
    perplexity: float
    accuracy: float | None  # of masked models
    longest_loss: float | None  # at the curriculum's longest length, if the stage is shorter
    texts: tuple[str, ...]  # that a causal model wrote; on the first process, at ZeRO-3 on all
    seconds: float  # that it took
    document_loss: float | None = None  # of a run with one, its weight included


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole and on the disk."""

    step: int
    tokens: int
    folder: Path
    seconds: float  # that it took


@dataclass(frozen=True)
class Ended:
    """The end of this start. A start that crashes has none."""

    status: str  # as in status.json: done, preempted, not_saved, bad_steps
    code: int  # the exit status
    step: int
    tokens: int
    run_dir: Path


class StopRun(Exception):
    """Raised by a callback to end the run: all processes save and end at the next step's edge, as after SIGTERM.

    The exit status is 75 and the same command resumes.
    """


class Callback:
    """What a callback may be derived from; it need not, and defines only those methods that it wants."""

    every_process: ClassVar[bool] = False
    """Whether it is called on every process, each with an object of its own; else on the first one only."""

    def on_start(self, event: Started) -> None:
        """Called once, before the first step."""

    def on_step(self, event: Stepped) -> None:
        """Called after each step."""

    def on_validation(self, event: Validated) -> None:
        """Called after each measurement of the held-out loss."""

    def on_checkpoint(self, event: Saved) -> None:
        """Called after each checkpoint."""

    def on_end(self, event: Ended) -> None:
        """Called once, when the run is done or has stopped."""


METHODS = ("on_start", "on_step", "on_validation", "on_checkpoint", "on_end")


def find_class(config: CallbackConfig) -> type:
    """The class that a configuration names. Raises :class:`UserError` if there is none or it cannot be called."""
    module_name, _, name = config.call.partition(":")
    where = f"callbacks: {config.call}"
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing of ours is shadowed
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{where}: the module {module_name} cannot be imported from here ({_last_line(error)}); it must be "
            "installed, in PYTHONPATH or below the working directory"
        ) from None
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{where}: {module_name} has no class {name}{_suggest(name, vars(module))}")
    if not isinstance(found, type):
        raise UserError(f"{where}: {name} is a {type(found).__name__} and not a class")
    _check_methods(found, where)
    try:
        inspect.signature(found).bind(**config.settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {name} does not take these settings: {error}") from None
    return found


def _check_methods(found: type, where: str) -> None:
    given = [name for name in dir(found) if name.startswith("on_") and callable(getattr(found, name))]
    for name in given:
        if name not in METHODS:
            raise UserError(f"{where}: nothing calls {name}{_suggest(name, METHODS)}")
        method = getattr(found, name)
        itself = () if isinstance(inspect.getattr_static(found, name), (staticmethod, classmethod)) else (None,)
        try:
            inspect.signature(method).bind(*itself, None)
        except TypeError as error:
            raise UserError(f"{where}: {name} must take one argument, the event: {error}") from None
        if inspect.iscoroutinefunction(method):
            raise UserError(f"{where}: {name} is async, and nothing would await it")
    if not _defined(found):
        raise UserError(f"{where}: it has none of {', '.join(METHODS)}")


def _defined(found: type) -> list[str]:
    """The methods that are its own, not the empty ones of :class:`Callback`."""
    return [name for name in METHODS if getattr(found, name, None) not in (None, getattr(Callback, name))]


class Callbacks:
    """The callbacks of this process.

    Nothing that they do can keep this process from the collectives that the others wait in: not what they raise, and
    not where they leave the random generators. One that hangs is named by the watchdog.
    """

    def __init__(self, config: RunConfig, world: World, say: Callable[[str], None] = print_line) -> None:
        """Make them; a collective of all processes if there are any. Raises :class:`UserError` on all of them alike.

        ``say`` prints a line of the first process; the others print by themselves.
        """
        self.stop_asked = False
        self.say = say
        self._first = world.is_first
        self._called: dict[str, list[tuple[str, Any]]] = {name: [] for name in METHODS}
        if not config.callbacks:
            return
        from pretrain.distributed import randomness

        problem = ""
        try:
            with randomness.preserved():
                for entry in config.callbacks:
                    self._add(entry, world)
        except Exception as error:
            problem = f"process {world.rank}: {_last_line(error)}" if not isinstance(error, UserError) else str(error)
        problems = [line for line in world.gather(problem) if line]
        if problems:
            raise UserError(f"the callbacks cannot be made: {problems[0]}")

    def _add(self, entry: CallbackConfig, world: World) -> None:
        found = find_class(entry)
        if not (world.is_first or getattr(found, "every_process", False)):
            return
        made = found(**entry.settings)
        for name in _defined(found):
            self._called[name].append((entry.call, made))

    def call(self, method: str, event: Callable[[], Any]) -> None:
        """Call ``method`` of each callback that has it, with what ``event`` makes, which is made only then."""
        if not self._called[method]:
            return
        from pretrain.distributed import randomness

        value = event()
        for name, callback in list(self._called[method]):
            watchdog.at(f"calling {name}.{method}")
            try:
                with randomness.preserved():
                    getattr(callback, method)(value)
            except StopRun as error:
                self.stop_asked = True
                self._tell(f"{name}.{method} ends the run" + (f": {error}" if str(error) else ""))
            except BaseException as error:  # SystemExit too: one process must not leave the others
                self._disable(callback)
                self._tell(f"{name}.{method} failed and is not called again: {_last_line(error)}{_line_of(error)}")

    def _disable(self, callback: Any) -> None:
        for method, called in self._called.items():
            self._called[method] = [(name, other) for name, other in called if other is not callback]

    def _tell(self, text: str) -> None:
        (self.say if self._first else print_line)(text)


def check_callbacks(entries: Sequence[CallbackConfig]) -> None:
    """Raise :class:`UserError` for a class that is not there or cannot be called."""
    for entry in entries:
        find_class(entry)


def _last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def _line_of(error: BaseException) -> str:
    """Where in the callback it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" (line {frames[-1].lineno} of {frames[-1].filename})" if frames else ""


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, [k for k in known if not k.startswith("_")], n=1)
    return f": did you mean {close[0]}?" if close else ""
