"""How the processes of a run find each other, and what is said when one does not come."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from data_pipeline.errors import UserError
from pretrain.distributed.agreement import agree, facts_key
from pretrain.distributed.signals import StopFlag
from pretrain.distributed.stall_diagnosis import format_processes
from pretrain.distributed.watchdog import process_key, status_of, torchrun_holds_store

if TYPE_CHECKING:
    import torch.distributed as dist

POLL_SECONDS = 0.2
FIRST_POLL_SECONDS = 0.01
"""The first looks come soon after each other: processes of one machine are there at nearly the same time."""
BACKLOG = 1024
"""Processes that may come at the same moment."""
ADDRESS_SECONDS = 30.0
"""How long process 0 tries to reach itself at MASTER_ADDR: a cluster's name service may need a while."""
_ARRIVED, _EVERYBODY, _GIVEN_UP = "arrived", "everybody", "given up"
_WORLD_SIZE, _CONTRADICTION = "world size", "contradiction"


class ProcessesMissing(Exception):
    """Some process of the run did not come in time. The message is empty where another process says it."""


class StoppedWhileWaiting(Exception):
    """This process was asked to stop before all had come; nothing was begun."""


def rendezvous(
    rank: int,
    world_size: int,
    patience: float,
    timeout: timedelta,
    arrival: str,
    stop: StopFlag | None = None,
    facts: Mapping[str, str] | None = None,
) -> dist.Store:
    """Wait at MASTER_ADDR:MASTER_PORT until all processes are there; returns the store they share.

    ``arrival`` is what this process leaves there under :func:`process_key`. ``patience`` is how many seconds it waits
    for the others, ``timeout`` that of later calls on the store. ``facts`` must be the same on all processes, which are
    compared then (None on all: they are not). Raises :class:`ProcessesMissing` with the names of those missing,
    :class:`StoppedWhileWaiting`, and :class:`UserError` that names a process that was started differently, two with the
    same RANK, or an address or port that process 0 cannot be reached at.
    """
    deadline = time.monotonic() + patience
    store, holds = open_store(rank, patience, timeout, stop)
    _announce(store, rank, world_size, arrival, holds)
    if facts is not None:
        store.set(facts_key(rank), json.dumps(facts))
    # Counted, so that a look costs the same for any number of processes.
    if store.add(_ARRIVED, 1) == world_size:
        store.set(_EVERYBODY, "")

    def wait(store: dist.Store, key: str) -> None:
        # store.wait() would do, but logs a warning of PyTorch's at each time-out, and does not hear a signal before.
        pause = FIRST_POLL_SECONDS
        while not store.check([key]):
            if stop is not None and stop():
                raise StoppedWhileWaiting
            if store.check([_CONTRADICTION]):
                _contradicted(store, holds)
            if store.check([_GIVEN_UP]):
                raise ProcessesMissing("")
            if time.monotonic() > deadline:
                _give_up(store, rank, world_size, patience, holds)
            time.sleep(pause)
            pause = min(POLL_SECONDS, 2 * pause)

    def name(rank: int) -> str:
        return status_of(rank, store.get(process_key(rank))).name

    wait(store, _EVERYBODY)
    if facts is not None:
        try:
            agree(store, rank, world_size, name, wait)
        except UserError:
            if holds:
                time.sleep(5 * POLL_SECONDS)  # so that the others read it before the store is gone
            raise
    return store


def open_store(rank: int, patience: float, timeout: timedelta, stop: StopFlag | None = None) -> tuple[dist.Store, bool]:
    """The store at MASTER_ADDR:MASTER_PORT, and whether this process holds it; says nothing of who else is there.

    See :func:`rendezvous` for the arguments and what is raised.
    """
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    holds = rank == 0 and not torchrun_holds_store()
    deadline = time.monotonic() + patience
    listening = _listen(address, port, deadline, stop) if holds else None
    if listening is None:
        _wait_for_port(address, port, deadline, patience, rank, stop)
    try:
        # The number of processes is left out: the constructor would wait for them without saying who is missing.
        store: dist.Store = dist.TCPStore(
            address,
            port,
            is_master=holds,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=None if listening is None else listening.detach(),
        )
    except dist.DistNetworkError as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(f"process {rank} cannot meet the others at {address}:{port}: {first_line}") from None
    if torchrun_holds_store():
        # It outlives the processes: after torchrun's restart it still holds what they said the last time.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store, holds


