"""The addresses of this machine, and whether the hosts of a run reach the first one of them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping

import psutil

from data_pipeline.errors import UserError

FREE_PORTS = 3
_ANY_PORT = 9
"""For a datagram socket that is connected and sends nothing."""


def interface_addresses() -> dict[str, list[str]]:
    """The IP addresses of each network interface that is up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        own = [each.address for each in addresses if each.family in (socket.AF_INET, socket.AF_INET6)]
        if name in up and own:
            found[name] = own
    return found


def source_address(address: str) -> str:
    """The own address from which packets to ``address`` leave; raises ``OSError`` if there is no way."""
    family, kind, protocol, _, where = socket.getaddrinfo(address, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])


def interface_towards(address: str) -> str:
    """The network interface by which this machine reaches ``address``, its own included; raises :class:`UserError`."""
    here = socket.gethostname()
    try:
        source = source_address(address)
    except OSError as error:
        raise UserError(f"{here} has no way to {address}: {error.strerror or error}") from None
    for name, addresses in interface_addresses().items():
        if source in (each.partition("%")[0] for each in addresses):
            return name
    raise UserError(f"{here} has no network interface with the address {source}, from which it reaches {address}")


def choose_interface(asked: str, towards: str, env: MutableMapping[str, str] = os.environ) -> None:
    """Have gloo and NCCL use the interface ``asked``; for ``auto`` the one to the address ``towards``.

    Where the user has named others in gloo's and NCCL's own variables, ``auto`` leaves those.
    """
    name = interface_towards(towards) if asked == "auto" else asked
    # Without "=" it would be the beginning of a name.
    for variable, value in (("GLOO_SOCKET_IFNAME", name), ("NCCL_SOCKET_IFNAME", f"={name}")):
        if asked != "auto" or not env.get(variable):
            env[variable] = value


def free_ports(number: int = FREE_PORTS) -> list[int]:
    """Ports of this machine that nobody listens at."""
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def meet_as_first(address: str, port: int, others: int, seconds: float) -> str | None:
    """Listen at the address until ``others`` have come; returns where and why it could not, None if it could.

    That some do not come is no fault of this host: they say it themselves.
    """
    deadline = time.monotonic() + seconds
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((address, port), family=family, backlog=max(1, others))
    except OSError as error:
        return f"{address}, port {port} ({_reason(error)})"
    with listening:
        for _ in range(others):
            listening.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                listening.accept()[0].close()
            except OSError:
                break
    return None


def meet_first(address: str, port: int, seconds: float) -> str | None:
    """Connect to the first host, which may begin to listen later; returns where and why it could not, or None."""
    deadline, problem = time.monotonic() + seconds, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=max(0.01, min(5.0, left))).close()
            return None
        except OSError as error:
            problem = _reason(error)
        time.sleep(0.1)
    return f"{address}, port {port} ({problem})"


def _reason(error: OSError) -> str:
    # Python puts the address into some of the texts, in its own notation.
    positive = error.errno is not None and error.errno > 0
    return os.strerror(error.errno) if positive else error.strerror or str(error)  # type: ignore[arg-type]
