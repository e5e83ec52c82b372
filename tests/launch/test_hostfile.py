"""``nystrom launch hostfile``: what it shows, what it refuses, and when it starts again. No host is asked here."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from training_case import settings, write_config, write_corpus

from data_pipeline.errors import UserError, run_cli
from launch import restarts
from launch.cli import build_parser, main
from launch.fleet import Ended, Fleet
from launch.host_checks import Checked
from launch.hosts import SSH_FAILED, Host
from launch.places import hostfile
from launch.places.hostfile import Hostfile, elastic_range, processes_of
from launch.plan import ALSO_CROSSING, CROSSING
from launch.watch import REPOSITORY, StopRequest

EXPECTED = Path(__file__).parent / "expected"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostfile")
    write_corpus(folder)
    return folder


@pytest.fixture
def folder(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a hostfile of three hosts and a configuration; nothing crosses but what is asked."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(CROSSING) or name in ALSO_CROSSING:
            monkeypatch.delenv(name)
    (tmp_path / "hosts").write_text("n0 slots=2\nn1 slots=2\nn2 slots=2\n")
    curriculum = [{"until_tokens": 7680, "seq_len": 32, "micro_batch": 2}]  # 12 rows a batch
    write_config(tmp_path / "run.yaml", settings(corpus, Path("runs"), curriculum=curriculum, batch_tokens=384))
    return tmp_path


def words(*more: str) -> list[str]:
    return ["hostfile", "--hostfile", "hosts", "--config", "run.yaml", *more]


@pytest.mark.parametrize("transport", ["ssh", "pdsh"])
def test_dry_run_shows_every_command(
    folder: Path, capsys: pytest.CaptureFixture[str], transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    asked = ["--transport", transport, "--ssh-args", "-p 2222", "--env", "WANDB_API_KEY=abc", "--env", "A=50% of it"]
    asked += ["--exclude", "n1", "--nproc", "1", "--set", "seed=7", "--dry-run"]
    assert main(words(*asked)) == 0
    shown = capsys.readouterr().out
    for found, name in ((str(folder), "/work"), (sys.executable, "/env/bin/python"), (str(REPOSITORY), "/code")):
        shown = shown.replace(found, name)
    assert shown == (EXPECTED / f"hostfile-{transport}.txt").read_text()
    assert "abc" not in shown
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--hostfile", "none"], "hostfile none cannot be read"),
        (["--nproc", "3"], r"--nproc 3: too few slots have n0 \(2\), n1 \(2\), n2 \(2\)"),
        (["--elastic", "4:5"], "--elastic 4:5: the hostfile has 3 hosts"),
        (["--elastic", "3:2"], "MIN:MAX, two numbers of hosts"),
        (["--elastic", "2"], "MIN:MAX, two numbers of hosts"),
        (["--elastic", "0:2"], "MIN:MAX, two numbers of hosts"),
        (["--ssh-args", "'"], "No closing quotation"),
        (["--transport", "pdsh", "--ssh-args", "-o 'ProxyCommand=a b'"], "pdsh takes no spaces within a word"),
        (["--host-wait", "-1"], "must be 0 or more seconds"),
        (["--include", "n7"], "the hostfile has no such host"),
        (["--set", "lr=1"], "lr"),
        (["--env", "WANDB_API_KEY=a\nb"], "several lines"),
    ],
)
def test_mistakes_are_refused_before_any_host_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str], said: str
) -> None:
    monkeypatch.setattr(hostfile, "check_hosts", lambda *_, **__: pytest.fail("a host was asked"))
    with pytest.raises(UserError, match=said):
        main(words(*asked))
    assert not (folder / "runs").exists()


def test_shards_that_are_not_here_are_told_before_any_host_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostfile, "check_hosts", lambda *_, **__: pytest.fail("a host was asked"))
    with pytest.raises(UserError, match="none"):
        main(words("--set", "data.train=none"))


def test_hosts_with_different_slots_need_one_number() -> None:
    hosts = [Host("a", 8), Host("b", 4)]
    with pytest.raises(UserError, match=r"different numbers of slots \(a 8, b 4\).*--nproc 4"):
        processes_of(hosts, None)
    assert processes_of(hosts, 4) == 4
    assert processes_of([Host("a", 8), Host("b", 8)], None) == 8


def test_elastic_ranges() -> None:
    assert elastic_range(None, 3) == (3, 3)
    assert elastic_range("2:3", 3) == (2, 3)
    assert elastic_range("1:64", 3) == (1, 3)


def test_a_lost_host_is_left_alone_until_its_agent_has_ended_all() -> None:
    assert hostfile.fence_seconds(120) == 30 + 25 + 5
    assert hostfile.fence_seconds(10) == 30 + 10 + 5


# --- attempts, with hosts that are made up ---------------------------------------------------------------------------


class MadeUp(Fleet):
    """Agents that end at once, with these statuses; a run that is done says so in its folder."""

    def __init__(self, hosts: Sequence[Host], codes: Sequence[int], run: Path, launch_id: str) -> None:
        super().__init__(hosts)
        self.codes, self.said = codes, list[str]()
        if not any(codes):
            run.mkdir(parents=True, exist_ok=True)
            (run / "status.json").write_text(json.dumps({"code": 0, "launch_id": launch_id}))

    def tell(self, words: str) -> None:
        self.said.append(words)

    def poll(self) -> None:
        self.ended.update(zip([host.name for host in self.hosts], self.codes, strict=False))

    def close(self) -> None:
        pass


class Session:
    """What the checks find and how the agents end, one after another; and what was started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.down: list[set[str]] = []
        self.codes: list[list[int]] = []
        self.started: list[list[str]] = []
        self.launches: list[list[str]] = []
        self.wrong: dict[str, list[str]] = {}
        monkeypatch.setattr(hostfile, "check_hosts", self.check)
        monkeypatch.setattr(hostfile._Launch, "_start", self.start)
        monkeypatch.setattr(hostfile, "LOOK_AGAIN_SECONDS", 0.01)
        monkeypatch.setattr(hostfile, "fence_seconds", lambda stop_timeout: 0.05)
        monkeypatch.setattr(restarts, "PAUSE_SECONDS", 0.0)
        self.run = folder / "runs" / "run"

    def check(self, hosts: Sequence[Host], plan: Any, *, launches: Sequence[str], **_: Any) -> Checked:
        down = self.down.pop(0) if len(self.down) > 1 else self.down[0]
        self.launches.append(list(launches))
        problems = {name: ["it does not answer"] for name in sorted(down)} | self.wrong
        return Checked(list(hosts), problems, set(down), "10.0.0.1", 29500)

    def start(self, hosts: Sequence[Host], address: str, port: str, launch_id: str) -> MadeUp:
        self.started.append([host.name for host in hosts])
        return MadeUp(hosts, self.codes.pop(0), self.run, launch_id)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Session:
    return Session(monkeypatch, folder)