def _announce(store: dist.Store, rank: int, world_size: int, arrival: str, holds: bool) -> None:
    """Leave ``arrival`` in the store; raises :class:`UserError`, as all that wait do, if it contradicts another's."""
    name = status_of(rank, arrival).name
    # The first to come decides what the others are compared with.
    size, first = json.loads(store.compare_set(_WORLD_SIZE, "", json.dumps([world_size, name])))
    fault = None
    if size != world_size:
        fault = f"{name} was started with WORLD_SIZE {world_size}, and {first} with WORLD_SIZE {size}"
    else:
        before = store.compare_set(process_key(rank), "", arrival).decode()
        if before != arrival:
            fault = f"two processes have RANK {rank}: {name} and {status_of(rank, before).name}"
    if fault is not None:
        remedy = "All processes of a run need the same WORLD_SIZE and each a RANK of its own; another run needs another"
        store.compare_set(_CONTRADICTION, "", f"{fault}. {remedy} MASTER_PORT")
        _contradicted(store, holds)


def _contradicted(store: dist.Store, holds: bool) -> NoReturn:
    message = store.get(_CONTRADICTION).decode()
    if holds:
        time.sleep(5 * POLL_SECONDS)  # so that the others read it before the store is gone
    raise UserError(message)


def _listen(address: str, port: int, deadline: float, stop: StopFlag | None) -> socket.socket:
    """The socket that the store of process 0 will listen at, reachable under this address.

    TCPStore itself would try an address that is not this machine's until its time-out, and print its own stack.
    """
    try:
        listening = _server_socket(port)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at port {port} of this machine ({error.strerror or error}): set MASTER_PORT to "
            "one that is free"
        ) from None
    deadline = min(deadline, time.monotonic() + ADDRESS_SECONDS)
    while True:
        try:
            # The system accepts it; the store sees a connection that was closed, as from those that wait for the port.
            socket.create_connection((address, port), timeout=5.0).close()
            return listening
        except OSError as error:
            problem = error.strerror or error
        if stop is not None and stop():
            listening.close()
            raise StoppedWhileWaiting
        if time.monotonic() > deadline:
            listening.close()
            raise UserError(
                f"process 0 (host {socket.gethostname()}) cannot be reached at MASTER_ADDR {address}, port {port} "
                f"({problem}): set MASTER_ADDR to a name or an address of the machine of process 0"
            )
        time.sleep(POLL_SECONDS)


def _server_socket(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # a system that has IPv6, switched off
                raise
    return socket.create_server(("", port), backlog=BACKLOG)


def _give_up(store: dist.Store, rank: int, world_size: int, patience: float, holds: bool) -> NoReturn:
    present = [other for other in range(world_size) if store.check([process_key(other)])]
    missing = sorted(set(range(world_size)) - set(present))
    message = (
        f"{format_processes(missing)} of {world_size} did not come within {patience:g} s; "
        f"{format_processes(present)} {'are' if len(present) > 1 else 'is'} there. Look at the logs of the missing and "
        "at their network"
    )
    first = store.compare_set(_GIVEN_UP, "", str(rank)) == str(rank).encode()
    if holds:
        time.sleep(5 * POLL_SECONDS)  # so that the others read it before the store is gone
    raise ProcessesMissing(message if first else "")


def _wait_for_port(address: str, port: int, deadline: float, patience: float, rank: int, stop: StopFlag | None) -> None:
    """Wait until somebody listens there: TCPStore itself would wait without hearing a signal."""
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return
        except OSError as error:
            problem = error.strerror or error
        if stop is not None and stop():
            raise StoppedWhileWaiting
        if time.monotonic() > deadline:
            raise ProcessesMissing(
                f"process 0 did not come: process {rank} (host {socket.gethostname()}) found nobody at "
                f"{address}:{port} for {patience:g} s ({problem}). Look at the log of process 0, at MASTER_ADDR and "
                "MASTER_PORT, and at the network"
            )
        time.sleep(POLL_SECONDS)
