"""What is judged of hosts before a start, from reports that are made up."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_case import settings, write_config

from data_pipeline.errors import UserError
from launch import host_checks, host_report, network
from launch.host_checks import Checked, check_hosts, judge, master_address, refuse
from launch.hosts import SSH_FAILED, TIMED_OUT, Host, Outcome
from launch.plan import LaunchPlan

GOOD: dict[str, Any] = {
    "host": "n0",
    "machine": "0",
    "software": {"python": "3.11.7", "package torch": "2.13.0", "code": "abc"},
    "clock": 1000.0,
    "paths": {"/data": "folder 1", "/run.yaml": "file 2"},
    "token": "t",
    "writable": True,
    "free_bytes": 10**12,
    "gpus": [],
    "launches": [],
    "connection": "10.0.0.1 50000 10.0.0.10 22",
    "interfaces": {"lo": ["127.0.0.1"], "eth0": ["10.0.0.10"], "ib0": ["fe80::1%ib0", "10.1.0.10"]},
    "ports": [4000, 4001],
}


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    (tmp_path / "train").mkdir()
    config = write_config(tmp_path / "run.yaml", settings(tmp_path, tmp_path / "runs"))
    run_dir = tmp_path / "runs" / "run"
    return LaunchPlan("run", ("--config", config), run_dir, tmp_path, nodes=2, processes=2, max_nodes=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        (
            {"software": {**GOOD["software"], "package torch": "2.4.0", "python": "3.12.1"}},
            "python is 3.12.1 instead of 3.11.7; package torch is 2.4.0 instead of 2.13.0: install the same",
        ),
        ({"paths": {**GOOD["paths"], "/data": "nothing"}}, "it does not see /data: mount the file system"),
        ({"paths": {**GOOD["paths"], "/data": "folder 9"}}, "/data is not the one that is here"),
        ({"paths": {**GOOD["paths"], "/data": "unreadable: Permission denied"}}, "/data is unreadable: Permission"),
        ({"token": None}, "is not the folder that is here: a run folder is on a file system that all see"),
        ({"token": "another"}, "is not the folder that is here"),
        ({"writable": False}, "cannot be written there"),
        ({"clock": 940.0}, "its clock is 50 s slow"),
        ({"clock": 1100.0}, "its clock is 90 s fast"),
        ({"clock": 986.0}, None),
        ({"free_bytes": 3 * 2**20}, "3 MiB are free in"),
        ({"free_bytes": None}, None),
        ({"gpus": [0]}, "2 processes, but 1 GPU: correct its slots"),
        ({"gpus": [0, 400]}, None),
        ({"gpus": [0, 70_000, 70_000]}, r"in use already: GPU 1 \(70000 MiB\): end what uses them"),
        ({"launches": ["x"]}, "processes of an earlier start of this run are still there"),
    ],
)
def test_each_fault_of_a_host_is_told(plan: LaunchPlan, change: dict[str, Any], said: str | None) -> None:
    found = judge({**GOOD, **change}, GOOD, "t", plan, began=990.0, ended=1010.0)
    if said is None:
        assert found == []
    else:
        (problem,) = found
        assert re.search(said, problem)


def test_only_the_gpus_that_will_be_used_must_be_idle(plan: LaunchPlan) -> None:
    plan = replace(plan, environment={"CUDA_VISIBLE_DEVICES": "2,3"})
    busy = {**GOOD, "gpus": [9000, 9000, 0, 0]}
    assert judge(busy, GOOD, "t", plan, 1000, 1000) == []
    busy = {**GOOD, "gpus": [0, 0, 0, 9000]}
    assert "GPU 3 (9000 MiB)" in judge(busy, GOOD, "t", plan, 1000, 1000)[0]


def test_the_address_is_one_by_which_others_reach_the_first_host() -> None:
    here = {"machine": "login"}
    others = {"n1": {**GOOD, "machine": "1", "connection": "10.0.0.10 50001 10.0.0.11 22"}}
    assert master_address("n0", {"n0": GOOD, **others}, here, None) == "10.0.0.10"
    assert master_address("n0", {"n0": GOOD, **others}, here, "ib0") == "10.1.0.10"
    # The first host launches: Debian maps its own name to 127.0.1.1, so that is where ssh went.
    own = {**GOOD, "connection": "127.0.0.1 50000 127.0.1.1 22"}
    assert master_address("n0", {"n0": own, **others}, {"machine": "0"}, None) == "10.0.0.10"
    assert master_address("n0", {"n0": own}, {"machine": "0"}, None) == "127.0.1.1"  # alone it will do
    # Elsewhere nobody knows another address.
    assert master_address("n0", {"n0": own, **others}, here, None) is None
    mapped = {**GOOD, "connection": "::ffff:10.0.0.1 50000 ::ffff:10.0.0.10 22"}
    assert master_address("n0", {"n0": mapped, **others}, here, None) == "10.0.0.10"


# --- all together, with hosts that answer what they are told to ------------------------------------------------------


class Hosts:
    """Plays :func:`launch.hosts.run_on`: each host reports what this machine would, but for its ``changes``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: Sequence[str]) -> None:
        self.hosts = [Host(name, 2) for name in names]
        self.changes: dict[str, dict[str, Any]] = {name: {} for name in names}
        self.outcomes: dict[str, Outcome] = {}
        self.meetings: dict[str, str | None] = {}
        self.asked: list[dict[str, Any]] = []
        monkeypatch.setattr(host_checks, "run_on", self.run_on)

    def run_on(self, hosts: Sequence[Host], words: Sequence[str], **options: Any) -> dict[str, Outcome]:
        asked = json.loads(words[-1])
        self.asked.append({**asked, **options})
        found = {}
        for index, host in enumerate(hosts):
            if "address" in asked:
                answer: dict[str, Any] = {"problem": self.meetings.get(host.name)}
            else:
                connection = f"10.0.0.1 50000 10.0.0.1{index} 22"
                own = {"machine": host.name, "connection": connection, "ports": [4000 + index]}
                answer = {**host_report.report(asked), **own, **self.changes[host.name]}
            text = f"Welcome to {host.name}!\n{host_report.MARK}{json.dumps(answer)}\n"
            found[host.name] = self.outcomes.get(host.name, Outcome(0, text, 0.1))
        return found


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Hosts:
    return Hosts(monkeypatch, ["n0", "n1", "n2"])