def test_all_hosts_are_taken(session: Session, capfd: pytest.CaptureFixture[str]) -> None:
    session.down, session.codes = [set()], [[0, 0, 0]]
    assert main(words()) == 0
    assert session.started == [["n0", "n1", "n2"]]
    assert "6 processes on n0, n1, n2, which meet at 10.0.0.1, port 29500" in capfd.readouterr().err


def test_one_host_that_is_not_ready_is_enough_to_start_nothing(
    session: Session, capfd: pytest.CaptureFixture[str]
) -> None:
    session.down = [{"n1"}]
    assert run_cli(main, "nystrom launch", words()) == 2
    assert "nothing was started, since 1 of 3 hosts are not ready:\n  n1: it does not answer" in capfd.readouterr().err
    assert session.started == []


def test_an_elastic_run_begins_without_hosts_that_do_not_answer(
    session: Session, capfd: pytest.CaptureFixture[str]
) -> None:
    session.down, session.codes = [{"n0"}], [[0, 0]]
    assert main(words("--elastic", "2:3")) == 0
    assert session.started == [["n1", "n2"]]
    assert "without these hosts:\n  n0: it does not answer" in capfd.readouterr().err


def test_an_elastic_run_does_not_begin_while_a_host_is_wrong(session: Session) -> None:
    session.down, session.wrong = [set()], {"n2": ["package torch is 1"]}
    with pytest.raises(UserError, match="n2: package torch is 1"):
        main(words("--elastic", "2:3"))
    assert session.started == []


def test_an_elastic_run_takes_no_more_hosts_than_it_may(session: Session) -> None:
    session.down, session.codes = [set()], [[0, 0]]
    assert main(words("--elastic", "1:2")) == 0
    assert session.started == [["n0", "n1"]]


