"""The doctor at work: alone, as ranks of a launcher, and on hosts of which one has a slow link or does not answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from namespace_case import Cluster, hosts
from processes_case import REPOSITORY
from ranks import run_ranks, values
from training_case import settings, write_config, write_corpus

from launch.cli import main
from launch.doctor import speed

SIZES = [4 << 10, 256 << 10]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def problems(report: dict[str, Any]) -> list[dict[str, str]]:
    return [each for each in report["findings"] if each["level"] == "problem"]


@pytest.mark.slow
def test_alone_with_a_run(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(
        tmp_path / "run.yaml", settings(corpus, tmp_path / "runs", data={"valid": str(corpus / "valid")})
    )
    words = ["doctor", "--quick", "--config", config, "--json", str(tmp_path / "report.json")]
    status = main(words)
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert (status, problems(report)) == (0, []), said
    assert said.splitlines()[0].startswith("0 problems, ")
    (machine,) = report["machines"]
    assert machine["cpu"]["cores"] == os.cpu_count()
    (device, *_) = report["devices"]
    assert device["speeds"]["fp32"] > 1e7
    assert device["speeds"]["bf16"] > 1e5
    assert [(each["role"], each["speed"] > 1e4) for each in report["folders"]] == [("run", True)] + 2 * [
        ("shards", True)
    ]
    assert report["run"]["name"] == "run"
    assert 10_000 < report["run"]["checkpoint"] < 10_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "run.yaml"]  # nothing is left behind
    # The same without its held-out text.
    shutil.move(corpus / "train", tmp_path / "moved")
    try:
        assert main(words) == 1
    finally:
        shutil.move(tmp_path / "moved", corpus / "train")
    assert f"PROBLEM  {machine['host']}: " in (said := capsys.readouterr().out)
    assert str(corpus / "train") in said.replace("\n         ", "")


def environment() -> dict[str, str]:
    """This process's, for commands of this repository anywhere."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))}


def doctor(variables: dict[str, str], words: list[str]) -> None:
    """This process's part; it ends itself with the status."""
    os.environ.update(variables)
    for name in [name for name, value in variables.items() if not value]:
        del os.environ[name]
    main(["doctor", "--quick", *words])


