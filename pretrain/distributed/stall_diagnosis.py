"""Which process holds up a run that makes no progress, from what each last reported. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

LOST_SECONDS = 30.0
"""A process that has not been heard of for so long is lost, where the run stands still; see :func:`lost_after`."""
LISTENED_SHARE = 0.5
"""For this share of that time somebody must have listened to it. Clocks tell the rest; a sleep makes them wrong."""
HOSTS_NAMED = 4
"""A message about more hosts than this names only the first ones."""


@dataclass(frozen=True)
class ProcessStatus:
    """What one process last reported of itself."""

    rank: int
    beat: int = 0
    silence: float = 0.0  # seconds for which somebody has listened and heard no new sign of life
    since_beat: float = 0.0  # seconds since its last sign of life, by clocks that began when all had met
    age: float = 0.0  # seconds that its main thread had stood still by then
    place: str = "starting"
    step: int = 0
    collectives: int = 0  # entered so far
    host: str = "unknown"
    pid: int = 0

    @property
    def name(self) -> str:
        """The process, so that a person finds it."""
        return f"process {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def unheard(self) -> float:
        """Seconds for which nothing was heard of it."""
        return max(self.silence, self.since_beat)


@dataclass(frozen=True)
class Diagnosis:
    """Which processes hold up the others (none: all are in the same operation), and which one reports it."""

    reporter: int
    culprits: tuple[int, ...]
    message: str

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes | str) -> Diagnosis:
        """From the store."""
        body = json.loads(text)
        return cls(body["reporter"], tuple(body["culprits"]), body["message"])

    @classmethod
    def of_silent_store(cls, holder: ProcessStatus | None, own: ProcessStatus, silence: float, says: bool) -> Diagnosis:
        """The diagnosis of a process that cannot ask any more: the store has not answered it for ``silence`` seconds.

        ``holder`` is process 0, which holds the store; None where torchrun does. Each machine is on its own then:
        ``says`` is whether this process is the one that reports for its machine.
        """
        if holder is None:
            what = f"torchrun's store has not answered for {silence:.0f} s: its machine, its network or torchrun itself"
        else:
            what = f"{holder.name} {_unheard(silence)}: its machine, its network or the process itself"
        message = f"stalled: {what} is gone; {_wait([own.rank])} for it ({own.place} at step {own.step})"
        return cls(own.rank if says else NOBODY, (0,), message)


NOBODY = -1
"""The reporter of a diagnosis that another process of the machine reports."""


def lost_after(stall_seconds: float) -> float:
    """Seconds without a sign of life after which a process counts as lost."""
    return min(LOST_SECONDS, stall_seconds)


def lost_peers(seen: Sequence[ProcessStatus], reporter: int, stall_seconds: float) -> Diagnosis | None:
    """The processes that have not been heard of for :func:`lost_after`; None if there is none.

    Called by a process that has made no progress for so long itself. One that gives signs of life is never lost,
    however long its main thread takes.
    """
    limit = lost_after(stall_seconds)
    lost = [s for s in seen if s.silence >= LISTENED_SHARE * limit and s.unheard >= limit]
    if not lost:
        return None
    hosts: dict[str, list[ProcessStatus]] = {}
    for s in sorted(lost, key=lambda s: s.rank):
        hosts.setdefault(s.host, []).append(s)
    if len(hosts) <= HOSTS_NAMED:
        parts = [_lost_host(processes) for processes in hosts.values()]
    else:
        named = ", ".join(list(hosts)[:HOSTS_NAMED])
        least = min(s.unheard for s in lost)
        parts = [
            f"{format_processes([s.rank for s in lost])} ({len(hosts)} hosts: {named}, ...) {_unheard(least, True)}: "
            "their machines, the network to them or the processes themselves are gone"
        ]
    ranks = tuple(sorted(s.rank for s in lost))
    waiting = sorted({s.rank for s in seen} - set(ranks))
    wait = f"; {_wait(waiting)} for {'it' if len(ranks) == 1 else 'them'}" if waiting else ""
    return Diagnosis(reporter, ranks, f"stalled: {'; '.join(parts)}{wait}")


def diagnose(seen: Sequence[ProcessStatus], reporter: int, stall_seconds: float) -> Diagnosis | None:
    """Which processes the others wait for, or None if some process still makes progress.

    Called by a process that has made no progress for :func:`lost_after`, with what all have said. Culprits are those
    that are lost. If there is none, and no process has moved for ``stall_seconds``, it is each one that has entered
    fewer collective operations than the others.
    """
    lost = lost_peers(seen, reporter, stall_seconds)
    if lost is not None or any(s.age < stall_seconds for s in seen):
        return lost
    most = max(s.collectives for s in seen)
    culprits = [s for s in seen if s.collectives < most] or (list(seen) if len(seen) == 1 else [])
    culprits = sorted(culprits, key=lambda s: s.rank)
    waiting = sorted({s.rank for s in seen} - {s.rank for s in culprits})
    if culprits:
        parts = [f"{s.name} has been {s.place} at step {s.step} for {s.age:.0f} s" for s in culprits]
    else:
        parts = [
            f"no process has moved for {min(s.age for s in seen):.0f} s, and none is behind the others: they stand in "
            f"the same collective operation ({'; '.join(_places(seen))}). Look at the network between the machines, "
            "and at the GPUs"
        ]
    wait = f"; {_wait(waiting)} for {'it' if len(culprits) == 1 else 'them'}" if culprits and waiting else ""
    return Diagnosis(reporter, tuple(s.rank for s in culprits), f"stalled: {'; '.join(parts)}{wait}")


def format_ranks(ranks: Iterable[int]) -> str:
    """``0-3, 5`` for 0, 1, 2, 3, 5."""
    ordered, parts, start = sorted(ranks), [], 0
    for i, rank in enumerate(ordered):
        if i + 1 == len(ordered) or ordered[i + 1] != rank + 1:
            parts.append(str(rank) if start == i else f"{ordered[start]}-{rank}")
            start = i + 1
    return ", ".join(parts)


def format_processes(ranks: Sequence[int]) -> str:
    """``process 1``, or ``processes 0-3, 5``."""
    return f"process{'es' if len(ranks) > 1 else ''} {format_ranks(ranks)}"


def _wait(ranks: Sequence[int]) -> str:
    return f"{format_processes(ranks)} {'wait' if len(ranks) > 1 else 'waits'}"


def _unheard(seconds: float, several: bool = False) -> str:
    return f"{'have' if several else 'has'} not been heard of for {seconds:.0f} s"


def _lost_host(processes: Sequence[ProcessStatus]) -> str:
    """What is said of lost processes of one machine."""
    first, several = processes[0], len(processes) > 1
    name = f"{format_processes([s.rank for s in processes])} (host {first.host})" if several else first.name
    gone = "their machine, its network or the processes themselves are" if several else None
    gone = gone or "its machine, its network or the process itself is"
    return (
        f"{name} {_unheard(min(s.unheard for s in processes), several)}: {gone} gone (last seen {first.place} at step "
        f"{first.step})"
    )


def _places(seen: Sequence[ProcessStatus]) -> list[str]:
    """Where the processes are, those at the same place together."""
    where: dict[tuple[str, int], list[int]] = {}
    for s in sorted(seen, key=lambda s: s.rank):
        where.setdefault((s.place, s.step), []).append(s.rank)
    return [f"{format_processes(ranks)} {place} at step {step}" for (place, step), ranks in where.items()]