def test_hosts_that_are_ready_get_an_address_and_a_port(cluster: Hosts, plan: LaunchPlan) -> None:
    plan = replace(plan, environment={"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "abc"})
    checked = check_hosts(cluster.hosts, plan, ssh_args=["-p", "22"], launches=["old"])
    assert checked.problems == {}
    assert checked.ready == cluster.hosts
    assert (checked.master_address, checked.master_port) == ("10.0.0.10", 4000)
    refuse(checked, 3)
    first, second = cluster.asked
    assert first["env"] == {"NCCL_DEBUG": "INFO"}  # secrets stand in no command
    assert (first["directory"], first["ssh_args"], first["launches"]) == (plan.directory, ["-p", "22"], ["old"])
    assert sorted(first["paths"]) == [str(plan.directory / "run.yaml"), str(plan.directory / "train")]
    assert (second["address"], second["port"], second["first"], second["others"]) == ("10.0.0.10", 4000, "n0", 2)
    assert not plan.run_dir.exists()  # what was made for the checks is gone
    assert not plan.run_dir.parent.exists()


def test_every_host_that_is_not_ready_is_named(cluster: Hosts, plan: LaunchPlan) -> None:
    cluster.outcomes["n0"] = Outcome(SSH_FAILED, "Host key verification failed.", 0.2)
    cluster.outcomes["n1"] = Outcome(TIMED_OUT, "", 90.2)
    cluster.changes["n2"] = {"token": "x", "free_bytes": 0}
    checked = check_hosts(cluster.hosts, plan)
    assert checked.unreachable == {"n0", "n1"}
    with pytest.raises(UserError) as refused:
        refuse(checked, 1)
    assert str(refused.value).splitlines() == [
        "nothing was started, since 3 of 3 hosts are not ready:",
        "  n0: its host key is not known here: compare it and add it with ssh-keyscan",
        "  n1: it did not answer within 90 s",
        f"  n2: its {plan.run_dir} is not the folder that is here: a run folder is on a file system that all see",
        f"  n2: 0 MiB are free in {plan.run_dir}: the disk is full",
    ]
    assert len(cluster.asked) == 1


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome(1, "bash: line 1: cd: {directory}: No such file or directory\n", 0.1), "the code must be at the same"),
        (Outcome(127, "timeout: failed to run command '/x/python': No such file\n", 0.1), "cannot be run there"),
        (Outcome(1, "/x/python: No module named launch.host_report\n", 0.1), "its Python cannot find the project"),
        (Outcome(1, "Traceback ...\nValueError: odd\n", 0.1), "it cannot say how it is: ValueError: odd"),
        (Outcome(0, "nothing of ours\n", 0.1), "it cannot say how it is: nothing of ours"),
        (Outcome(1, "", 0.1), "it cannot say how it is: status 1"),
    ],
)
def test_a_host_that_cannot_report_is_explained(cluster: Hosts, plan: LaunchPlan, outcome: Outcome, said: str) -> None:
    cluster.outcomes["n1"] = replace(outcome, output=outcome.output.replace("{directory}", str(plan.directory)))
    checked = check_hosts(cluster.hosts, plan)
    (problem,) = checked.problems["n1"]
    assert said in problem
    assert checked.unreachable == set()


