"""The doctor's processes, one or more on each host: they meet in a store and do phases that the first one calls.

A process that does not come, hangs or dies costs the phase's time limit once; then it is left out and named. So nothing
here is a collective operation, and what a process does in a phase runs on a thread that may be left behind.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from pretrain.distributed.rendezvous import ProcessesMissing, open_store
from pretrain.distributed.world import Rank

if TYPE_CHECKING:
    import torch.distributed as dist

POLL_SECONDS = 0.02
SLOW_POLL_SECONDS = 0.2
FAREWELL_SECONDS = 5.0
GRACE_SECONDS = 2.0
"""For the answer of a process whose own limit has just passed."""
STORE_SECONDS = 30.0
"""Limit of a single call on the store, of which all are small."""
Work = Callable[[dict[str, Any]], Any]
"""Does this process's part of a phase: from the phase's arguments to a result, both of which JSON can write."""


@dataclass(frozen=True)
class Lost:
    """A process that is left out from a phase on. ``reason``: absent, silent, or the text of its error."""

    rank: int
    phase: str
    reason: str


@dataclass
class Phase:
    """What came of a phase: results by rank, and messages of those whose part failed without taking them out."""

    results: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class Meeting:
    """This process among the others. The first one calls :meth:`phase` and :meth:`end`, the others :meth:`serve`."""

    def __init__(self, rank: Rank, patience: float, host: str) -> None:
        """Meet the others, who have ``patience`` seconds; raises :class:`UserError` if the first is not found.

        Those who do not come to the first are in ``lost``.
        """
        import torch.distributed as dist

        self.rank, self.members = rank.rank, list(range(rank.world_size))
        self.lost: list[Lost] = []
        self._number = 0
        if rank.world_size == 1:
            self.store: dist.Store = dist.HashStore()
            return
        deadline = time.monotonic() + patience
        try:
            self.store, _ = open_store(rank.rank, patience, timedelta(seconds=STORE_SECONDS))
        except ProcessesMissing as error:
            raise UserError(str(error)) from None
        self._arrive(rank, host)
        if rank.is_first:
            self._await_all(deadline)

    def _arrive(self, rank: Rank, host: str) -> None:
        own = json.dumps({"host": host, "world_size": rank.world_size, "key": time.time_ns()})
        first = json.loads(self.store.compare_set("world", "", own).decode())
        remedy = "All processes need the same WORLD_SIZE and each a RANK of its own"
        if first["world_size"] != rank.world_size:
            raise UserError(
                f"{host} was started with WORLD_SIZE {rank.world_size}, and {first['host']} with WORLD_SIZE "
                f"{first['world_size']}. {remedy}"
            )
        before = self.store.compare_set(f"here/{rank.rank}", "", own).decode()
        if before != own:
            raise UserError(
                f"two processes have RANK {rank.rank}: on {json.loads(before)['host']} and {host}. {remedy}"
            )

    def _await_all(self, deadline: float) -> None:
        missing = set(self.members)
        while missing:
            missing = {rank for rank in missing if not self.store.check([f"here/{rank}"])}
            if missing and time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        self._leave_out({rank: Lost(rank, "start", "absent") for rank in missing})

    def _leave_out(self, lost: Mapping[int, Lost]) -> None:
        self.lost += lost.values()
        self.members = [rank for rank in self.members if rank not in lost]

    def phase(self, name: str, args: dict[str, Any], work: Work, seconds: float) -> Phase:
        """Have all members do ``name``, this one too, in at most ``seconds``; those that do not answer are left out."""
        self._number += 1
        call = {"name": name, "members": self.members, "seconds": seconds, **args}
        self.store.set(f"call/{self._number}", json.dumps(call))
        deadline = time.monotonic() + seconds
        done = Phase()
        self._sort(done, self.rank, _bounded(work, call, seconds))
        waiting = [rank for rank in self.members if rank != self.rank]
        while waiting:
            here = [rank for rank in waiting if self.store.check([self._answer(rank)])]
            for rank in here:
                self._sort(done, rank, json.loads(self.store.get(self._answer(rank))))
            waiting = [rank for rank in waiting if rank not in here]
            if waiting and time.monotonic() > deadline + GRACE_SECONDS:
                break
            if waiting:
                time.sleep(POLL_SECONDS)
        self._leave_out({rank: Lost(rank, name, "silent") for rank in waiting})
        return done

    @staticmethod
    def _sort(done: Phase, rank: int, answer: dict[str, Any]) -> None:
        if "error" in answer:
            done.errors[rank] = answer["error"]
        else:
            done.results[rank] = answer["result"]

    def _answer(self, rank: int) -> str:
        return f"answer/{self._number}/{rank}"

    def serve(self, works: Mapping[str, Work], deadline: float) -> int:
        """Do what the first process calls, until it ends the meeting; returns the status that it gives.

        ``deadline`` is of the monotonic clock. Raises :class:`UserError` when the first process is gone.
        """
        while True:
            self._number += 1
            call = json.loads(self._next(deadline))
            if call["name"] == "end":
                self.store.set(self._answer(self.rank), "{}")
                return int(call["status"])
            if self.rank not in call["members"]:
                raise UserError("this process was left out: it did not answer in time")
            answer = _bounded(works[call["name"]], call, call["seconds"])
            self.store.set(self._answer(self.rank), json.dumps(answer))

    def _next(self, deadline: float) -> bytes:
        key, pause = f"call/{self._number}", POLL_SECONDS
        try:
            while not self.store.check([key]):
                if time.monotonic() > deadline:
                    raise UserError("the first process called nothing for the whole --timeout")
                time.sleep(pause)
                pause = min(SLOW_POLL_SECONDS, 1.5 * pause)
            return self.store.get(key)
        except RuntimeError as error:
            first = (str(error).splitlines() or [""])[0]
            raise UserError(f"the first process is gone: {first}") from None

    def end(self, status: int) -> None:
        """Let the others go, with ``status``; waits a moment until they have heard it, for the store is ours."""
        self._number += 1
        self.store.set(f"call/{self._number}", json.dumps({"name": "end", "status": status}))
        deadline = time.monotonic() + FAREWELL_SECONDS
        others = [rank for rank in self.members if rank != self.rank]
        while not all(self.store.check([self._answer(rank)]) for rank in others) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def _bounded(work: Work, call: dict[str, Any], seconds: float) -> dict[str, Any]:
    """``{"result": ...}``, or ``{"error": text}`` for what was raised, or where it took longer than ``seconds``."""
    box: dict[str, Any] = {}

    def run() -> None:
        try:
            box["result"] = work(call)
        except Exception as error:
            text = " ".join(str(error).split())
            box["error"] = text[:300] if isinstance(error, UserError) else f"{type(error).__name__}: {text[:300]}"

    thread = threading.Thread(target=run, name=call["name"], daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return {"error": f"did not end within {seconds:g} s"}
    return box
