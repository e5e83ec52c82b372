"""A process that hangs ends the run, by name.

A process that dies closes its connections, and the others raise at once. One that hangs (a file system that does not
answer, a stopped process, a machine that lost its network) leaves the others in a collective operation without end. So
each process has two threads beside the main one. The first publishes every few seconds where the main thread is, in the
store of the rendezvous. The second notices when the main thread has made no progress for ``stall_seconds``, finds out
which process the others wait for, and ends its own process with :data:`EXIT_STALLED`.

A process whose threads are silent too is lost: its machine, its network or itself is gone. That is known after
:data:`LOST_SECONDS` in which the main thread stood still. Process 0 holds the store. It alone reads what all say, and
only while it stands still. Each other process reads what process 0 says, and sees whether the store answers. So both
sides of a link that was cut end, each with a message.

The main thread says where it is with :func:`at`, which costs well under a microsecond. Collective operations count as
progress too. They tell the process that hangs from those that wait for it: PyTorch numbers them, and the one that hangs
has entered fewer. NCCL's desynchronisation report in PyTorch rests on the same idea; this one works with any backend.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pretrain.distributed.signals import EXIT_STALLED, ORPHAN_SECONDS, StopFlag
from pretrain.distributed.stall_diagnosis import Diagnosis, ProcessStatus, diagnose, lost_after, lost_peers

if TYPE_CHECKING:
    import torch.distributed as dist

BEATS_PER_STALL = 20
LONGEST_BEAT = 2.0
"""Seconds between two signs of life: a twentieth of ``stall_seconds``, but no more than this.

A lost process is known after :data:`LOST_SECONDS` and three beats; all others have ended four beats later."""
LISTEN_SHARE = 0.25
"""Process 0 begins to listen when it has stood still for this share of the time after which a process is lost."""
REPORT_SECONDS = 10.0
"""How long message, status and stack may take: the file system or the terminal may be what hangs."""
_DIAGNOSIS = "stalled"
_THREAD_PREFIX = "watchdog"


class _Here:
    """Where the main thread is."""

    place, step, moves = "starting", 0, 0


_here = _Here()


def at(place: str, step: int | None = None) -> None:
    """Say that the main thread is alive and now at ``place`` ("reading data"), at optimizer step ``step``.

    ``place`` completes the sentence "process 3 has been ... at step 120"; ``step`` stays what it was if left out.
    """
    _here.place = place
    if step is not None:
        _here.step = step
    _here.moves += 1


def process_key(rank: int) -> str:
    """The store's key for what a process last said about itself; it exists from the process's arrival on."""
    return f"process/{rank}"


def torchrun_holds_store() -> bool:
    """Whether torchrun holds the store, in a process of its own, and not process 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def group_timeout(stall_seconds: float) -> timedelta:
    """The time-out of collective operations: the last resort, for when the watchdog itself cannot run.

    Above ``stall_seconds``, so that the watchdog reports first. Twice that, because waiting for a process that makes
    progress (the first one, exporting) is no stall.
    """
    return timedelta(seconds=2 * stall_seconds + 30)


def status_of(rank: int, record: str | bytes) -> ProcessStatus:
    """What a process says of itself, read from its :meth:`Watchdog.record`."""
    values = json.loads(record)
    values.pop("clock", None)
    return ProcessStatus(rank=rank, **values)


