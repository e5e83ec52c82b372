"""The processes of one evaluation: each computes a share of the parts, all of them know the same results and mistakes.

Everything goes through one kind of message, from everybody to everybody: (mistake, value). A process that fails
between two exchanges sends its mistake in the next one, wherever the others are by then, so that a mistake of one is
raised by all and nobody waits for ever. A process that crashes closes its connections, and the others raise at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from data_pipeline.errors import UserError
from pretrain.distributed import watchdog
from pretrain.distributed.signals import EXIT_PREEMPTED, EXIT_STALLED, LAUNCHER_PID, StopFlag
from pretrain.distributed.world import Rank, read_rank

if TYPE_CHECKING:
    from pretrain.distributed.world import World

T = TypeVar("T")
Mistake = tuple[int, str]
"""Where it was made (the lowest is told), and the message."""

STALL_SECONDS = 24 * 3600.0
"""How long one part of a suite may take: a process that computes for longer without a word is taken for one that hangs.
Fine-tuning a large network takes hours, so this is only for machines that freeze; a process that dies is noticed at
once."""
MEETING_SECONDS = 600.0
ORPHAN_POLL_SECONDS = 1.0
ANYWHERE = -1


class SharedError(UserError):
    """A mistake of the user's that every process of the evaluation raises; only the first should say it."""


class Team:
    """This process alone, or with ``world`` one of several."""

    def __init__(self, world: World | None = None) -> None:
        self._world = world
        self.rank = world.rank if world is not None else 0
        self.size = world.world_size if world is not None else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0

    def at(self, place: str) -> None:
        """Say that this process is alive and now at ``place`` (it has been ... for so long)."""
        watchdog.at(place)

    def gather(self, value: T, mistake: Mistake | None = None) -> list[T]:
        """Every process's value, by rank, on every process; raises :class:`SharedError` on all if one has a mistake."""
        if self._world is None:
            if mistake is not None:
                raise UserError(mistake[1])
            return [value]
        try:
            messages = self._world.gather((mistake, value))
        except RuntimeError as error:  # what gloo raises when a connection is closed
            reason = (str(error).splitlines() or [""])[0]
            print(f"process {self.rank}: another process of this evaluation went away; ending ({reason})",
                  file=sys.stderr, flush=True)  # fmt: skip
            raise SystemExit(1) from None
        mistakes = [mistake for mistake, _ in messages if mistake is not None]
        if mistakes:
            raise SharedError(min(mistakes)[1])
        return [value for _, value in messages]

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` returned to the first process, which alone runs it; or its :class:`UserError`, on all."""
        if self._world is None:
            return work()
        value, mistake = None, None
        if self.is_first:
            try:
                value = work()
            except UserError as error:
                mistake = (ANYWHERE, str(error))
        return self.gather(value, mistake)[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def alike(self) -> Iterator[None]:
        """A block whose :class:`UserError` on one process is raised on all of them, here or where they wait for it."""
        try:
            yield
        except SharedError:
            raise
        except UserError as error:
            if self._world is None:
                raise
            self.gather(None, (ANYWHERE, str(error)))
        else:
            self.gather(None)


@contextlib.contextmanager
def join(rank: Rank | None = None) -> Iterator[Team]:
    """Meet the other processes of RANK and WORLD_SIZE in the environment; alone without them.

    Meanwhile only the first process writes to standard output and shows bars, SIGTERM and Ctrl-C end this process at
    once wherever it is (parts that are finished are on disk), and it does not outlive its launcher.
    """
    rank = rank or read_rank()
    if rank.world_size == 1:
        yield Team()
        return
    from pretrain.distributed.rendezvous import ProcessesMissing
    from pretrain.distributed.world import World

    _end_with(StopFlag(launched=LAUNCHER_PID in os.environ))
    # Python's own handler runs between two of its instructions: never, while PyTorch waits for another process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    with quiet_unless(rank.is_first):
        try:
            world = World(rank, STALL_SECONDS, rendezvous_seconds=MEETING_SECONDS)
        except ProcessesMissing as error:
            if str(error):
                print(error, file=sys.stderr, flush=True)
            raise SystemExit(EXIT_STALLED) from None
        try:
            yield Team(world)
        finally:
            world.close()


@contextlib.contextmanager
def quiet_unless(first: bool) -> Iterator[None]:
    """Discard standard output, and progress bars, which go to a terminal only; messages of errors are still seen."""
    if first:
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        open(sys.stderr.fileno(), "w", buffering=1, closefd=False, encoding="utf-8") as errors,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(errors),
    ):
        errors.isatty = lambda: False  # type: ignore[method-assign]
        yield


def _end_with(launcher: StopFlag) -> None:
    """End this process soon after its launcher: nobody else would."""

    def watch() -> None:
        while not launcher.is_orphan():
            time.sleep(ORPHAN_POLL_SECONDS)
        os._exit(EXIT_PREEMPTED)

    threading.Thread(target=watch, name="watchdog of the launcher", daemon=True).start()
