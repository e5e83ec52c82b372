"""A process whose machine or network is gone ends the run within a minute; one that only is slow never does.

The watchdogs of several processes run here in one, beat by beat, on a clock that the test moves.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from pretrain.distributed import watchdog
from pretrain.distributed.stall_diagnosis import ProcessStatus, diagnose, lost_after
from pretrain.distributed.watchdog import Watchdog

STALL_SECONDS = 1800.0
CUT_AT = 100.0


class Unanswered(Exception):
    """In place of a call that never returns."""


class Server:
    """The store: what process 0 or torchrun holds."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.reads: list[tuple[int, list[str]]] = []


class Client:
    """One process's connection to it; ``cut``: what is written is lost, and nothing is answered."""

    def __init__(self, server: Server, rank: int) -> None:
        self.server, self.rank, self.cut = server, rank, False

    def _answer(self) -> dict[str, str]:
        if self.cut:
            raise Unanswered
        return self.server.values

    def set(self, key: str, value: str) -> None:
        if not self.cut:  # a socket takes the bytes also when they never arrive
            self.server.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self._answer() for key in keys)

    def get(self, key: str) -> bytes:
        return self._answer()[key].encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.server.reads.append((self.rank, keys))
        return [self._answer()[key].encode() for key in keys]

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self._answer().setdefault(key, desired).encode()


class Ended(Exception):
    """In place of the end of the process."""


@dataclass
class Process:
    """One process: its two threads, and when they last ran."""

    watch: Watchdog
    client: Client
    next_beat: float
    next_look: float
    moves: bool = True  # the main thread
    threads_run: bool = True
    hangs_in_call: bool = False
    ended_at: float | None = None
    said: str | None = None


@dataclass
class Simulation:
    """All of them, and the clock."""

    now: float = 0.0
    processes: list[Process] = field(default_factory=list)
    moving: Process | None = None

    def run(self, until: float, each: Callable[[], None] = lambda: None) -> None:
        """Let time pass in steps of 0.1 s."""
        while self.now < until - 1e-6:
            self.now += 0.1
            each()
            for process in self.processes:
                self._step(process)

    def _step(self, process: Process) -> None:
        if process.ended_at is not None or not process.threads_run:
            return
        watch = process.watch
        if self.now >= process.next_beat and not process.hangs_in_call:
            process.next_beat = self.now + watch.interval
            try:
                watch._speak(process.client)  # type: ignore[arg-type]
            except Unanswered:
                process.hangs_in_call = True
        if self.now >= process.next_look:
            process.next_look = self.now + watch.interval
            if process.moves:
                watchdog.at("training", int(self.now))
                watch._before = (-1, -1)
            else:
                watch._before = (watchdog._here.moves, 0)
            try:
                watch._look()
            except Ended as end:
                # The last words come first, then the wait for the others to hear it.
                process.ended_at, process.said = self.now + 4 * watch.interval, str(end) or None

    def ended(self) -> list[float | None]:
        return [process.ended_at for process in self.processes]

    def said(self) -> list[str]:
        return [process.said for process in self.processes if process.said is not None]

    def cut(self, ranks: Sequence[int]) -> None:
        """Cut these off from the others; everybody then waits in a collective operation."""
        for process in self.processes:
            process.moves = False
            process.client.cut = process.client.cut or process.watch.rank in ranks


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Simulation]:
    simulation = Simulation()
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: 1000.0 + simulation.now)
    monkeypatch.setattr(watchdog, "collectives_entered", lambda: 0)
    monkeypatch.setattr(watchdog, "_here", type("Here", (), {"place": "training", "step": 0, "moves": 0})())

    def end(self: Watchdog, message: str | None, with_stack: bool, before_exit: Any = None) -> None:
        raise Ended(message or "")

    monkeypatch.setattr(Watchdog, "_end", end)

    def make(hosts: Sequence[str], stall_seconds: float = STALL_SECONDS) -> Simulation:
        server, chance = Server(), random.Random(len(hosts))
        for rank, host in enumerate(hosts):
            local_rank = list(hosts[:rank]).count(host)
            watch = Watchdog(rank, len(hosts), stall_seconds, local_rank=local_rank)
            client = Client(server, rank)
            watch._store = client  # type: ignore[assignment]
            starts = [simulation.now + chance.random() * watch.interval for _ in range(2)]
            simulation.processes.append(Process(watch, client, *starts))
            record = watch.record
            here = {"host": host, "pid": 100 + rank}

            def named(record: Callable[[], str] = record, here: dict[str, Any] = here) -> str:
                return watchdog.json.dumps({**watchdog.json.loads(record()), **here})

            watch.record = named  # type: ignore[method-assign]
            client.set(watchdog.process_key(rank), named())
        for process in simulation.processes:
            process.watch._listen(process.client, [0])  # type: ignore[arg-type]
        return simulation

    return make


def test_a_link_that_is_cut_ends_both_sides(simulate: Callable[..., Simulation]) -> None:
    run = simulate(["h1", "h2", "h3"])
    run.run(CUT_AT)
    run.cut([2])
    run.run(CUT_AT + 120)
    ended = run.ended()
    assert all(at is not None and 30 <= at - CUT_AT <= 47 for at in ended), ended
    first, second = run.said()
    assert first.startswith("stalled: process 2 (host h3, pid 102) has not been heard of for 3")
    assert " s: its machine, its network or the process itself is gone (last seen training at step " in first
    assert first.endswith("; processes 0-1 wait for it")
    assert second.startswith("stalled: process 0 (host h1, pid 100) has not been heard of for 3")
    assert " s: its machine, its network or the process itself is gone; process 2 waits for it" in second
    assert [process.said is not None for process in run.processes] == [True, False, True]


