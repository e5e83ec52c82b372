"""Agents on other hosts, played by shells here, and the life line between them and who launched them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes_case import REPOSITORY, survivors

from data_pipeline.errors import UserError
from launch import fleet, life_line
from launch.fleet import SshFleet, look_after
from launch.hosts import SSH_FAILED, Host
from launch.life_line import LifeLine
from launch.pdsh import PdshFleet, pdsh_environment
from launch.watch import StopRequest

HOSTS = [Host("a", 1), Host("b", 1)]
PROGRAMS = {
    "ssh": '#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\nexec sh -c "$1"\n',
    # One after another, and with pdsh's own words for what went wrong.
    "pdsh": """#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = -w ] && hosts=$2; shift; done
n=0
for host in $(echo "$hosts" | tr , ' '); do
    sh -c "$(echo "$1" | sed "s/%n/$n/g; s/%%/%/g")"
    code=$?
    [ $code = 0 ] || echo "pdsh@here: $host: ssh exited with exit code $code" >&2
    n=$((n + 1))
done
exit 1
""",
}
LISTEN = 'while read -r word; do echo "$word" >> {said}; case $word in stop) exit 75;; lost*) exit 1;; esac; done'


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def request_to_stop() -> Iterator[StopRequest]:
    request = StopRequest()
    yield request
    request.restore()


def listening(tmp_path: Path) -> dict[str, str]:
    return {host.name: LISTEN.format(said=tmp_path / host.name) for host in HOSTS}


def test_secrets_and_stop_are_said_to_every_agent(tmp_path: Path, request_to_stop: StopRequest) -> None:
    request_to_stop.number = 15
    agents = SshFleet(HOSTS, listening(tmp_path), secrets={"A_KEY": "b c"})
    ended = look_after(agents, request_to_stop, 10)
    assert ended.codes == {"a": 75, "b": 75}
    assert (ended.lost, ended.code()) == ([], 75)
    for name in "ab":
        assert (tmp_path / name).read_text().splitlines() == ["env A_KEY=b c", "go", "beat", "stop"]


def test_output_of_all_agents_is_shown(request_to_stop: StopRequest, capfd: pytest.CaptureFixture[str]) -> None:
    lines = {"a": "echo one", "b": "echo two; echo three >&2; exit 3"}
    ended = look_after(SshFleet(HOSTS, lines), request_to_stop, 10)
    assert ended.code() == 3
    shown = capfd.readouterr()
    assert sorted(shown.out.splitlines()) == ["one", "two"]
    assert shown.err == "three\n"


def test_when_a_host_is_lost_the_others_are_told(
    tmp_path: Path, request_to_stop: StopRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = {**listening(tmp_path), "b": "echo 'Timeout, server b not responding.' >&2; exit 255"}
    ended = look_after(SshFleet(HOSTS, lines), request_to_stop, 10)
    assert ended.codes == {"a": 1, "b": SSH_FAILED}
    assert (ended.lost, ended.code()) == (["b"], 1)
    assert (tmp_path / "a").read_text().splitlines()[-1] == "lost b"
    said = capfd.readouterr().err
    assert "host b is lost: ssh failed: Timeout, server b not responding." in said
    assert "the processes of a are ended, since none can go on without it" in said


def test_after_a_failure_the_others_are_ended_if_they_do_not_end(
    tmp_path: Path, request_to_stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "LOSS_SECONDS", 0.1)
    ended = look_after(SshFleet(HOSTS, {**listening(tmp_path), "b": "exit 2"}), request_to_stop, 10)
    assert ended.codes == {"b": 2, "a": 1}
    assert (tmp_path / "a").read_text().splitlines()[-1] == "lost"


def test_an_agent_that_does_not_end_is_named(
    request_to_stop: StopRequest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fleet, "MARGIN_SECONDS", 0.1)
    request_to_stop.number = 15
    ended = look_after(SshFleet(HOSTS, {"a": "exit 75", "b": "sleep 30"}), request_to_stop, 0.1)
    assert ended.codes == {"a": 75}
    assert "b: no word that the processes there have ended" in capfd.readouterr().err


def test_pdsh_tells_which_host_ended_how(
    tmp_path: Path, request_to_stop: StopRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    agents = PdshFleet(HOSTS, "echo rank %n of 100%%; exit %n", tmp_path / "logs")
    ended = look_after(agents, request_to_stop, 10)
    assert ended.codes == {"b": 1, "a": 0}
    assert ended.code() == 1
    shown = capfd.readouterr()
    assert shown.out == "rank 0 of 100%\nrank 1 of 100%\n"
    assert "pdsh@" not in shown.err


def test_orders_for_agents_behind_pdsh_are_a_file(tmp_path: Path, request_to_stop: StopRequest) -> None:
    request_to_stop.number = 15
    orders = tmp_path / "logs" / "orders"
    wait = f"until [ -f {orders} ]; do sleep 0.05; done; exit 75"
    ended = look_after(PdshFleet(HOSTS, wait, orders.parent), request_to_stop, 10)
    assert ended.codes == {"a": 75, "b": 75}
    assert orders.read_text() == "stop\n"


def test_pdsh_and_its_connections_end_with_the_launcher(tmp_path: Path) -> None:
    # As pdsh does it: the connection is in a session of its own.
    (tmp_path / "bin" / "pdsh").write_text("#!/bin/sh\nsetsid sleep 30 &\nwait\n")
    agents = PdshFleet(HOSTS, "true", tmp_path / "logs")
    keeper = psutil.Process(agents._process.pid)
    deadline = time.monotonic() + 10
    while len(below := keeper.children(recursive=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    agents.close()  # which closes its end of the pipe, as its own end does
    assert survivors(below) == []
    agents.poll()
    assert agents.lost == ["a", "b"]


def test_pdsh_that_fails_by_itself(tmp_path: Path, request_to_stop: StopRequest) -> None:
    (tmp_path / "bin" / "pdsh").write_text("#!/bin/sh\necho 'no such module'\nexit 1\n")
    ended = look_after(PdshFleet(HOSTS, "true", tmp_path / "logs"), request_to_stop, 10)
    assert ended.codes == {"a": 1, "b": 1}
    assert ended.lost == []


def test_pdsh_takes_no_spaces_within_an_option() -> None:
    assert pdsh_environment(["-p", "22"])["PDSH_SSH_ARGS_APPEND"].startswith("-p 22 -o BatchMode=yes")
    with pytest.raises(UserError, match="pdsh takes no spaces"):
        pdsh_environment(["-oProxyCommand=a b"])


# --- the other end ---------------------------------------------------------------------------------------------------


@pytest.fixture
def input_pipe() -> Iterator[int]:
    """The writing end of what is standard input meanwhile."""
    before = os.dup(0)
    reading, writing = os.pipe()
    os.dup2(reading, 0)
    os.close(reading)
    yield writing
    os.dup2(before, 0)


def test_an_agent_begins_when_it_has_heard_all_and_stops_when_told(
    tmp_path: Path, input_pipe: int, request_to_stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "before")
    threading.Timer(0.1, os.write, (input_pipe, b"env A_KEY=b=c d\nenv B")).start()
    threading.Timer(0.2, os.write, (input_pipe, b"_KEY=2\ngo\nbeat\n")).start()
    with LifeLine("stdin", request_to_stop, tmp_path, 0):
        assert (os.environ["A_KEY"], os.environ.pop("B_KEY")) == ("b=c d", "2")
        assert os.read(0, 1) == b""  # the ranks do not get what is said here
        assert request_to_stop.number is None
        os.write(input_pipe, b"stop\n")
        wait_for(request_to_stop)
        assert request_to_stop.grace is None
        os.write(input_pipe, b"lost b\n")
        deadline = time.monotonic() + 10
        while request_to_stop.grace is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert request_to_stop.grace == life_line.LOST_GRACE_SECONDS
    os.close(input_pipe)


def wait_for(request: StopRequest) -> None:
    deadline = time.monotonic() + 10
    while request.number is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert request.number == 15


CUT = """
import sys
from pathlib import Path
from launch import life_line
from launch.pdsh import PdshFleet, pdsh_environment
from launch.watch import StopRequest
import time
life_line.SILENCE_SECONDS, life_line._POLL_SECONDS = 0.2, 0.05
request = StopRequest()
with life_line.LifeLine(sys.argv[1], request, Path(sys.argv[2]), 1):
    print("begins", flush=True)
    while request.number is None:
        time.sleep(0.01)
