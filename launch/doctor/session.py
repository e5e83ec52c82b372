"""One examination: the phases, what each process does in them, and what the first one makes of the answers.

Everything is gathered as one dictionary that JSON can write (:func:`examine`); the report is made from it alone.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.doctor import checks, compare, links, needs, speed
from launch.doctor.findings import Finding, merged, problem, verdict
from launch.doctor.machine import describe_machine, is_loopback
from launch.doctor.meeting import Meeting, Phase, Work
from pretrain.distributed.world import Rank

if TYPE_CHECKING:
    from pretrain.config import RunConfig

FORMAT = 1
LOOK_SECONDS, CACHED_SECONDS = 5.0, 40.0
"""How long a host looks for a file that the first one wrote, of a new name, and of one that it has looked for before:
what was not there is remembered (NFS: 30 s by default)."""
MOST_ROUNDS = 15
"""Of pairs of hosts at the same time: each host then meets so many others, which is enough to tell who is slow."""
LIMITS = {
    "machine": 60.0,
    "look": 20.0,
    "shared": CACHED_SECONDS + 5.0,
    "folders": 40.0,
    "config": 90.0,
    "matrices": 90.0,
    "pair": 40.0,
    "group": 90.0,
}
"""Seconds of a phase, after which who has not answered is left out."""


@dataclass
class Options:
    """What the command asks for."""

    host: str
    config: RunConfig | None = None
    run_dir: Path | None = None
    quick: bool = False
    sizes: Sequence[int] = (4 << 10, 256 << 10, 16 << 20)
    timeout: float = 180.0
    processes: int | None = None
    """Of the run that is meant, where it is not those that examine."""
    names: Sequence[str] = ()
    """Hosts by rank, where they are known before anybody has come."""


@dataclass
class Local:
    """This process's part in the phases."""

    options: Options
    rank: Rank
    meeting: Meeting
    master: str | None
    listening: socket.socket = field(default_factory=links.listen)
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    machine_here: dict[str, Any] = field(default_factory=dict)

    def works(self) -> dict[str, Work]:
        """By the name of the phase."""
        return {name: getattr(self, name) for name in LIMITS}

    def machine(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The machine's description, and the port at which it listens."""
        from pretrain.precision import bf16_speed

        self.machine_here = describe_machine(self.options.host, self.master)
        ratio = None if checks.has_gpus(self.machine_here) else bf16_speed()
        port = self.listening.getsockname()[1]
        return {**self.machine_here, "port": port, "bf16": ratio, "local_rank": self.rank.local_rank}

    def look(self, call: Mapping[str, Any]) -> bool:
        """Look for a file that is not there yet, as a run does: what a file system caches of it shows afterwards."""
        folder = speed.existing(Path(call["folder"]))
        return (folder / call["name_of_file"]).exists()

    def shared(self, call: Mapping[str, Any]) -> float | None:
        """Seconds until the file is seen here with its text; the first process writes it. None for never."""
        folder, began = Path(call["folder"]), time.monotonic()
        file = folder / call["name_of_file"]
        if self.rank.is_first:
            file.write_text(call["text"])
            return 0.0
        while time.monotonic() - began < call["look_for"]:
            try:
                if file.read_text() == call["text"]:
                    return time.monotonic() - began
            except OSError:
                pass
            time.sleep(0.05)
        return None

    def folders(self, call: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Speed and room of the folders of the run."""
        from pretrain.checkpoint.store import free_bytes

        out = []
        for role, folder in needs.folders_of(self.options.config, self.options.run_dir):
            measure = speed.read_speed if role == "shards" else speed.write_speed
            out.append(
                {"role": role, "asked": str(folder), "free": free_bytes(folder), **measure(folder, self.options.quick)}
            )
        return out

    def config(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """What the run of the configuration needs, seen from here."""
        assert self.options.config is not None
        return needs.read_needs(self.options.config, call["processes"])

    def matrices(self, call: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Speeds of this process's devices: all GPUs of the host if it is alone there, else its own one."""
        usable = self.machine_here["gpus"]["usable"]
        numbers = list(range(usable)) if self.rank.rank in call["alone"] else [self.rank.local_rank % max(1, usable)]
        return speed.matrix_speeds(numbers if usable else None, self.options.quick)

    def pair(self, call: Mapping[str, Any]) -> dict[str, Any] | None:
        """This process's pair of this round: the smaller rank listens, the other measures."""
        mine = next((pair for pair in call["pairs"] if self.rank.rank in pair), None)
        if mine is None:
            return None
        low, high = mine
        key = f"{call['key']}:{low:08d}:{high:08d}"
        if self.rank.rank == low:
            return links.answer(self.listening, key, links.CONNECT_SECONDS + 5.0)
        address, port = call["addresses"][str(low)]
        return {"address": address, **links.measure(address, port, key, call["budget"])}

    def group(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """All-reduce by size among all, and on GPUs the speed of each pair."""
        from launch.doctor.collectives import Group

        members = call["members"]
        interface = call["interfaces"].get(str(self.rank.rank))
        index = members.index(self.rank.rank)
        group = Group(self.meeting.store, index, len(members), self.rank.local_rank, interface, 0.8 * call["seconds"])
        out = {
            "backend": group.backend,
            "all_reduce": group.all_reduce(call["sizes"], call["budget"]),
            "pairs": group.pairs(links.rounds(range(len(members)))) if group.backend == "nccl" else [],
        }
        group.close()
        return out


def examine(meeting: Meeting, local: Local, deadline: float) -> dict[str, Any]:
    """Call the phases and judge the answers; ``deadline`` is of the monotonic clock. See :data:`FORMAT`."""
    return _Examination(meeting, local, deadline).run()


class _Examination:
    def __init__(self, meeting: Meeting, local: Local, deadline: float) -> None:
        self.meeting, self.local, self.options, self.deadline = meeting, local, local.options, deadline
        self.began = time.monotonic()
        self.findings: list[Finding] = []
        self.names: dict[int, str] = dict(enumerate(self.options.names))
        self.out: dict[str, Any] = {"format": FORMAT, "quick": self.options.quick}

    def run(self) -> dict[str, Any]:
        machines = self._phase("machine", {}).results
        self._name(machines)
        leaders = self._leaders(machines)
        hosts = [machines[rank] for rank in leaders]
        several = len(leaders) > 1
        self.out["machines"] = hosts
        for machine in hosts:
            self.findings += checks.check_machine(machine, several=several)
        ratios = {each["host"]: each["bf16"] for each in hosts if each["bf16"] is not None}
        if several:
            self.findings += compare.compare_software(hosts)
            self.findings += compare.compare_hardware(hosts)
            self.findings += compare.compare_bf16(hosts, ratios)
            self._shared(leaders)
        self._folders(leaders, ratios)
        self._matrices(leaders, machines)
        whole = self._links(leaders, machines) if several else True
        if len(self.meeting.members) > 1 and whole:
            self._group(machines)
        self._missing()
        found = merged(self.findings)
        return {
            **self.out,
            "findings": [each.as_dict() for each in found],
            "status": verdict(found),
            "seconds": time.monotonic() - self.began,
        }

    def _phase(self, name: str, args: dict[str, Any], only: Sequence[int] | None = None) -> Phase:
        """Have the members do it, and tell errors; ``only``: ranks whose answers count, the others' are dropped."""
        seconds = min(LIMITS[name], self.deadline - time.monotonic())
        if seconds < 1.0:
            self.findings.append(
                problem("time", "all", "the time limit was reached before the end", "raise --timeout, or give --quick")
            )
            return Phase()
        done = self.meeting.phase(name, args, self.local.works()[name], seconds)
        if only is not None:
            done.results = {rank: result for rank, result in done.results.items() if rank in only}
        for rank, error in done.errors.items():
            if only is None or rank in only:
                what = {"group": "the all-reduce", "matrices": "multiplying matrices"}.get(name, f"the look at {name}")
                self.findings.append(
                    problem(name, self._host(rank), f"{what} failed: {error}", "mend that and examine again")
                )
        return done

    def _host(self, rank: int) -> str:
        return self.names.get(rank, f"process {rank}")

    def _name(self, machines: Mapping[int, dict[str, Any]]) -> None:
        """A name for each host: its own, with its address where two machines share one."""
        taken: dict[str, str] = {}
        for rank, machine in sorted(machines.items()):
            name = machine["host"]
            if taken.setdefault(name, machine["identity"]) != machine["identity"]:
                name = f"{name} ({(machine['route'] or {}).get('address', f'rank {rank}')})"
                taken[name] = machine["identity"]
            machine["host"] = self.names[rank] = name

    @staticmethod
    def _leaders(machines: Mapping[int, Mapping[str, Any]]) -> list[int]:
        """The first process of each host, which speaks for it."""
        first: dict[str, int] = {}
        for rank in sorted(machines):
            first.setdefault(machines[rank]["identity"], rank)
        return sorted(first.values())

    def _shared(self, leaders: Sequence[int]) -> None:
        folder = speed.existing(needs.folders_of(self.options.config, self.options.run_dir)[0][1])
        fresh = self._seen(folder, "fresh", leaders, LOOK_SECONDS)
        self.findings += compare.compare_shared(str(folder), fresh, self._host(leaders[0]))
        self.out["shared"] = {"folder": str(folder), "seconds": fresh}
        if not self.options.quick and None not in fresh.values():
            late = self._seen(folder, "late", leaders, CACHED_SECONDS)
            self.findings += compare.compare_cached(str(folder), late, CACHED_SECONDS)
            self.out["shared"]["seconds"] = late

    def _seen(self, folder: Path, name: str, leaders: Sequence[int], limit: float) -> dict[str, float | None]:
        """Seconds until each other host sees a file of the first, None for never; for ``late`` they look before."""
        file = folder / f".nystrom-doctor-{self.local.token}-{name}"
        args = {"folder": str(folder), "name_of_file": file.name, "text": self.local.token, "look_for": limit}
        try:
            if name == "late":
                self._phase("look", args, leaders)
            done = self._phase("shared", args, leaders)
        finally:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        return {self._host(rank): seconds for rank, seconds in done.results.items() if rank != leaders[0]}

    def _folders(self, leaders: Sequence[int], ratios: Mapping[str, float]) -> None:
        done = self._phase("folders", {}, leaders)
        folders = [{"host": self._host(rank), **each} for rank, found in done.results.items() for each in found]
        self.out["folders"] = folders
        checkpoint, kept, config = None, 1, self.options.config
        if config is not None:
            processes = self.options.processes or len(self.meeting.members)
            read = self._phase("config", {"processes": processes}, leaders).results
            by_host = {self._host(rank): found for rank, found in read.items()}
            checkpoint = max((found["checkpoint"] or 0 for found in by_host.values()), default=0) or None
            kept = config.checkpoint.keep_last
            self.out["run"] = {"name": config.name, "processes": processes, "checkpoint": checkpoint, "hosts": by_host}
            self.findings += needs.check_needs(config, by_host, ratios)
        self.findings += needs.check_folders(folders, checkpoint, kept)

    def _matrices(self, leaders: Sequence[int], machines: Mapping[int, Mapping[str, Any]]) -> None:
        identities = [machines[rank]["identity"] for rank in machines]
        alone = [rank for rank in machines if identities.count(machines[rank]["identity"]) == 1]
        on_gpus = any(checks.has_gpus(machines[rank]) for rank in machines)
        # Processes of one host would share its cores; each has a GPU of its own.
        done = self._phase("matrices", {"alone": alone}, None if on_gpus else leaders)
        devices = [{"host": self._host(rank), **each} for rank, found in sorted(done.results.items()) for each in found]
        self.out["devices"] = devices
        self.findings += compare.compare_devices(devices)
        self.findings += compare.below_peak(devices)

    def _links(self, leaders: Sequence[int], machines: Mapping[int, Mapping[str, Any]]) -> bool:
        """Measure each two hosts; returns whether all can exchange data."""
        addresses = {str(rank): _address(machines[rank], self.local.master) for rank in leaders}
        budget = 0.3 if self.options.quick else 1.0
        hosts = [self._host(rank) for rank in leaders]
        found: list[dict[str, Any]] = []
        every = links.rounds(leaders)
        chosen = links.spread(every, MOST_ROUNDS)
        self.out["pairs_left_out"] = sum(map(len, every)) - sum(map(len, chosen))
        for pairs in chosen:
            here = [pair for pair in pairs if set(pair) <= set(self.meeting.members)]
            args = {"pairs": here, "addresses": addresses, "key": self.local.token, "budget": budget}
            done = self._phase("pair", args)
            for low, high in here:
                measured = done.results.get(high) or {"error": "no answer", "stage": "connect"}
                if "send" in measured and "receive" in measured:
                    measured["speed"] = min(measured["send"], measured["receive"])
                found.append({"a": self._host(low), "b": self._host(high), **measured})
        present = [host for rank, host in zip(leaders, hosts, strict=True) if rank in self.meeting.members]
        self.out["links"] = found
        self.findings += compare.compare_links(present, found)
        self.findings += compare.compare_clocks(hosts, found)
        return not any("error" in link for link in found)

    def _group(self, machines: Mapping[int, Mapping[str, Any]]) -> None:
        interfaces = {
            str(rank): (machine["route"] or {}).get("interface")
            for rank, machine in machines.items()
            if machine["route"] and not is_loopback(machine["route"]["address"])
        }
        budget = 0.5 if self.options.quick else 2.0
        args = {"sizes": list(self.options.sizes), "budget": budget, "interfaces": interfaces}
        done = self._phase("group", args)
        if self.meeting.rank in done.results and not done.errors:
            self.out["group"] = {**done.results[self.meeting.rank], "processes": len(self.meeting.members)}
            members = self.meeting.members
            pairs = [
                {**pair, "a": members[pair["a"]], "b": members[pair["b"]]}
                for found in done.results.values()
                for pair in found["pairs"]
            ]
            self.out["group"]["pairs"] = pairs
            self.findings += compare.slow_processes(pairs, self._host)

    def _missing(self) -> None:
        for lost in self.meeting.lost:
            host = self._host(lost.rank)
            if lost.reason == "absent":
                message = f"process {lost.rank} of {len(self.meeting.members) + len(self.meeting.lost)} did not come"
                remedy = "look at its own output, at MASTER_ADDR and MASTER_PORT there, and at the network"
                if self.local.master is not None and is_loopback(self.local.master):
                    message += f"; MASTER_ADDR is {self.local.master}, at which other hosts meet themselves"
                    remedy = "set MASTER_ADDR to a name or an address of the first host that the others can reach"
                self.findings.append(problem("missing", host, message, remedy))
            else:
                message = f"process {lost.rank} stopped answering (in the phase {lost.phase})"
                self.findings.append(problem("missing", host, message, "look at its own output, and at that host"))


def _address(machine: Mapping[str, Any], master: str | None) -> tuple[str, int]:
    """Where others reach it: at the interface of GLOO_SOCKET_IFNAME, else at that of the way to the first host."""
    chosen = (machine["variables"].get("GLOO_SOCKET_IFNAME") or "").split(",")
    for each in machine["interfaces"]:
        if each["name"] in chosen:
            return each["addresses"][0], machine["port"]
    route = machine["route"]
    # The first host's own way to itself is the loopback, whatever its address is.
    if route is not None and not is_loopback(route["address"]):
        return route["address"], machine["port"]
    return master or "127.0.0.1", machine["port"]
