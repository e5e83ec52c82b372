"""``nystrom launch doctor`` without measuring: its report, what it refuses, which process it is, hosts over ssh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from doctor_case import GIB, link, machine

from data_pipeline.errors import UserError, run_cli
from launch.cli import main
from launch.doctor import over_ssh, ranks
from launch.doctor.cli import read_sizes
from launch.doctor.ranks import REPORT_MARK
from launch.doctor.report import MOST_LINKS, WIDTH, render
from launch.hosts import SSH_FAILED, Host, Outcome

PROBLEM = {"level": "problem", "check": "network", "where": "n1", "message": "its link is slow: " + "so " * 40}
WARNING = {"level": "warning", "check": "load", "where": "n0, n1", "message": "others compute here", "remedy": "wait"}


def report(**changes: Any) -> dict[str, Any]:
    folder = {"role": "run", "asked": "runs", "path": "/shared/" + "runs/" * 30, "free": 9 * GIB, "speed": 4.2e8}
    return {
        "machines": [machine("n0"), machine("n1")],
        "devices": [
            {"host": "n0", "device": "cpu", "kind": "AMD EPYC " * 20, "speeds": {"fp32": 1.5e11, "bf16": 3.25e11}}
        ],
        "folders": [{"host": "n0", **folder}, {"host": "n1", **folder, "role": "shards", "error": "no"}],
        "shared": {"folder": "/shared", "seconds": {"n1": 0.25}},
        "run": {"name": "demo", "processes": 2, "checkpoint": GIB // 4},
        "links": [link("n0", "n1", round_trip=4e-5, speed=1.25e8, send=1e6, offset=-0.5)],
        "group": {
            "processes": 2,
            "backend": "gloo",
            "all_reduce": [
                {"bytes": 4096, "seconds": 1e-4, "bus": 4.1e7},
                {"bytes": 16 << 20, "seconds": 0.2, "bus": 8e7},
            ],
            "pairs": [],
        },
        "findings": [{**PROBLEM, "remedy": "look"}, WARNING],
        "status": 1,
        "seconds": 12.3,
        **changes,
    }


def test_the_report_has_findings_first_and_then_tables() -> None:
    text = render(report())
    lines = text.splitlines()
    assert lines[0] == "1 problem, 1 warning: a run must not start  (2 hosts examined in 12 s)"
    assert lines[2].startswith("PROBLEM  n1: its link is slow: so so")
    assert "WARNING  n0, n1: others compute here" in lines
    assert "         -> wait" in lines
    assert max(map(len, lines)) <= WIDTH
    assert [line for line in lines if line and line[0].isupper() and line.split()[0] not in ("PROBLEM", "WARNING")] == [
        "Hosts (cores: allowed/there; memory: available/allowed)",
        "Software (of n0)",
        "Processors",
        "Products of matrices, TFLOP/s",
        "Folders (writing with fsync)",
        "Run demo on 2 process(es): a checkpoint takes 0.250 GiB",
        "Between hosts (TCP; > is from the first to the second)",
        "Clocks beside that of n0",
        "All-reduce over 2 processes (gloo)",
    ]
    rows = {tuple(line.split()) for line in lines}
    assert ("n0", "-", "n1", "0.04", "0.048", "125", "1") in rows
    assert ("n1", "+500.00", "0.10") in rows
    assert ("16", "MiB", "200", "80") in rows
    assert any(row[:4] == ("n0", "cpu", "0.15", "0.325") for row in rows)


def test_a_good_report_and_one_of_nothing() -> None:
    text = render(report(findings=[], status=0, machines=[machine("n0")], links=[], group=None))
    assert text.splitlines()[0] == "0 problems, 0 warnings: a run may start  (1 host examined in 12 s)"
    assert "Between hosts" not in text
    assert "0 hosts examined" in render({"findings": [WARNING], "status": 0, "seconds": 1.0})


def test_of_many_pairs_the_slowest_are_shown() -> None:
    many = [link(f"n{a}", f"n{b}", speed=1e9 + a) for a in range(12) for b in range(a + 1, 12)]
    text = render(report(links=[*many, link("n98", "n99", speed=1e6)], pairs_left_out=9))
    assert f"the slowest {MOST_LINKS} of 67 pairs; 9 pairs were not measured" in text
    assert "n98 - n99" in text
    assert sum(" - n" in line for line in text.splitlines()) == MOST_LINKS


def test_sizes() -> None:
    assert read_sizes("16M, 4k,4096,1G") == [4096, 16 << 20, 1 << 30]
    for wrong in ("", "4X", "0", "-1", "8G", "4K,,1M"):
        with pytest.raises(UserError, match="--sizes"):
            read_sizes(wrong)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--timeout", "0"], "--timeout 0.0: must be above 0"),
        (["--patience", "-3"], "--patience -3.0: must be above 0"),
        (["--processes", "0"], "--processes 0: must be at least 1"),
        (["--sizes", "many"], "'many' is no size"),
        (["--set", "seed=1"], "give --config too"),
        (["--include", "n0"], "belong to --hostfile"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
        (["--hostfile", "none"], "hostfile none cannot be read"),
        (["--in-allocation"], "this is no task of Slurm"),
    ],
)
def test_wrong_use(words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert run_cli(main, "nystrom launch", ["doctor", *words]) == 2
    finally:
        os.chdir(before)
    assert said in capsys.readouterr().err


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without the variables that this module sets, which are set back at the end."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever the code does
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_task_of_slurm(clean: pytest.MonkeyPatch) -> None:
    task = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "123"}
    assert ranks.adopt_allocation({**task, "SLURM_JOB_NODELIST": "127.0.0.7,n8"}) == ["127.0.0.7", "n8"]
    rank = ranks.read_own_rank(in_allocation=True)
    assert (rank.rank, rank.world_size, rank.local_rank) == (1, 2, 0)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.7", "22123")
    # Several tasks on a node: names by rank are not known. An address that is set is kept.
    assert ranks.adopt_allocation({**task, "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n9,n8"}) == []
    assert os.environ["MASTER_ADDR"] == "127.0.0.7"
    with pytest.raises(UserError, match="Slurm named no nodes"):
        ranks.adopt_allocation(task)


def test_nodes_by_scontrol(tmp_path: Path, clean: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    script = [
        "#!/bin/sh",
        '[ "$2" = node ] && { echo "NodeName=$3 NodeAddr=10.9.8.7 Port=1"; exit; }',
        '[ "$3" = "n[0-2]" ] || { echo bad >&2; exit 1; }',
        "echo n0; echo n1; echo n2",
    ]
    scontrol.write_text("\n".join(script))
    scontrol.chmod(0o755)
    clean.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert ranks.expand_nodes("n[0-2]") == ["n0", "n1", "n2"]
    assert ranks.expand_nodes("n5") == ["n5"]
    assert ranks.node_address("localhost") == "localhost"
    assert ranks.node_address("n7.invalid") == "10.9.8.7"
    with pytest.raises(UserError, match=r"cannot read the list of nodes n\[: bad"):
        ranks.expand_nodes("n[")


def test_a_master_address_that_each_host_has_itself(clean: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}.items():
        clean.setenv(name, value)
    clean.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(UserError, match="MASTER_ADDR is localhost, and process 1 is on another host than the first"):
        ranks.read_own_rank()
    clean.setenv("LOCAL_RANK", "1")  # two processes of this host
    assert ranks.read_own_rank().local_size == 2


def outcome(code: int = 0, output: str = "") -> Outcome:
    return Outcome(code, output, 1.0)


def test_hosts_are_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "n0": outcome(output="welcome\nnystrom-doctor-address 10.0.0.9 51234 10.0.0.1 22\n"),
        "me@n1": outcome(output="nystrom-doctor-address \n"),
        "n2": outcome(SSH_FAILED, "ssh: connect to host n2 port 22: Connection refused\n"),
        "n3": outcome(1, "Traceback\nModuleNotFoundError: No module named 'launch'\n"),
    }
    monkeypatch.setattr(over_ssh, "run_on", lambda hosts, words, **more: {host.name: said[host.name] for host in hosts})
    there, found = over_ssh.probe([Host(name, 1) for name in said], [], {})
    assert there == {"n0": "10.0.0.1", "me@n1": "n1"}
    assert [(each.level, each.where) for each in found] == [("problem", "n2"), ("problem", "n3")]
    assert "it cannot be reached over ssh: nothing listens at its ssh port" in found[0].message
    assert "the program does not run there: ModuleNotFoundError: No module named 'launch'" in found[1].message


def test_the_first_hosts_report_gets_what_ssh_found() -> None:
    first = {**report(findings=[WARNING], status=0), "format": 1}
    outcomes = {"n0": outcome(0, f"a warning of torch\n{REPORT_MARK}{json.dumps(first)}\n"), "n1": outcome()}
    assert over_ssh.combine(outcomes, []) == first
    missing = over_ssh.problem("host", "n2", "it cannot be reached", "try")
    combined = over_ssh.combine(outcomes, [missing])
    assert (combined["status"], [each["where"] for each in combined["findings"]]) == (1, ["n2", "n0, n1"])


def test_of_a_host_that_did_not_come_its_own_words_are_told() -> None:
    lost = {
        "level": "problem",
        "check": "missing",
        "where": "n1",
        "message": "process 1 did not come",
        "remedy": "look",
    }
    first = {**report(findings=[lost], status=1), "format": 1}
    outcomes = {"n0": outcome(1, f"{REPORT_MARK}{json.dumps(first)}\n"), "n1": outcome(137, "no\nKilled\n")}
    (found,) = over_ssh.combine(outcomes, [])["findings"]
    assert found["message"] == "process 1 did not come; there: Killed (status 137)"


def test_no_report_tells_what_each_host_said() -> None:
    combined = over_ssh.combine({"n0": outcome(2, "error: no port\n"), "n1": outcome(124)}, [])
    assert combined["status"] == 1
    assert [each["message"] for each in combined["findings"]] == [
        "it ended with status 2: error: no port",
        "it ended with status 124: it says nothing",
    ]
    assert render(combined).splitlines()[0].startswith("2 problems, 0 warnings: a run must not start  (0 hosts")


def test_no_host_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts").write_text("n0 slots=1\nn1 slots=1\n")
    dead = outcome(SSH_FAILED, "ssh: connect to host port 22: No route to host\n")
    monkeypatch.setattr(over_ssh, "run_on", lambda hosts, words, **more: {host.name: dead for host in hosts})
    assert run_cli(main, "nystrom launch", ["doctor", "--hostfile", str(tmp_path / "hosts")]) == 2
    assert "no host of" in (said := capsys.readouterr().err)
    assert "n1: it cannot be reached over ssh: it does not answer" in said


def test_hosts_that_ssh_reaches_at_the_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts").write_text("n0 slots=1\nn1 slots=1\n")
    own = outcome(output="nystrom-doctor-address 127.0.0.1 5 127.0.0.1 22\n")
    monkeypatch.setattr(over_ssh, "run_on", lambda hosts, words, **more: {host.name: own for host in hosts})
    with pytest.raises(
        UserError, match=r"ssh reaches n0 at 127.0.0.1, where other hosts meet themselves: give --master"
    ):
        main(["doctor", "--hostfile", str(tmp_path / "hosts")])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_was_started(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for ssh, which is in a session of its own."""
    (tmp_path / "hosts").write_text("n0 slots=1\n")
    started: list[subprocess.Popen[bytes]] = []

    def run_on(hosts: list[Host], words: list[str], **more: Any) -> dict[str, Outcome]:
        if words[1] == "-c":  # the question whether it answers
            return {"n0": outcome(output="nystrom-doctor-address 10.0.0.9 51234 10.0.0.1 22\n")}
        started.append(subprocess.Popen(["sleep", "60"], start_new_session=True))
        os.kill(os.getpid(), number)
        started[0].wait()
        return {"n0": outcome(1)}

    monkeypatch.setattr(over_ssh, "run_on", run_on)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_cli(main, "nystrom launch", ["doctor", "--hostfile", str(tmp_path / "hosts")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert started[0].wait(timeout=5) == -signal.SIGKILL