def test_where_the_machine_of_process_0_is_gone_each_other_machine_says_so_once(
    simulate: Callable[..., Simulation],
) -> None:
    run = simulate(["h1", "h1", "h2", "h2", "h3", "h3"])
    run.run(CUT_AT)
    run.cut([2, 3, 4, 5])  # process 0 still reaches itself and its neighbour
    run.run(CUT_AT + 120)
    assert all(at is not None and at - CUT_AT <= 47 for at in run.ended()), run.ended()
    assert [process.said is not None for process in run.processes] == [True, False, True, False, True, False]
    first = run.said()[0]
    assert "processes 2-3 (host h2) have not been heard of for 3" in first
    assert "; processes 4-5 (host h3) have not been heard of for 3" in first
    assert "their machine, its network or the processes themselves are gone" in first
    assert first.endswith("; processes 0-1 wait for them")


def test_where_process_0_stops_its_neighbour_says_so(simulate: Callable[..., Simulation]) -> None:
    run = simulate(["h1", "h1", "h1", "h2"])
    run.run(CUT_AT)
    run.processes[0].threads_run = False
    run.cut([1, 2, 3])
    run.run(CUT_AT + 120)
    assert [process.said is not None for process in run.processes] == [False, True, False, True]
    assert run.ended()[0] is None
    assert all(at is not None and at - CUT_AT <= 47 for at in run.ended()[1:])


@pytest.mark.parametrize("cut", [(2,), (0, 1, 2)])
def test_under_torchrun_its_store_may_be_what_is_gone(
    simulate: Callable[..., Simulation], monkeypatch: pytest.MonkeyPatch, cut: tuple[int, ...]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    run = simulate(["h1", "h2", "h3"])
    run.run(CUT_AT)
    run.cut(cut)
    run.run(CUT_AT + 120)
    assert all(at is not None and at - CUT_AT <= 47 for at in run.ended())
    words = "stalled: torchrun's store has not answered for 3"
    assert [process.said is not None and words in process.said for process in run.processes] == [
        rank in cut for rank in range(3)
    ]
    if cut == (2,):
        assert "process 2 (host h3, pid 102) has not been heard of" in run.said()[0]


def test_a_silent_process_0_is_named_where_another_process_holds_the_store(
    simulate: Callable[..., Simulation],
) -> None:
    run = simulate(["h1", "h2", "h3"])
    run.run(CUT_AT)
    run.processes[0].threads_run = False  # its store answers still: a thread without Python
    run.cut([])
    run.run(CUT_AT + 120)
    (said,) = run.said()
    assert "process 0 (host h1, pid 100) has not been heard of for 3" in said
    assert all(at is not None and at - CUT_AT <= 47 for at in run.ended()[1:])


def test_a_slow_process_that_gives_signs_of_life_is_not_lost(simulate: Callable[..., Simulation]) -> None:
    """The first one exports for a quarter of an hour; the others wait for it, or it for them."""
    run = simulate(["h1", "h2", "h3"])
    run.run(CUT_AT)
    run.cut([])
    run.run(CUT_AT + 900)
    assert run.ended() == [None, None, None]


def test_a_process_that_does_not_wait_for_a_lost_one_trains_on(simulate: Callable[..., Simulation]) -> None:
    run = simulate(["h1", "h2"])
    run.run(CUT_AT)
    run.cut([1])
    run.processes[0].moves = True
    run.run(CUT_AT + 120)
    assert run.ended()[0] is None
    assert run.ended()[1] is not None


@pytest.mark.parametrize("late", [0.0, 10.0])
def test_a_suspended_job_loses_nobody(simulate: Callable[..., Simulation], late: float) -> None:
    """All are stopped for an hour in the middle of a wait, and continued within seconds of each other."""
    run = simulate(["h1", "h2", "h3"])
    run.run(CUT_AT)
    run.cut([])
    run.run(CUT_AT + 20)
    for process in run.processes:
        process.threads_run = False
    run.run(CUT_AT + 3600)
    run.processes[0].threads_run = run.processes[1].threads_run = True
    run.run(CUT_AT + 3600 + late)
    run.processes[2].threads_run = True
    run.run(CUT_AT + 3900)
    assert run.ended() == [None, None, None]


def test_only_process_0_reads_what_all_say_and_only_while_it_stands_still(
    simulate: Callable[..., Simulation],
) -> None:
    run = simulate(["h1"] * 8)
    reads = run.processes[0].client.server.reads
    reads.clear()
    run.run(CUT_AT)
    assert reads == []
    run.cut([])
    run.run(CUT_AT + 25)
    assert {len(keys) for rank, keys in reads if rank == 0} == {8}
    assert {tuple(keys) for rank, keys in reads if rank != 0} == {("process/0",)}


def test_many_lost_machines_are_counted_and_not_listed() -> None:
    seen = [ProcessStatus(rank=rank, host=f"h{rank // 4}", silence=20.0, since_beat=33.0) for rank in range(4, 44)]
    message = diagnose([ProcessStatus(rank=rank, host="h0", age=31.0) for rank in range(4)] + seen, 0, 1800.0)
    assert message is not None
    assert message.message == (
        "stalled: processes 4-43 (10 hosts: h1, h2, h3, h4, ...) have not been heard of for 33 s: their machines, the "
        "network to them or the processes themselves are gone; processes 0-3 wait for them"
    )


def test_a_short_patience_is_kept() -> None:
    assert (lost_after(1800.0), lost_after(20.0)) == (30.0, 20.0)
