"""What the doctor measures itself with: parsers, sockets, clocks, folders, and the meeting of its processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import UserError
from launch.doctor import gpus, links, machine, speed
from launch.doctor import meeting as meeting_module
from launch.doctor.meeting import Lost, Meeting
from pretrain.distributed.world import Rank

SMI = """0, GPU-a1, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 524, 0
1, GPU-b2, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 20991, [N/A]
"""


def test_nvidia_smi_is_read() -> None:
    first, second = gpus.parse_devices(SMI)
    assert (first["index"], first["driver"], first["memory"], first["ecc_errors"]) == (0, "550.54.15", 81559 << 20, 0)
    assert (second["uuid"], second["used"], second["ecc_errors"]) == ("GPU-b2", 20991 << 20, None)
    assert gpus.parse_processes("GPU-b2, 4711, /usr/bin/python3, 20456\nGPU-b2, 12, [Not Found], [N/A]\n") == [
        {"uuid": "GPU-b2", "pid": 4711, "name": "/usr/bin/python3", "memory": 20456 << 20},
        {"uuid": "GPU-b2", "pid": 12, "name": "[Not Found]", "memory": None},
    ]
    assert gpus.parse_processes("") == []
    with pytest.raises(ValueError, match="nvidia-smi answered 'Unable to talk'"):
        gpus.parse_devices("Unable to talk\n")


def test_visible_devices() -> None:
    devices = gpus.parse_devices(SMI)
    assert [each["index"] for each in gpus.visible(devices, None)] == [0, 1]
    assert [each["index"] for each in gpus.visible(devices, "1")] == [1]
    assert [each["index"] for each in gpus.visible(devices, "GPU-a1")] == [0]
    assert gpus.visible(devices, "") == []


def test_a_driver_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpus.find_gpus()["error"] == "NVIDIA-SMI has failed"


def test_limits_of_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/slurm/job\n")
    job = tmp_path / "root/slurm/job"
    job.mkdir(parents=True)
    root = tmp_path / "root"
    assert machine.cpu_quota(root, own) is None
    (job / "cpu.max").write_text("max 100000\n")
    (job / "memory.max").write_text("max\n")
    assert (machine.cpu_quota(root, own), machine.memory_limit(root, own)) == (None, None)
    (root / "slurm/cpu.max").write_text("250000 100000\n")
    (root / "slurm/memory.max").write_text(f"{1 << 20}\n")
    assert (machine.cpu_quota(root, own), machine.memory_limit(root, own)) == (2.5, 1 << 20)
    (root / "cpu").mkdir()  # version 1
    (root / "cpu/cpu.cfs_quota_us").write_text("50000\n")
    (root / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpu_quota(root, own) == 0.5


def test_names_and_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.resolve_own_name("localhost")["kind"] == "loopback"
    assert machine.resolve_own_name("no.such.host.invalid")["kind"] == "none"
    assert machine.resolve_own_name("192.0.2.7")["kind"] == "foreign"  # an address of documentation
    way = machine.route_to("127.0.0.1")
    assert way == {"interface": "lo", "address": "127.0.0.1", "to": "127.0.0.1"}
    assert machine.route_to("no.such.host.invalid") is None


def test_a_port_in_use() -> None:
    with links.listen() as listening:
        port = listening.getsockname()[1]
        assert machine.busy_port(port) == port
    assert machine.busy_port(port) is None


@pytest.mark.parametrize("number", [2, 3, 4, 7, 8])
def test_each_two_hosts_meet_once_and_nobody_twice_in_a_round(number: int) -> None:
    hosts = list(range(10, 10 + number))
    found = links.rounds(hosts)
    assert sorted(pair for pairs in found for pair in pairs) == [(a, b) for a in hosts for b in hosts if a < b]
    for pairs in found:
        assert len({host for pair in pairs for host in pair}) == 2 * len(pairs)
    assert len(found) <= number
    assert links.rounds([3]) == []


def test_of_many_hosts_each_meets_some() -> None:
    every = links.rounds(range(64))
    chosen = links.spread(every, 15)
    assert [len(pairs) for pairs in chosen] == 15 * [32]
    assert len({pair for pairs in chosen for pair in pairs}) == 15 * 32
    assert links.spread(every[:15], 15) == every[:15]


@pytest.fixture
def pair() -> Iterator[Any]:
    """Measure over the loopback: ``pair(answer's key)`` returns what both sides say."""
    with links.listen() as listening:

        def both(theirs: str = "key", budget: float = 0.02, seconds: float = 10.0) -> Any:
            said: dict[str, Any] = {}
            thread = threading.Thread(target=lambda: said.update(links.answer(listening, theirs, seconds)))
            thread.start()
            found = links.measure("127.0.0.1", listening.getsockname()[1], "key", budget)
            thread.join()
            return found, said

        yield both


def test_a_pair_is_measured(pair: Any) -> None:
    found, said = pair()
    assert said == {}
    assert 0 < found["round_trip"] <= found["round_trip_median"] < 1
    assert found["send"] > 1e6
    assert found["receive"] > 1e6
    assert abs(found["offset"]) <= found["offset_error"] + 1e-3  # one clock


def test_a_stranger_does_not_count(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "STEP_SECONDS", 0.3)
    found, said = pair("yek", seconds=0.7)
    assert found["stage"] == "ping"
    assert said == {"error": "nobody connected"}


def test_nobody_listens() -> None:
    with links.listen() as listening:
        port = listening.getsockname()[1]
    found = links.measure("127.0.0.1", port, "key", 0.1)
    assert found == {"error": "Connection refused", "stage": "connect"}


def test_the_offset_of_a_clock(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's clock is 100 s ahead; half the shortest round trip is the limit of the error."""
    pack = links._CLOCK.pack

    class Ahead:
        size = links._CLOCK.size
        unpack = links._CLOCK.unpack

        @staticmethod
        def pack(now: float) -> bytes:
            return pack(now + 100.0)

    monkeypatch.setattr(links, "_CLOCK", Ahead)
    found, _ = pair()
    assert abs(found["offset"] - 100.0) <= found["offset_error"] + 1e-3
    assert found["offset_error"] == found["round_trip"] / 2


def test_the_fastest_of_three_transfers_counts_where_time_is_over() -> None:
    def transfers() -> Iterator[tuple[int, float]]:
        for seconds in (0.003, 0.001, 0.002, 0.0001):
            time.sleep(0.006)
            yield 100, seconds

    assert links._fastest(transfers(), budget=0.01) == 100 / 0.001
    assert links._fastest(iter([(100, 2.0), (100, 0.1)]), budget=0.0) == 50.0  # not another one of 2 s


def test_folders_are_measured_and_left_as_they_were(tmp_path: Path) -> None:
    found = speed.write_speed(tmp_path / "not/there", quick=True)
    assert found["path"] == str(tmp_path)
    assert found["speed"] > 1e5
    assert list(tmp_path.iterdir()) == []
    assert speed.read_speed(tmp_path, quick=True)["error"] == "there is no file in it"
    (tmp_path / "a").write_bytes(b"x" * 1000)
    assert speed.read_speed(tmp_path, quick=True)["speed"] > 1e3
    assert speed.write_speed(Path("/proc"), quick=True)["error"]


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have processes meet, as threads here: ``meet(size, first, {rank: works})`` returns what each ended with."""
    from launch.watch import free_port

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))

    def run(size: int, first: Any, others: dict[int, Any], patience: float = 20.0) -> dict[int, Any]:
        ended: dict[int, Any] = {}

        def other(rank: int) -> None:
            try:
                ended[rank] = Meeting(Rank(rank, size), patience, f"n{rank}").serve(others[rank], time.monotonic() + 20)
            except UserError as error:
                ended[rank] = str(error)

        threads = [threading.Thread(target=other, args=(rank,), daemon=True) for rank in others]
        for thread in threads:
            thread.start()
        ended[0] = first(Meeting(Rank(0, size), patience, "n0"))
        for thread in threads:
            thread.join(20)
        return ended

    return run


def test_phases_bring_results_and_errors(meet: Any) -> None:
    def fail(call: dict[str, Any]) -> None:
        raise UserError("no disk")

    def first(meeting: Meeting) -> Any:
        done = meeting.phase("double", {"x": 4}, lambda call: 2 * call["x"], 10)
        meeting.end(1)
        return done.results, done.errors, meeting.lost

    ended = meet(3, first, {1: {"double": lambda call: 20 * call["x"]}, 2: {"double": fail}})
    assert ended == {0: ({0: 8, 1: 80}, {2: "no disk"}, []), 1: 1, 2: 1}


def test_who_does_not_come_is_left_out_and_a_part_that_hangs_is_an_error(meet: Any) -> None:
    hang = threading.Event()

    def first(meeting: Meeting) -> Any:
        hung = meeting.phase("work", {}, lambda call: hang.wait(9), 0.2)
        done = meeting.phase("again", {}, lambda call: 1, 5)
        meeting.end(0)
        return hung.errors, done.results, meeting.lost, meeting.members

    ended = meet(3, first, {1: {"work": lambda call: 1, "again": lambda call: 2}}, patience=0.7)
    hang.set()
    assert ended[0] == ({0: "did not end within 0.2 s"}, {0: 1, 1: 2}, [Lost(2, "start", "absent")], [0, 1])
    assert ended[1] == 0


def test_a_process_that_dies_in_a_phase(meet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "GRACE_SECONDS", 0.2)

    def first(meeting: Meeting) -> Any:
        meeting.phase("work", {}, lambda call: 1, 0.1)
        done = meeting.phase("work", {}, lambda call: 1, 5)
        meeting.end(0)
        return done.results, meeting.lost

    class Dies(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            raise UserError("killed")

    ended = meet(2, first, {1: Dies()})
    assert ended == {0: ({0: 1}, [Lost(1, "work", "silent")]), 1: "killed"}


def test_processes_that_contradict_each_other(meet: Any) -> None:
    class Impostors(dict[str, Any]):
        """Others that come while process 1 is there."""

        def __getitem__(self, name: str) -> Any:
            with pytest.raises(UserError, match=r"n1 was started with WORLD_SIZE 3, and n[01] with WORLD_SIZE 2"):
                Meeting(Rank(1, 3), 5.0, "n1")
            with pytest.raises(UserError, match="two processes have RANK 1: on n1 and n2"):
                Meeting(Rank(1, 2), 5.0, "n2")
            return lambda call: "refused"

    def calls(meeting: Meeting) -> Any:
        done = meeting.phase("impostors", {}, lambda call: "", 10)
        meeting.end(0)
        return done.results

    assert meet(2, calls, {1: Impostors()}) == {0: {0: "", 1: "refused"}, 1: 0}