def test_a_number_of_hosts_that_cannot_share_a_batch_is_passed_over(
    session: Session, capfd: pytest.CaptureFixture[str]
) -> None:
    session.down, session.codes = [set()], [[0, 0]]
    # 16 rows: not for 6 processes, but for 4.
    assert main(words("--elastic", "1:3", "--set", "batch_tokens=512")) == 0
    assert session.started == [["n0", "n1"]]
    assert "n2 stays idle: the rows of a batch cannot be shared evenly" in capfd.readouterr().err
    with pytest.raises(UserError, match="16 rows of 32 tokens in a batch, which 6 processes cannot share evenly"):
        main(words("--set", "batch_tokens=512"))


def test_after_a_host_was_lost_the_others_go_on_once_it_has_surely_ended(
    session: Session, capfd: pytest.CaptureFixture[str]
) -> None:
    session.down, session.codes = [set(), {"n1"}], [[1, SSH_FAILED, 1], [0, 0]]
    began = time.monotonic()
    assert main(words("--elastic", "2:3", "--max-restarts", "1")) == 0
    assert time.monotonic() - began >= 0.05
    assert session.started == [["n0", "n1", "n2"], ["n0", "n2"]]
    # What is left of the first start is asked for.
    assert session.launches[0] == []
    assert len(session.launches[-1]) == 1
    said = capfd.readouterr().err
    assert "host n1 is lost: its connection is gone" in said
    assert "waits until what was lost has ended:\n  n1: it does not answer" in said


def test_a_lost_host_that_answers_again_is_taken(session: Session) -> None:
    session.down, session.codes = [set(), {"n1"}, set()], [[1, SSH_FAILED, 1], [0, 0, 0]]
    assert main(words("--max-restarts", "1", "--host-wait", "20")) == 0
    assert session.started == [["n0", "n1", "n2"]] * 2


def test_a_lost_host_that_does_not_come_back_is_given_up(session: Session, capfd: pytest.CaptureFixture[str]) -> None:
    session.down, session.codes = [set(), {"n1"}], [[1, SSH_FAILED, 1]]
    assert main(words("--max-restarts", "1", "--host-wait", "0.1")) == 77
    assert session.started == [["n0", "n1", "n2"]]
    said = capfd.readouterr().err
    assert "waits until 3 hosts are ready:\n  n1: it does not answer" in said
    assert "gives up: 3 hosts are needed, but after 0.1 s" in said


def test_a_lost_host_without_restarts(session: Session) -> None:
    session.down, session.codes = [set()], [[75, 75, SSH_FAILED]]
    assert main(words()) == 77  # also where the others say that they have saved


def test_a_mistake_of_the_user_s_is_not_tried_again(session: Session) -> None:
    session.down, session.codes = [set()], [[2, 1, 1]]
    assert main(words("--max-restarts", "3")) == 2
    assert len(session.started) == 1


def test_asked_to_stop_while_waiting_for_hosts(session: Session, folder: Path) -> None:
    session.down, session.codes = [set(), {"n1"}], [[1, SSH_FAILED, 1]]
    args = build_parser().parse_args(words("--max-restarts", "1"))
    request = StopRequest()
    launch = hostfile._Launch(Hostfile.plan(args), args)
    real: Callable[..., Checked] = session.check

    def check(*args: Any, **named: Any) -> Checked:
        if session.started:
            request.number = 15
        return real(*args, **named)

    session.check = check  # type: ignore[method-assign]
    hostfile.check_hosts = check  # type: ignore[assignment]  # the fixture puts it back
    try:
        hosts = [Host("n0", 2), Host("n1", 2), Host("n2", 2)]
        assert launch.run(hosts, request) == 75
    finally:
        request.restore()


def test_the_status_is_that_of_whoever_knows() -> None:
    assert Ended({"a": 0, "b": 0}).code() == 0
    assert Ended({"a": 75, "b": 75}).code() == 75
    assert Ended({"a": 1, "b": 137}).code() == 1
    assert Ended({"a": 0, "b": 137}).code() == 137
    assert Ended({"a": 255, "b": 77}, lost=["a"]).code() == 77
    assert Ended({"a": 255}, lost=["a"]).code() == SSH_FAILED
