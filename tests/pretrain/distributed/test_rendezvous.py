"""What is said where the processes of a run cannot meet. Threads stand in for them; none of it needs a process."""

from __future__ import annotations

import json
import socket
import threading
from datetime import timedelta
from typing import Any

import pytest

from data_pipeline.errors import UserError
from pretrain.distributed import rendezvous as module
from pretrain.distributed.rendezvous import rendezvous


def meet(monkeypatch: pytest.MonkeyPatch, *processes: tuple[int, int], address: str = "127.0.0.1") -> list[Any]:
    """What came of each (RANK, WORLD_SIZE): a store, or what it raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    found: list[Any] = [None] * len(processes)

    def join(number: int, rank: int, world_size: int) -> None:
        arrival = json.dumps({"host": "here", "pid": 100 + number})
        try:
            found[number] = rendezvous(rank, world_size, 20.0, timedelta(seconds=20), arrival)
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=join, args=(i, *process)) for i, process in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_those_that_fit_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = meet(monkeypatch, (0, 2), (1, 2))
    first.set("key", "value")
    assert second.get("key") == b"value"


@pytest.mark.parametrize(
    ("processes", "words"),
    [
        (
            [(0, 2), (1, 4)],
            r"was started with WORLD_SIZE [24], and process [01] \(host here, pid 10[01]\) with WORLD_SIZE [24]\.",
        ),
        (
            [(0, 3), (1, 3), (1, 3)],
            r"two processes have RANK 1: process 1 \(host here, pid 10[12]\) and process 1 \(host here, pid 10[12]\)",
        ),
    ],
)
def test_processes_that_contradict_each_other_are_named(
    monkeypatch: pytest.MonkeyPatch, processes: list[tuple[int, int]], words: str
) -> None:
    for error in meet(monkeypatch, *processes):
        assert isinstance(error, UserError)
        with pytest.raises(UserError, match=words):
            raise error


def test_an_address_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ADDRESS_SECONDS", 0.3)
    (error,) = meet(monkeypatch, (0, 2), address="no.such.host.invalid")
    with pytest.raises(UserError, match=r"cannot be reached at MASTER_ADDR no.such.host.invalid, port \d+ \(.+\)"):
        raise error


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match=r"process 0 cannot listen at port \d+ of this machine \(Address"):
            rendezvous(0, 2, 5.0, timedelta(seconds=5), json.dumps({"host": "here", "pid": 1}))