class Watchdog:
    """The two threads of one process. ``store`` is None for a single process."""

    def __init__(
        self, rank: int, world_size: int, stall_seconds: float, stop: StopFlag | None = None, *, local_rank: int = 0
    ) -> None:
        """Make it; nothing runs before :meth:`start`. ``local_rank`` counts the processes of this machine from 0."""
        self.rank, self.world_size, self.local_rank, self.stall_seconds = rank, world_size, local_rank, stall_seconds
        self.lost_seconds = lost_after(stall_seconds)
        self.interval = min(stall_seconds / BEATS_PER_STALL, LONGEST_BEAT)
        self.on_stall: Callable[[], None] = lambda: None
        """Called by the process that reports for all, before the end: to write the status."""
        self._ending = False
        self._orphaned = stop.is_orphan if stop is not None else lambda: False
        self._store: dist.Store | None = None
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._beat, self._age, self._orphan_age = 0, 0.0, 0.0
        self._began = time.monotonic()
        self._seen: dict[int, ProcessStatus] = {}
        self._answers, self._store_silence = 0, 0.0
        self._before, self._answers_before, self._looked = (-1, -1), -1, time.monotonic()
        self._proposed: Diagnosis | None = None
        self._agreed: Diagnosis | None = None

    @property
    def is_ending(self) -> bool:
        """Whether this process is about to be ended for a stall."""
        return self._ending

    def record(self) -> str:
        """What this process says of itself now."""
        values = {"host": socket.gethostname(), "pid": os.getpid(), "collectives": collectives_entered()}
        where = {"beat": self._beat, "age": self._age, "place": _here.place, "step": _here.step}
        return json.dumps({**values, **where, "clock": self._clock()})

    def _clock(self) -> float:
        """Seconds since all processes had met, which is nearly the same moment for each of them."""
        return time.monotonic() - self._began

    def start(self, store: dist.Store | None) -> None:
        """Begin to watch; ``store`` has the record of every process already, and all have just met there."""
        self._began = time.monotonic()
        if store is not None:
            # A connection of its own: the main thread may hang inside a call on the other.
            self._store = store.clone()  # type: ignore[attr-defined]  # missing from torch's stubs
            self._thread(self._report)
        self._thread(self._watch)

    def stop(self) -> None:
        """End both threads; one that hangs in a call to the store is left behind.

        Does not return if this process is about to be ended for a stall: that it just lost a peer is part of it.
        """
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=1.0)
        while self._ending:
            time.sleep(0.1)

    def _thread(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=f"{_THREAD_PREFIX}{target.__name__}", daemon=True)
        thread.start()
        self._threads.append(thread)

    # --- the thread that uses the store; it alone may hang there ------------------------------------------------------

    def _report(self) -> None:
        assert self._store is not None
        # A store that is gone (its process has ended) shows as silence.
        with contextlib.suppress(RuntimeError):
            self._listen(self._store, [0])  # it cannot be asked any more when it hangs
            while not self._closed.wait(self.interval):
                self._speak(self._store)

    def _speak(self, store: dist.Store) -> None:
        """One sign of life. The store's answer is one of process 0's: writing alone is not answered."""
        self._beat += 1
        store.set(process_key(self.rank), self.record())
        if self._proposed is not None and self._agreed is None:
            # All agree with the first one, which also reports.
            self._agreed = Diagnosis.from_json(store.compare_set(_DIAGNOSIS, "", self._proposed.to_json()))
        elif self._agreed is None and store.check([_DIAGNOSIS]):
            self._agreed = Diagnosis.from_json(store.get(_DIAGNOSIS))
        elif self._age >= LISTEN_SHARE * self.lost_seconds:
            self._listen(store, range(self.world_size) if self.rank == 0 else [0])
        self._answers += 1

    def _listen(self, store: dist.Store, ranks: Sequence[int]) -> None:
        """Read what these processes say."""
        for rank, text in zip(ranks, store.multi_get([process_key(rank) for rank in ranks]), strict=True):
            values = json.loads(text)
            before = self._seen.get(rank)
            beat, clock = values.pop("beat"), values.pop("clock")
            # Whether it is silent is told by listening: a clock that stood still in a sleep would accuse it for good.
            silence = 0.0 if before is None or before.beat != beat else before.silence + self.interval
            since = max(0.0, self._clock() - clock) if beat else 0.0  # before its first beat the clock had not begun
            self._seen[rank] = ProcessStatus(rank=rank, beat=beat, silence=silence, since_beat=since, **values)

    # --- the thread that decides --------------------------------------------------------------------------------------

    def _watch(self) -> None:
        self._looked = time.monotonic()
        while not self._closed.wait(self.interval):
            self._look()

    def _look(self) -> None:
        """One look at how long nothing has moved; ends this process if it must."""
        now = time.monotonic()
        # Time in which the whole process was stopped (a suspended job, a laptop asleep) is nobody's hang.
        passed, self._looked = min(now - self._looked, 2 * self.interval), now
        position = (_here.moves, collectives_entered())
        self._age = 0.0 if position != self._before else self._age + passed
        self._before = position
        self._store_silence = 0.0 if self._answers != self._answers_before else self._store_silence + passed
        self._answers_before = self._answers
        self._orphan_age = self._orphan_age + passed if self._orphaned() else 0.0
        if self._orphan_age >= ORPHAN_SECONDS:
            self._end(f"process {self.rank}: its launcher is gone, and it could not save and end by itself", True)
        if self._agreed is not None:
            self._obey(self._agreed)
        elif self._age >= self.lost_seconds:
            self._decide()

    def _decide(self) -> None:
        """Propose a diagnosis, if there is one; without a store to agree through, it holds at once."""
        own = status_of(self.rank, self.record())
        if self._store is None:
            self._obey(diagnose([own], self.rank, self.stall_seconds))
        elif self._store_silence >= self.lost_seconds:
            if self.rank == 0 and not torchrun_holds_store():
                return  # its own; the time-out of the groups remains
            holder = None if torchrun_holds_store() else self._seen.get(0) or ProcessStatus(rank=0)
            # Whoever lives on this machine cannot be asked: it is the first one, or the next where that is process 0.
            first = 1 if holder is not None and holder.host == own.host else 0
            self._obey(Diagnosis.of_silent_store(holder, own, self._store_silence, self.local_rank <= first))
        elif self._proposed is None and self.rank != 0:
            self._proposed = lost_peers([*self._others(), own], self.rank, self.stall_seconds)
        elif self._proposed is None and len(self._seen) == self.world_size:
            self._proposed = diagnose([*self._others(), own], self.rank, self.stall_seconds)

    def _others(self) -> list[ProcessStatus]:
        return [seen for rank, seen in self._seen.items() if rank != self.rank]

    def _obey(self, diagnosis: Diagnosis | None) -> None:
        if diagnosis is None:
            return
        self._ending = True
        if diagnosis.reporter == self.rank:
            self._end(diagnosis.message, True, self.on_stall)
        is_culprit = not diagnosis.culprits or self.rank in diagnosis.culprits
        self._end(None, is_culprit)

    def _end(self, message: str | None, with_stack: bool, before_exit: Callable[[], None] = lambda: None) -> None:
        """Print ``message`` and, with ``with_stack``, where the threads are; then end this process."""

        def report() -> None:
            if message is not None:
                print(message, file=sys.stderr, flush=True)
            if with_stack:
                print(f"process {self.rank} stands here:\n{stacks()}", file=sys.stderr, flush=True)
            before_exit()

        began = time.monotonic()
        reporting = threading.Thread(target=report, name=f"{_THREAD_PREFIX} report", daemon=True)
        reporting.start()
        reporting.join(REPORT_SECONDS)
        # The others must have heard the diagnosis before they see this process go, or they would report its loss.
        time.sleep(max(0.0, 4 * self.interval - (time.monotonic() - began)))
        os._exit(EXIT_STALLED)


def collectives_entered() -> int:
    """How many collective operations this process has entered, over all groups; 0 before there is one."""
    import torch.distributed as dist

    # No public name for it in torch 2.13; reading it costs the main thread nothing.
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    try:
        return sum(group._get_sequence_number_for_group() for group in groups)
    except RuntimeError:  # a backend that does not number them
        return 0


def stacks() -> str:
    """Where this process's threads stand, the main one first; a hanging read of data shows in the prefetching one."""
    threads = sorted(threading.enumerate(), key=lambda thread: thread is not threading.main_thread())
    frames = sys._current_frames()
    return "".join(
        f"thread {thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident]))}"
        for thread in threads
        if thread.ident in frames and not thread.name.startswith(_THREAD_PREFIX)
    )
