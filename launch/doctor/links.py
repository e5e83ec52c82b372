"""The way between each two hosts, over plain TCP: round trip, both directions' speed, and the offset of their clocks.

Plain sockets and not gloo: each call has a time limit, a dead pair costs seconds, and it is the only one to fail. gloo
needs all pairs before it does anything, and does not say which one it waits for.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

CONNECT_SECONDS = 5.0
STEP_SECONDS = 8.0
"""Limit of a single send or receive: 256 KiB at 1 Mbit/s take 2 s."""
PINGS, WARM_UP = 40, 3
PING_SECONDS = 2.0
SIZES = (256 << 10, 4 << 20, 32 << 20)
"""Bytes sent at a time: a larger one only where the one before took less than :data:`FAST_SECONDS`."""
FAST_SECONDS = 0.03
_HEADER = struct.Struct("<q")
_CLOCK = struct.Struct("<d")
_CHUNK = 1 << 20


def rounds(hosts: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Each two of ``hosts`` once, in rounds in which nobody is in two pairs (the circle method of tournaments).

    The smaller number of a pair comes first: it listens.
    """
    circle: list[int | None] = list(hosts) + ([None] if len(hosts) % 2 else [])
    out = []
    for _ in range(len(circle) - 1):
        pairs = [(circle[i], circle[-1 - i]) for i in range(len(circle) // 2)]
        out.append(sorted((min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None))
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return [pairs for pairs in out if pairs]


def spread(every: list[list[tuple[int, int]]], most: int) -> list[list[tuple[int, int]]]:
    """At most ``most`` of the rounds, evenly taken."""
    return every if len(every) <= most else [every[i * len(every) // most] for i in range(most)]


def listen() -> socket.socket:
    """A socket that other hosts can connect to, at a port that the system chose."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=64, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=64)


def answer(listening: socket.socket, key: str, seconds: float) -> dict[str, Any]:
    """The side of a pair that listens: accept the peer that says ``key``, reply, and count nothing."""
    deadline = time.monotonic() + seconds
    while True:
        listening.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            peer, _ = listening.accept()
        except TimeoutError:
            return {"error": "nobody connected"}
        with peer:
            peer.settimeout(STEP_SECONDS)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                if _receive(peer, len(key.encode())).decode(errors="replace") != key:
                    continue  # somebody else, or what is left of an earlier round
                _reply(peer)
                return {}
            except OSError as error:
                return {"error": _words(error)}


def _reply(peer: socket.socket) -> None:
    """0: a ping, which gets our clock; N: N bytes come, which get a byte; -N: N bytes are wanted; closed: the end."""
    while True:
        try:
            (size,) = _HEADER.unpack(_receive(peer, _HEADER.size))
        except ConnectionError:
            return
        if size == 0:
            peer.sendall(_CLOCK.pack(time.time()))
        elif size > 0:
            _drain(peer, size)
            peer.sendall(b"k")
        else:
            _send(peer, -size)


def measure(address: str, port: int, key: str, budget: float) -> dict[str, Any]:
    """The side that connects. Times in seconds, speeds in bytes/s, ``offset`` of the peer's clock to ours.

    ``offset`` is as NTP takes it: their clock, less the middle of our clock before and after; right to half the round
    trip, of which the shortest counts. ``budget``: seconds for each direction. With ``error`` and ``stage`` (connect,
    ping, send) where it fails; what was measured before is there.
    """
    out: dict[str, Any] = {}
    stage = "connect"
    try:
        with socket.create_connection((address, port), timeout=CONNECT_SECONDS) as peer:
            peer.settimeout(STEP_SECONDS)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.sendall(key.encode())
            stage = "ping"
            out |= _ping(peer)
            stage = "send"
            out["send"] = _fastest(_sent(peer), budget)
            out["receive"] = _fastest(_received(peer), budget)
    except OSError as error:
        out |= {"error": _words(error), "stage": stage}
    return out


def _ping(peer: socket.socket) -> dict[str, float]:
    trips: list[tuple[float, float]] = []
    end = time.monotonic() + PING_SECONDS
    for number in range(PINGS):
        before, began = time.time(), time.perf_counter()
        peer.sendall(_HEADER.pack(0))
        (theirs,) = _CLOCK.unpack(_receive(peer, _CLOCK.size))
        trip = time.perf_counter() - began
        if number >= WARM_UP or time.monotonic() > end:
            trips.append((trip, theirs - (before + trip / 2)))
        if time.monotonic() > end and trips:
            break
    least, offset = min(trips)
    return {
        "round_trip": least,
        "round_trip_median": statistics.median(trip for trip, _ in trips),
        "offset": offset,
        "offset_error": least / 2,
    }


def _sent(peer: socket.socket) -> Iterator[tuple[int, float]]:
    size = SIZES[0]
    while True:
        began = time.perf_counter()
        peer.sendall(_HEADER.pack(size))
        _send(peer, size)
        _receive(peer, 1)
        took = time.perf_counter() - began
        yield size, took
        size = _next_size(size, took)


def _received(peer: socket.socket) -> Iterator[tuple[int, float]]:
    size = SIZES[0]
    while True:
        began = time.perf_counter()
        peer.sendall(_HEADER.pack(-size))
        _drain(peer, size)
        took = time.perf_counter() - began
        yield size, took
        size = _next_size(size, took)


def _next_size(size: int, took: float) -> int:
    larger = [each for each in SIZES if each > size]
    return larger[0] if larger and took < FAST_SECONDS else size


def _fastest(transfers: Iterator[tuple[int, float]], budget: float) -> float:
    """Bytes/s of the fastest transfer within ``budget`` seconds, of three at least: passing load is not counted."""
    end, best = time.monotonic() + budget, 0.0
    for number, (size, seconds) in enumerate(transfers, 1):
        best = max(best, size / seconds)
        if time.monotonic() > end and (number >= 3 or seconds > budget):
            break
    return best


def _send(peer: socket.socket, size: int) -> None:
    data = memoryview(bytes(min(size, _CHUNK)))
    while size:
        part = min(size, len(data))
        peer.sendall(data[:part])
        size -= part


def _drain(peer: socket.socket, size: int) -> None:
    buffer = bytearray(min(size, _CHUNK))
    while size:
        got = peer.recv_into(buffer, min(size, len(buffer)))
        if not got:
            raise ConnectionError("the other side closed the connection")
        size -= got


def _receive(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = peer.recv(size - len(data))
        if not part:
            raise ConnectionError("the other side closed the connection")
        data += part
    return data


def _words(error: OSError) -> str:
    return "timed out" if isinstance(error, TimeoutError) else error.strerror or str(error)