@pytest.mark.slow
def test_as_ranks_of_torchrun(tmp_path: Path) -> None:
    """The first one prints and writes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "launch", "doctor"]
    command += ["--quick", "--json", str(tmp_path / "report.json"), "--sizes", "4K,256K"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": a run may start  (1 host examined in ") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert (len(report["machines"]), len(report["devices"])) == (1, 1)
    assert (report["group"]["backend"], report["group"]["processes"]) == ("gloo", 2)
    assert [each["bytes"] for each in report["group"]["all_reduce"]] == SIZES
    for each in report["group"]["all_reduce"]:
        assert each["bus"] == pytest.approx(each["bytes"] / each["seconds"])  # 2 (n - 1) / n is 1 for two


@pytest.mark.slow
def test_on_the_nodes_of_a_slurm_allocation(tmp_path: Path) -> None:
    """Both nodes are this machine, so it is one host, which the tasks find out."""
    slurm_case = pytest.importorskip("slurm_case")
    (tmp_path / "slurm").mkdir()
    with slurm_case.slurm(tmp_path / "slurm") as cluster:
        words = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "launch", "doctor"]
        words += ["--in-allocation", "--quick", "--json", tmp_path / "report.json", "--sizes", "4K,256K"]
        done = cluster.call(*words, PYTHONPATH=environment()["PYTHONPATH"])
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [each["host"] for each in report["machines"]] == ["n0"]
    assert report["group"]["processes"] == 2


@pytest.mark.slow
def test_a_rank_that_does_not_come_and_tasks_of_slurm(tmp_path: Path) -> None:
    words = ["--json", str(tmp_path / "report.json"), "--patience", "1.5"]
    (end,) = run_ranks(doctor, 1, variables={"WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, words=words)
    assert end.code == 1, end.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert [each["check"] for each in problems(report)] == ["missing"]
    assert "PROBLEM  process 1: process 1 of 2 did not come; MASTER_ADDR is 127.0.0.1" in end.output

    unset = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"), "")
    task = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    task["SLURM_STEP_NODELIST"] = "127.0.0.1,n1"
    (end,) = run_ranks(doctor, 1, variables={**unset, **task}, words=[*words, "--in-allocation"])
    assert end.code == 1, end.output
    assert "PROBLEM  n1: process 1 of 2 did not come" in end.output


def exchange(pairs: list[list[list[int]]]) -> Any:
    """All-reduce and pairs among the ranks, through gloo as through NCCL."""
    from datetime import timedelta

    import torch.distributed as dist

    from launch.doctor.collectives import Group

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=timedelta(seconds=60), wait_for_workers=False)
    group = Group(store, rank, size, 0, "lo", 60.0)
    found = [group.all_reduce([1 << 12, 1 << 16], 0.05), group.pairs(pairs)]
    group.close()
    store.add("done", 1)
    while rank == 0 and store.add("done", 0) < size:
        pass
    return found


@pytest.mark.slow
def test_pairs_within_a_process_group() -> None:
    every = [[[0, 1]], [[0, 2]], [[1, 2]]]
    sums, pairs = zip(*values(run_ranks(exchange, 3, pairs=every)), strict=True)
    assert sums[0] == sums[1] == sums[2]  # the slowest one's time, agreed on
    assert [[(each["a"], each["b"]) for each in found] for found in pairs] == [[(0, 1), (0, 2)], [(1, 2)], []]
    assert all(each["speed"] > 1e6 for found in pairs for each in found)


@pytest.mark.gpu
def test_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    (found,) = speed.matrix_speeds([0], quick=True)
    assert found["kind"] == torch.cuda.get_device_name(0)
    assert set(found["speeds"]) == {"fp32", "tf32", "bf16", "fp16"}
    assert found["speeds"]["bf16"] > found["speeds"]["fp32"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with hosts(3, tmp_path_factory.mktemp("doctor") / "cluster") as made:
        yield made


def examine(cluster: Cluster, report: Path, *words: str) -> tuple[int, str, dict[str, Any]]:
    ssh_args = f"{cluster.ssh_args} -o ConnectTimeout=3"
    command = [sys.executable, "-m", "launch", "doctor", "--hostfile", cluster.hostfile, "--ssh-args", ssh_args]
    command += ["--quick", "--sizes", "4K,256K", "--json", str(report), *words]
    status, said = cluster.run(command, timeout=240, cwd=report.parent, env=environment())
    assert report.exists(), said
    return status, said, json.loads(report.read_text())


@pytest.mark.slow
def test_the_host_with_a_slow_link_and_the_one_with_other_code_are_named(cluster: Cluster, tmp_path: Path) -> None:
    cluster.slow("n1", "20mbit")
    module = REPOSITORY / "pretrain" / "checks.py"
    other = tmp_path / "checks.py"
    other.write_text(module.read_text() + "\n# changed\n")
    with cluster.covered("n2", module, other):
        status, said, report = examine(cluster, tmp_path / "report.json", "--env", "GLOO_SOCKET_IFNAME=eth0")
    assert status == 1
    found = [(each["check"], each["where"]) for each in problems(report)]
    assert found == [("versions", "n2"), ("network", "n1")], said
    assert "n2: it has other software than the other hosts: code is " in said
    assert "n1: its link is slow: at most " in said
    speeds = {(each["a"], each["b"]): each["speed"] for each in report["links"]}
    assert speeds.keys() == {("n0", "n1"), ("n0", "n2"), ("n1", "n2")}
    # 20 Mbit/s are 2.5 MB/s, but the first 64 KiB of 256 pass at once.
    assert max(speeds["n0", "n1"], speeds["n1", "n2"]) < 4e6 < speeds["n0", "n2"]
    assert all(abs(each["offset"]) < 1.0 for each in report["links"])  # one clock
    assert [each["bytes"] for each in report["group"]["all_reduce"]] == SIZES
    # A ring of three sends 4/3 of the bytes over each link, the slow one too.
    assert report["group"]["all_reduce"][1]["seconds"] > (4 / 3 * SIZES[1] - (64 << 10)) / 2.6e6


@pytest.mark.slow
def test_the_host_with_a_long_way_is_named(cluster: Cluster, tmp_path: Path) -> None:
    cluster.delay("n2", "40ms")
    _, said, report = examine(cluster, tmp_path / "report.json", "--env", "GLOO_SOCKET_IFNAME=eth0")
    assert "n2: its link is slow: round trips take at least " in said.replace("\n         ", " ")
    assert "n2" in [each["where"] for each in problems(report)]


@pytest.mark.slow
def test_a_host_without_an_answer_and_a_folder_of_each_host_alone(cluster: Cluster, tmp_path: Path) -> None:
    """The others are examined; each finds its own name at 127.0.1.1, and ``/run`` is not shared."""
    cluster.kill("n2")
    status, said, report = examine(cluster, tmp_path / "report.json", "--run-dir", "/run/of/this/host")
    assert status == 1
    found = {(each["check"], each["where"]): each["message"] for each in problems(report)}
    assert found.keys() >= {("host", "n2"), ("own name", "n0, n1"), ("shared folder", "n1")}, said
    assert "it cannot be reached over ssh: it does not answer" in found["host", "n2"]
    assert "its own name resolves to 127.0.1.1, which other hosts cannot reach" in found["own name", "n0, n1"]
    assert found["shared folder", "n1"] == "a file that n0 wrote into /run is not there"
    assert [each["host"] for each in report["machines"]] == ["n0", "n1"]
    assert report["group"]["processes"] == 2  # measured nevertheless, over the way to the first host
