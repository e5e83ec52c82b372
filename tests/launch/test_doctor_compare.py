"""What the doctor makes of hosts beside each other: who differs, and whose link or device is slow."""

from __future__ import annotations

from typing import Any

import pytest
from doctor_case import gpu, link, links, machine

from launch.doctor import compare

NAMES = ["n0", "n1", "n2", "n3"]
SLOW_TRIP = {"round_trip": 0.0401}
SLOW_RATE = {"speed": 2.5e6}
H100 = "NVIDIA H100 80GB HBM3"


def test_alike_hosts() -> None:
    hosts = [machine(name) for name in NAMES]
    assert list(compare.compare_software(hosts)) == []
    assert list(compare.compare_hardware(hosts)) == []
    assert compare.compare_links(NAMES, links(NAMES)) == []
    assert list(compare.compare_clocks(NAMES, links(NAMES))) == []


def test_the_host_with_other_software_is_named_also_if_it_is_the_first() -> None:
    odd = machine("n0", software={"package torch": "2.12.0", "code": "xyz"})
    found = list(compare.compare_software([odd, machine("n1"), machine("n2")]))
    assert [(each.level, each.where) for each in found] == [("problem", "n0")]
    assert 'package torch is "2.12.0" instead of "2.13.0"; code is "xyz" instead of "abc"' in found[0].message
    other = machine("n2", also={"transformers": "5.0"})
    assert [each.level for each in compare.compare_software([machine("n0"), machine("n1"), other])] == ["warning"]


def test_packages_that_one_host_lacks_or_has_besides() -> None:
    lacks = machine("n2", software={"package torch": None})
    (found,) = compare.compare_software([machine("n0"), machine("n1"), lacks])
    assert 'package torch is null instead of "2.13.0"' in found.message


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({"gpus": {"devices": [gpu(0)]}}, "problem", "GPUs: 1, the other hosts have 2"),
        ({"gpus": {"devices": [gpu(0), gpu(1, driver="535.1")]}}, "warning", "GPU driver: 535.1, 550.54"),
        ({"gpus": {"devices": [gpu(0), gpu(1, name="NVIDIA L4")]}}, "warning", f"kind of GPU: {H100}, NVIDIA L4"),
        ({"gpus": {"nccl": "2.20.5"}}, "problem", "NCCL: 2.20.5, the other hosts have 2.27.3"),
        ({"cpu": {"model": "Intel Xeon"}}, "warning", "processor: Intel Xeon"),
        (
            {"interfaces": [{"name": "eth0", "addresses": ["10.0.0.2"], "mtu": 9000, "speed": 0, "loopback": False}]},
            "warning",
            "MTU: 9000, the other hosts have 1500",
        ),
    ],
)
def test_other_hardware(changes: dict[str, Any], level: str, said: str) -> None:
    gpus = {"devices": [gpu(0), gpu(1)], "usable": 2, "cuda": "12.8", "nccl": "2.27.3"}
    changes = {**changes, "gpus": {**gpus, **changes.get("gpus", {})}}
    hosts = [machine("n0", gpus=gpus), machine("n1", gpus=gpus), machine("n2", **changes)]
    (found,) = compare.compare_hardware(hosts)
    assert (found.level, found.where) == (level, "n2")
    assert said in found.message


@pytest.mark.parametrize("straggler", ["n0", "n1", "n2"])
def test_the_host_whose_every_link_is_slow_is_named_and_no_other(straggler: str) -> None:
    hosts = NAMES[:3]
    (found,) = compare.compare_links(hosts, links(hosts, **{straggler: SLOW_TRIP}))
    assert (found.level, found.where) == ("problem", straggler)
    assert "round trips take at least 40.1 ms to any other host, usual is 0.1 ms" in found.message
    (found,) = compare.compare_links(hosts, links(hosts, **{straggler: SLOW_RATE}))
    assert (found.level, found.where) == ("problem", straggler)
    assert "at most 2.5 MB/s to any other host, usual is 1e+03 MB/s" in found.message


def test_two_slow_hosts_of_four_are_both_named() -> None:
    found = compare.compare_links(NAMES, links(NAMES, n1=SLOW_TRIP, n3=SLOW_TRIP))
    assert [(each.level, each.where) for each in found] == [("problem", "n1"), ("problem", "n3")]


def test_a_single_slow_way_is_a_warning_about_the_pair() -> None:
    (found,) = compare.compare_links(NAMES, links(NAMES, n0_n2=SLOW_RATE))
    assert (found.level, found.where) == ("warning", "n0, n2")
    assert "the way between n0 and n2 is slow, their other ways are not: 2.5 MB/s" in found.message


def test_what_is_not_slow() -> None:
    # A busy core: some tenths of a millisecond. Two racks: a third less.
    assert compare.compare_links(NAMES, links(NAMES, n1={"round_trip": 9e-4}, n2={"speed": 6e8})) == []
    assert compare.compare_links(NAMES[:2], [link("n0", "n1", speed=1e6)]) == []  # beside what?