def test_two_names_of_one_machine(cluster: Hosts, plan: LaunchPlan) -> None:
    cluster.changes["n2"] = {"machine": "n0"}
    checked = check_hosts(cluster.hosts, plan)
    assert list(checked.problems) == ["n2"]
    assert "it is the same machine as n0" in checked.message()


def test_a_host_without_gpus_among_hosts_with_them(cluster: Hosts, plan: LaunchPlan) -> None:
    for name in ("n0", "n1"):
        cluster.changes[name] = {"gpus": [0, 0]}
    assert "n2: it has no GPU" in check_hosts(cluster.hosts, plan).message()


def test_an_interface_that_a_host_does_not_have(cluster: Hosts, plan: LaunchPlan) -> None:
    for name in ("n0", "n1", "n2"):
        cluster.changes[name] = {"interfaces": {"lo": ["127.0.0.1"], "ib0": ["10.1.0.5"]}}
    cluster.changes["n1"] = {"interfaces": {"lo": ["127.0.0.1"], "eth0": ["10.0.0.11"]}}
    checked = check_hosts(cluster.hosts, plan, interface="ib0")
    assert "n1: it has no interface ib0 that is up, but lo, eth0: correct --interface" in checked.message()
    assert checked.master_address == "10.1.0.5"


def test_a_host_that_cannot_reach_the_first(cluster: Hosts, plan: LaunchPlan) -> None:
    cluster.meetings["n2"] = "10.0.0.10, port 4000 (timed out)"
    checked = check_hosts(cluster.hosts, plan)
    assert "n2: it cannot reach n0 at 10.0.0.10, port 4000 (timed out): let the hosts" in checked.message()
    assert checked.ready == cluster.hosts[:2]
    assert checked.master_address == "10.0.0.10"


def test_a_first_host_that_cannot_listen_starts_nothing(cluster: Hosts, plan: LaunchPlan) -> None:
    cluster.meetings["n0"] = "10.0.0.10, port 4000 (Cannot assign requested address)"
    checked = check_hosts(cluster.hosts, plan)
    assert checked.master_address == ""
    with pytest.raises(UserError, match=r"1 of 3 hosts are not ready:\n  n0: it cannot listen"):
        refuse(checked, 2)


def test_a_first_host_known_only_at_a_loopback_address(cluster: Hosts, plan: LaunchPlan) -> None:
    cluster.changes["n0"] = {"connection": "127.0.0.1 5 127.0.1.1 22"}
    checked = check_hosts(cluster.hosts, plan)
    assert "n0: the others cannot reach it: this machine reaches it only at a loopback address" in checked.message()
    with pytest.raises(UserError):
        refuse(checked, 2)