print("ends", request.number, request.grace, flush=True)
"""


@pytest.mark.parametrize(
    ("said", "why", "grace"),
    [
        (b"go\n", "nothing was heard of the launcher for 0.2 s", life_line.SILENCE_GRACE_SECONDS),
        (None, "the launcher is gone", None),
    ],
)
def test_an_agent_without_its_launcher_stops_and_writes_into_a_file(
    tmp_path: Path, said: bytes | None, why: str, grace: float | None
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CUT, "stdin", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    if said is None:
        process.stdin.close()  # as after kill -9 of the launcher
    else:
        process.stdin.write(said)
        process.stdin.flush()
    process.wait(timeout=30)
    lines = (tmp_path / "node-1.log").read_text()
    assert f": {why}; its processes save if they can, and end\n" in lines
    assert lines.endswith(f"ends 15 {grace}\n")
    assert b"ends" not in process.stdout.read()


def test_an_agent_behind_pdsh_notices_that_its_parent_is_gone(tmp_path: Path) -> None:
    # A shell that ends while what it started runs on, as sshd does when a connection is closed.
    line = f'"{sys.executable}" -c "$CODE" parent {tmp_path} >out & until grep -q begins out; do sleep 0.05; done'
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CODE": CUT}
    subprocess.run(["sh", "-c", line], env=env, cwd=tmp_path, check=True)
    deadline = time.monotonic() + 30
    log = tmp_path / "node-1.log"
    while not (log.exists() and "ends" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert re.search(r": the connection to the launcher is gone; .*\nends 15 None\n", log.read_text())


def test_an_agent_behind_pdsh_that_came_too_late_stops(
    tmp_path: Path, request_to_stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life_line, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(LifeLine, "_cut", lambda self, why: self._stop(None))
    with LifeLine("parent", request_to_stop, tmp_path, 0):
        wait_for(request_to_stop)


def test_an_agent_behind_pdsh_reads_its_orders(
    tmp_path: Path, request_to_stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life_line, "_POLL_SECONDS", 0.02)
    with LifeLine("parent", request_to_stop, tmp_path, 0):
        (tmp_path / "orders").write_text("lost b")  # half written
        time.sleep(0.1)
        assert request_to_stop.number is None
        (tmp_path / "orders").write_text("lost b\n")
        wait_for(request_to_stop)
        assert request_to_stop.grace == life_line.LOST_GRACE_SECONDS
