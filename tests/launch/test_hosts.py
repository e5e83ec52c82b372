"""Reading a hostfile, and running a command on all its hosts, with a program ``ssh`` that runs it here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from launch.hosts import (
    SSH_FAILED,
    TIMED_OUT,
    Host,
    Outcome,
    choose_hosts,
    read_hostfile,
    remote_line,
    run_on,
    ssh_command,
    ssh_problem,
)

FAKE_SSH = """#!/bin/sh
# As sshd does it: the last word goes to a shell. The host before it decides what happens.
while [ $# -gt 2 ]; do shift; done
case $1 in
away) echo "ssh: connect to host away port 22: Connection timed out" >&2; exit 255 ;;
deaf) sleep 30 & sleep 30 ;;
*) echo "on $1"; exec sh -c "$2" ;;
esac
"""


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(FAKE_SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hosts"
    path.write_text(text)
    return path


def test_a_hostfile_is_read_in_its_order(tmp_path: Path) -> None:
    text = "# ours\n\nworker-1 slots=8\n  me@worker-0.net\tslots=4 # the old one\n10.0.0.7 slots=1\n"
    assert read_hostfile(write(tmp_path, text)) == [
        Host("worker-1", 8),
        Host("me@worker-0.net", 4),
        Host("10.0.0.7", 1),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        ("# nothing\n", "names no host"),
        ("a slots=1\nb\n", "line 2: 'b' is not NAME slots=N"),
        ("a slots=0", "line 1: 'a slots=0' is not NAME slots=N"),
        ("a slots=1x", "is not NAME slots=N"),
        ("-oProxyCommand=x slots=1", "is not NAME slots=N"),
        ("a slots=1\nb slots=1\na slots=2", "line 3: host a stands there twice"),
    ],
)
def test_a_wrong_hostfile_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_hostfile(write(tmp_path, text))


def test_a_hostfile_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none cannot be read: No such file"):
        read_hostfile(tmp_path / "none")
    (tmp_path / "hosts").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"cannot be read: 'utf-8' codec"):
        read_hostfile(tmp_path / "hosts")


def test_hosts_are_chosen_as_deepspeed_s_options_say() -> None:
    hosts = [Host("a", 1), Host("b", 1), Host("c", 1)]
    assert choose_hosts(hosts) == hosts
    assert [host.name for host in choose_hosts(hosts, include="c@a")] == ["a", "c"]
    assert [host.name for host in choose_hosts(hosts, exclude="b")] == ["a", "c"]
    for include, exclude, said in (
        ("a", "b", "give one of them"),
        ("d", "", "--include d: the hostfile has no such host"),
        ("a:0", "", "--include a:0: whole hosts only"),
        ("", "a@b@c", "no host is left"),
    ):
        with pytest.raises(UserError, match=said):
            choose_hosts(hosts, include, exclude)


def test_words_reach_the_program_of_another_host_as_they_are(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-c",
        "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['A'])",
        "a 'b' $HOME",
        "*",
    ]
    folder = tmp_path / "a folder"
    folder.mkdir()
    line = remote_line(words, folder, {"A": "1 2\"'$x"})
    output = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert output == f"[\"a 'b' $HOME\", '*'] {folder} 1 2\"'$x\n"


def test_the_user_s_ssh_options_come_before_ours() -> None:
    command = ssh_command("a", "exec true", ["-F", "file", "-o", "ConnectTimeout=60"])
    assert command[:6] == ["ssh", "-T", "-F", "file", "-o", "ConnectTimeout=60"]
    assert "BatchMode=yes" in command
    assert command[-3:] == ["--", "a", "exec true"]


@pytest.mark.usefixtures("fake_ssh")
def test_all_hosts_at_the_same_time(tmp_path: Path) -> None:
    hosts = [Host("a", 1), Host("away", 1), Host("b", 1), Host("deaf", 1)]
    began = time.monotonic()
    outcomes = run_on(
        hosts, ["sh", "-c", "sleep 0.1; pwd; echo $A; exit 3"], timeout=0.8, directory=tmp_path, env={"A": "x y"}
    )
    assert time.monotonic() - began < 10
    assert list(outcomes) == ["a", "away", "b", "deaf"]
    assert (outcomes["a"].code, outcomes["a"].output) == (3, f"on a\n{tmp_path}\nx y\n")
    assert outcomes["b"].output.startswith("on b\n")
    assert outcomes["away"].code == SSH_FAILED
    assert outcomes["deaf"].code == TIMED_OUT
    assert outcomes["deaf"].seconds >= 0.8
    assert ssh_problem(outcomes["a"]) is None
    assert "does not answer" in str(ssh_problem(outcomes["away"]))
    assert ssh_problem(outcomes["deaf"]) == "it did not answer within 1 s"


@pytest.mark.usefixtures("fake_ssh")
def test_a_folder_that_is_not_there_is_said() -> None:
    (outcome,) = run_on([Host("a", 1)], ["true"], timeout=10, directory="/not/there").values()
    assert outcome.code not in (0, SSH_FAILED, TIMED_OUT)
    assert "/not/there" in outcome.output


def test_without_ssh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no program ssh here"):
        run_on([Host("a", 1)], ["true"], timeout=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("No ED25519 host key is known for a\nHost key verification failed.\n", "ssh-keyscan"),
        ("root@a: Permission denied (publickey,password).\n", "ssh-copy-id"),
        ("ssh: Could not resolve hostname a: Name or service not known\n", "correct the hostfile"),
        ("ssh: connect to host a port 22: Connection refused\n", "start sshd there"),
        ("Bad owner or permissions on config\n", "ssh failed: Bad owner or permissions on config"),
        ("", "ssh failed: it says nothing"),
    ],
)
def test_what_ssh_says_has_a_remedy(text: str, said: str) -> None:
    assert said in str(ssh_problem(Outcome(SSH_FAILED, text, 0.1)))