def test_a_run_folder_that_cannot_be_made(plan: LaunchPlan, cluster: Hosts) -> None:
    plan.run_dir.parent.write_text("a file")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        check_hosts(cluster.hosts, plan)
    assert cluster.asked == []


def test_a_run_folder_with_files_stays(plan: LaunchPlan, cluster: Hosts) -> None:
    plan.run_dir.mkdir(parents=True)
    (plan.run_dir / "status.json").write_text("{}")
    check_hosts(cluster.hosts, plan)
    assert [path.name for path in plan.run_dir.iterdir()] == ["status.json"]


def test_nothing_wrong_is_no_message() -> None:
    assert Checked([Host("a", 1)], master_address="10.0.0.1").message() == ""


# --- the report itself -----------------------------------------------------------------------------------------------


def test_a_report_tells_files_and_folders_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "manifest.json").write_text("1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text("2")
    (tmp_path / "c").mkdir()
    looks = [host_report.look_at(tmp_path / name) for name in ("a", "b", "c", "a/manifest.json", "d")]
    assert len(set(looks)) == 5
    assert looks[2] == "folder"
    assert looks[4] == "nothing"


def test_a_report_is_found_among_other_output(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret word")
    asked = {"paths": [str(tmp_path)], "run_dir": str(tmp_path), "token": "token", "launches": ["none"]}
    assert host_report.main([json.dumps(asked)]) == 0
    found = host_report.parse(f"Last login: today\n{capsys.readouterr().out}\nlogout")
    assert found is not None
    assert (found["token"], found["paths"], found["launches"]) == ("secret word", {str(tmp_path): "folder"}, [])
    assert found["host"] == socket.gethostname()
    assert abs(found["clock"] - time.time()) < 60
    assert host_report.parse("nothing") is None
    assert host_report.parse(f"{host_report.MARK}{{") is None


def test_processes_of_an_earlier_start_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "30"], env={"NYSTROM_LAUNCH_ID": "old", "PATH": "/usr/bin:/bin"})
    try:
        assert host_report.living_launches(["older", "old"]) == ["old"]
    finally:
        process.kill()
        process.wait()
    assert host_report.living_launches(["older", "old"]) == []


# --- the network -----------------------------------------------------------------------------------------------------


def test_hosts_meet_at_the_first_one() -> None:
    (port,) = network.free_ports(1)
    results: list[str | None] = []
    listening = threading.Thread(target=lambda: results.append(network.meet_as_first("127.0.0.1", port, 2, 10)))
    early = threading.Thread(target=lambda: results.append(network.meet_first("127.0.0.1", port, 10)))
    early.start()  # before anybody listens
    time.sleep(0.2)
    listening.start()
    assert network.meet_first("127.0.0.1", port, 10) is None
    early.join()
    listening.join()
    assert results == [None, None]


def test_hosts_that_do_not_meet_say_where() -> None:
    (port,) = network.free_ports(1)
    assert network.meet_first("127.0.0.1", port, 0.2) == f"127.0.0.1, port {port} (Connection refused)"
    assert network.meet_as_first("127.0.0.1", port, 1, 0.1) is None  # whoever did not come says so
    with socket.create_server(("127.0.0.1", port)):
        found = network.meet_as_first("127.0.0.1", port, 1, 0.1)
    assert found == f"127.0.0.1, port {port} (Address already in use)"


def test_the_interface_is_the_one_towards_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.interface_towards("127.0.0.1") == "lo"
    monkeypatch.setattr(network, "source_address", lambda address: "10.9.9.9")
    with pytest.raises(UserError, match=r"no network interface with the address 10\.9\.9\.9"):
        network.interface_towards("n0")
    monkeypatch.undo()
    with pytest.raises(UserError, match="has no way to not-a-host"):
        network.interface_towards("not-a-host.invalid")


def test_the_user_s_choice_of_an_interface_stays() -> None:
    env = {"GLOO_SOCKET_IFNAME": "ib0"}
    network.choose_interface("auto", "127.0.0.1", env)
    assert env == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=lo"}
    network.choose_interface("eth7", "127.0.0.1", env)
    assert env == {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "=eth7"}