def test_hosts_far_apart() -> None:
    (found,) = compare.compare_links(NAMES[:2], [link("n0", "n1", round_trip=0.02)])
    assert (found.level, found.where) == ("warning", "n0, n1")
    assert "a round trip takes 20 ms at best" in found.message


def test_a_host_that_nobody_reaches_is_named_once() -> None:
    dead = {"error": "timed out", "stage": "connect"}
    (found,) = compare.compare_links(NAMES, links(NAMES, n2=dead))
    assert (found.level, found.where) == ("problem", "n2")
    assert "no other host can exchange data with it (timed out)" in found.message


def test_a_pair_that_cannot_connect_and_one_that_loses_large_packets() -> None:
    (found,) = compare.compare_links(NAMES, links(NAMES, n1_n3={"error": "timed out", "stage": "connect"}))
    assert found.where == "n1, n3"
    assert "n3 cannot exchange data with n1 at 10.0.0.1 (timed out)" in found.message
    assert "a firewall?" in found.remedy
    (found,) = compare.compare_links(NAMES, links(NAMES, n1_n3={"error": "timed out", "stage": "send"}))
    assert "n3 pings n1, but larger amounts do not arrive" in found.message
    assert "MTU" in found.remedy


def test_clocks_are_judged_by_what_is_certain() -> None:
    # The connecting host b finds a's clock behind its own: b is ahead.
    slow = links(NAMES[:3], n0_n1={"offset": -5.0, "offset_error": 0.01}, n0_n2={"offset": 90.0, "offset_error": 0.1})
    found = list(compare.compare_clocks(NAMES[:3], slow))
    assert [(each.level, each.where) for each in found] == [("warning", "n1"), ("problem", "n2")]
    assert "its clock is 5.0 s ahead of n0's" in found[0].message
    assert "its clock is 90.0 s behind n0's" in found[1].message
    uncertain = [link("n0", "n1", offset=1.5, offset_error=0.6)]
    assert list(compare.compare_clocks(NAMES[:2], uncertain)) == []


def test_a_folder_that_is_not_shared_or_late() -> None:
    (found,) = compare.compare_shared("/s", {"n1": 0.1, "n2": None, "n3": 4.0}, "n0")
    assert (found.level, found.where) == ("problem", "n2")
    assert "a file that n0 wrote into /s is not there" in found.message
    late = list(compare.compare_cached("/s", {"n1": 0.1, "n2": None, "n3": 7.0}, 40.0))
    assert [(each.level, each.where) for each in late] == [("warning", "n2"), ("warning", "n3")]
    assert "looked for before, was seen not within 40 s" in late[0].message
    assert "was seen after 7.0 s" in late[1].message


def device(host: str, speed: float, name: str = "gpu 0", kind: str = H100) -> dict[str, Any]:
    return {"host": host, "device": name, "kind": kind, "speeds": {"fp32": 4e13, "bf16": speed}}


def test_a_device_below_its_kind_is_named() -> None:
    devices = [device("n0", 7e14), device("n1", 7.1e14), device("n2", 4.9e14), device("n3", 1e14, kind="NVIDIA L4")]
    (found,) = compare.compare_devices(devices)
    assert (found.level, found.where) == ("problem", "n2")
    assert "its gpu 0 is slow: 0.7 in bf16 of the median of 3 of its kind" in found.message
    (found,) = compare.compare_devices([device("n0", 4e10, "cpu", "EPYC"), device("n1", 8e10, "cpu", "EPYC")])
    assert (found.level, found.where) == ("warning", "n0")
    assert list(compare.compare_devices([device("n0", 7e14), device("n1", 6e14)])) == []


def test_a_gpu_far_below_its_data_sheet() -> None:
    (found,) = compare.below_peak([device("n0", 3e14), device("n1", 6e14), device("n2", 1e10, "cpu", "EPYC")])
    assert found.where == "n0"
    assert "its gpu 0 (NVIDIA H100 80GB HBM3) reaches 300 TFLOP/s of 989" in found.message


def test_a_process_that_is_slow_through_nccl() -> None:
    pairs = [{"a": a, "b": b, "speed": 4e8 if 2 in (a, b) else 4e10} for a in range(4) for b in range(a + 1, 4)]
    (found,) = compare.slow_processes(pairs, lambda rank: f"n{rank}")
    assert (found.level, found.where) == ("problem", "n2")
    assert "process 2 exchanges 0.40 GB/s through NCCL at most, usual is 40.00" in found.message
    assert compare.slow_processes(pairs[:1], str) == []


def test_bf16_that_one_host_lacks() -> None:
    hosts = [machine("n0"), machine("n1")]
    (found,) = compare.compare_bf16(hosts, {"n0": 1.9, "n1": 0.3})
    assert (found.level, found.where) == ("warning", "n1")
    assert list(compare.compare_bf16(hosts, {"n0": 0.3, "n1": 0.3})) == []
