"""Which process holds up a run that makes no progress, from what each last reported. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

SILENT_SHARE = 0.25
"""A process without a sign of life for this share of ``stall_seconds`` is called silent."""


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
    def of_silent_holder(cls, holder: ProcessStatus, own: ProcessStatus, world_size: int) -> Diagnosis:
        """The diagnosis of a process that cannot ask any more: process 0, which holds the store, does not answer."""
        waiting = [rank for rank in range(world_size) if rank != holder.rank]
        message = (
            f"stalled: {holder.name} does not answer: it is stopped, frozen, or its machine or network is gone; "
            f"{_wait(waiting)} for it ({_stands(own)})"
        )
        return cls(waiting[0], (holder.rank,), message)


def diagnose(seen: Sequence[ProcessStatus], reporter: int, stall_seconds: float) -> Diagnosis | None:
    """Which processes the others wait for, or None if some process still makes progress.

    Called by a process that has made no progress for ``stall_seconds``. A culprit is a process without a sign of life.
    If there is none, and no process has moved for ``stall_seconds``, it is each one that has entered fewer collective
    operations than the others.
    """
    everyone = {s.rank: s for s in seen}
    silent = [s for s in seen if s.silence >= SILENT_SHARE * stall_seconds]
    if not silent and any(s.age < stall_seconds for s in seen):
        return None
    most = max(s.collectives for s in seen)
    culprits = silent or [s for s in seen if s.collectives < most] or (list(seen) if len(seen) == 1 else [])
    culprits = sorted(culprits, key=lambda s: s.rank)
    waiting = sorted(set(everyone) - {s.rank for s in culprits})
    if silent:
        parts = [
            f"{s.name} has given no sign of life for {max(s.silence, s.since_beat):.0f} s (last seen {s.place} at step "
            f"{s.step}): it is stopped, frozen, or its machine or network is gone"
            for s in culprits
        ]
    elif culprits:
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


def _stands(seen: ProcessStatus) -> str:
    return f"process {seen.rank} has been {seen.place} at step {seen.step} for {seen.age:.0f} s"


def _places(seen: Sequence[ProcessStatus]) -> list[str]:
    """Where the processes are, those at the same place together."""
    where: dict[tuple[str, int], list[int]] = {}
    for s in sorted(seen, key=lambda s: s.rank):
        where.setdefault((s.place, s.step), []).append(s.rank)
    return [f"{format_processes(ranks)} {place} at step {step}" for (place, step), ranks in where.items()]
