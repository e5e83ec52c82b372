"""What the doctor makes of one machine: the right level, and what to do, for each thing that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from doctor_case import GIB, gpu, machine

from launch.doctor import needs
from launch.doctor.checks import check_machine
from launch.doctor.findings import Finding, merged, problem, verdict, warning
from pretrain.config import RunConfig

GPUS = {"devices": [gpu(0), gpu(1)], "usable": 2, "cuda": "12.8", "nccl": "2.27.3"}
TWO_WAYS = [
    {"name": "eth0", "addresses": ["10.0.0.0"], "mtu": 1500, "speed": 0, "loopback": False},
    {"name": "ib0", "addresses": ["10.1.0.0"], "mtu": 4092, "speed": 0, "loopback": False},
    {"name": "docker0", "addresses": ["172.17.0.1"], "mtu": 1500, "speed": 0, "loopback": False},
]


def test_nothing_is_wrong_with_a_good_machine() -> None:
    for gpus in ({}, GPUS):
        assert check_machine(machine(gpus=gpus), several=True) == []


@pytest.mark.parametrize(
    ("changes", "level", "check", "said"),
    [
        ({"cpu": {"quota": 2.0}}, "warning", "cores", "allows 2 CPUs of time, and 8 cores are seen"),
        ({"cpu": {"omp_threads": "16"}}, "warning", "cores", "OMP_NUM_THREADS is 16"),
        ({"cpu": {"load": 6.0}}, "warning", "load", "a load of 6.0 on 8 cores"),
        ({"cpu": {"instructions": []}}, "warning", "cpu", "AMD EPYC has no AVX2"),
        ({"memory": {"available": 2 * GIB}}, "warning", "memory", "2.0 GiB of 64.0 GiB"),
        ({"shared_memory": {"size": 64 << 20, "free": 64 << 20}}, "warning", "shm", "64 MiB free of 64 MiB"),
        ({"shared_memory": None}, "warning", "shm", "there is no /dev/shm"),
        (
            {"shared_memory": {"size": 64 << 20, "free": 64 << 20}, "gpus": GPUS},
            "problem",
            "shm",
            "NCCL takes its buffers there",
        ),
        ({"limits": {"open_files": [1024, 4096]}}, "warning", "open files", "may open 1024 files"),
        ({"limits": {"open_files": [128, 128]}}, "problem", "open files", "may open 128 files"),
        ({"limits": {"infiniband": True}}, "problem", "locked memory", "may lock 8.0 MiB"),
        ({"limits": {"core": [None, None]}}, "warning", "core dumps", "of any size into the working directory"),
        ({"gpus": {**GPUS, "error": "No devices"}}, "problem", "gpu", "nvidia-smi fails: No devices"),
        ({"gpus": {**GPUS, "usable": 0}}, "problem", "gpu", "has 2 GPUs, torch (for CUDA 12.8) can use 0"),
        ({"gpus": {**GPUS, "devices": [gpu(ecc_errors=3)]}}, "warning", "gpu", "3 memory errors"),
        (
            {"gpus": {**GPUS, "devices": [gpu(used=9 * GIB, processes=[{"pid": 77, "name": "python"}])]}},
            "problem",
            "gpu in use",
            "GPU 0 is in use by process 77 (python): 9.0 GiB",
        ),
        ({"gpus": {**GPUS, "devices": [gpu(used=9 * GIB)]}}, "warning", "gpu in use", "9.0 GiB in use, by nobody"),
        ({"variables": {"GLOO_SOCKET_IFNAME": "eth7"}}, "problem", "interface", "no interface of this name is up"),
        ({"variables": {"NCCL_SOCKET_IFNAME": "=eth"}}, "problem", "interface", "no interface that is up fits it"),
        ({"busy_port": 29500}, "warning", "port", "port 29500 is in use"),
        (
            {"name": {"addresses": ["127.0.1.1"], "kind": "loopback"}},
            "problem",
            "own name",
            "resolves to 127.0.1.1, which other hosts cannot reach",
        ),
        (
            {"name": {"addresses": ["192.0.2.1"], "kind": "foreign"}},
            "problem",
            "own name",
            "no address of this machine",
        ),
        ({"name": {"addresses": [], "kind": "none"}}, "problem", "own name", "resolves to nothing"),
        (
            {"interfaces": TWO_WAYS, "name": {"addresses": ["10.1.0.0"]}},
            "warning",
            "own name",
            "its own name stands for ib0, and the way to the first host is eth0",
        ),
        ({"interfaces": TWO_WAYS, "gpus": GPUS}, "warning", "interface", "NCCL may take any of eth0, ib0"),
    ],
)
def test_what_is_wrong_is_found_and_nothing_else(changes: dict[str, Any], level: str, check: str, said: str) -> None:
    (found,) = check_machine(machine(**changes), several=True)
    assert (found.level, found.check, found.where) == (level, check, "n0")
    assert said in found.message
    assert found.remedy


def test_on_one_machine_its_name_and_interfaces_do_not_matter() -> None:
    alone = machine(name={"addresses": ["127.0.1.1"], "kind": "loopback"}, interfaces=TWO_WAYS, gpus=GPUS)
    alone["limits"]["open_files"], alone["limits"]["core"] = [1024, 1024], [None, None]
    assert check_machine(alone, several=False) == []


def test_what_is_set_is_taken() -> None:
    named = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "^docker"}
    wrong = machine(name={"addresses": ["127.0.1.1"], "kind": "loopback"}, interfaces=TWO_WAYS, gpus=GPUS)
    assert check_machine({**wrong, "variables": named}, several=True) == []
    assert check_machine({**wrong, "variables": {**named, "NCCL_SOCKET_IFNAME": "eth"}}, several=True) == []


def test_findings_of_several_hosts_become_one_and_problems_come_first() -> None:
    found = [warning("load", f"n{i}", "busy", "wait") for i in range(8)]
    found += [problem("shm", "n1", "small", "more"), found[0]]
    assert merged(found) == [
        Finding("problem", "shm", "n1", "small", "more"),
        Finding("warning", "load", "n0, n1, n2, n3, n4, n5 and 2 more", "busy", "wait"),
    ]
    assert [verdict(found), verdict(found[:8]), verdict([])] == [1, 0, 0]


def folder(**changes: Any) -> dict[str, Any]:
    base = {
        "host": "n0",
        "role": "run",
        "asked": "runs/a",
        "path": "/s/runs",
        "free": 100 * GIB,
        "speed": 5e8,
        "sync": 0,
    }
    return {**base, **changes}


@pytest.mark.parametrize(
    ("changes", "checkpoint", "level", "said"),
    [
        ({"error": "Permission denied"}, None, "problem", "runs/a cannot be written: Permission denied (/s/runs)"),
        ({"error": "Permission denied", "role": "shards"}, None, "problem", "runs/a cannot be read"),
        ({"free": GIB}, 2 * GIB, "problem", "/s/runs has 1.00 GiB free; a checkpoint needs 2."),
        ({"free": 5 * GIB}, 2 * GIB, "warning", "2 checkpoints are kept and one is written, 2.00 GiB each"),
        ({"free": GIB / 2}, None, "warning", "has 0.50 GiB free"),
        ({"speed": 4e6}, 2 * GIB, "warning", "a checkpoint of 2.0 GiB takes 537 s"),
        ({"speed": 4e6}, None, "warning", "takes 4.0 MB/s (with fsync)"),
    ],
)
def test_folders(changes: dict[str, Any], checkpoint: int | None, level: str, said: str) -> None:
    (found,) = needs.check_folders([folder(**changes)], checkpoint, 2)
    assert found.level == level
    assert said in found.message


def test_good_folders() -> None:
    good = [folder(), folder(role="shards", speed=1e6), folder(free=None)]
    assert list(needs.check_folders(good, 2 * GIB, 2)) == []


def run_config(**changes: Any) -> RunConfig:
    from training_case import settings

    return RunConfig.model_validate(settings(Path("corpus"), Path("runs"), **changes))


def test_what_hosts_say_of_the_run() -> None:
    seen = {"n0": {"errors": [], "fingerprint": "a"}, "n1": {"errors": ["no shards in x"], "fingerprint": None}}
    seen["n2"] = {"errors": [], "fingerprint": "b"}
    found = list(needs.check_needs(run_config(precision="bf16", zero_stage=2), seen, {"n0": 0.3, "n1": 2.0}))
    assert [(each.level, each.where) for each in found] == [("problem", "n1"), ("problem", "n2"), ("warning", "n0")]
    assert found[0].message == "no shards in x"
    assert "its shards are others than those of the first host" in found[1].message
    assert "precision is bf16, which its processor multiplies at 0.3 of float32's speed" in found[2].message
    assert list(needs.check_needs(run_config(), {"n0": seen["n0"]}, {"n0": 0.3})) == []


def test_the_folders_of_a_run() -> None:
    config = run_config(data={"valid": "corpus/valid"})
    assert needs.folders_of(config, None) == [
        ("run", Path("runs/run")),
        ("shards", Path("corpus/train")),
        ("shards", Path("corpus/valid")),
    ]
    assert needs.folders_of(config, Path("x"))[0] == ("run", Path("x"))
    assert needs.folders_of(None, None) == [("run", Path.cwd())]


def test_needs_of_shards_that_are_not_there(tmp_path: Path) -> None:
    config = run_config(data={"train": str(tmp_path / "none")}, model={"vocab_size": 300})
    said = needs.read_needs(config, 1)
    assert len(said["errors"]) == 1
    assert str(tmp_path / "none") in said["errors"][0]
    assert said["checkpoint"] > 10_000  # 4 bytes of weights and 8 of state for some thousand parameters
    (error,) = needs.read_needs(config, 3)["errors"]
    assert "3 processes cannot share evenly" in error
