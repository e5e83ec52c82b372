"""Parts: an interrupted suite resumes, by one process or several, and the numbers are those of one that was not."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks, values

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from eval.results import parts
from eval.results.parts import Parts, part_path, read_part
from eval.results.schema import read_result

REPOSITORY = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).parents[1] / "interrupted_case.py"


def start(folder: Path, log: Path, hang: int) -> subprocess.Popen[str]:
    words = [sys.executable, str(PROGRAM), str(folder), str(log), str(hang)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def numbers(folder: Path) -> dict[str, Any]:
    raw = json.loads((folder / "parts.json").read_text())
    return {key: value for key, value in raw.items() if key not in ("seconds", "created")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    assert start(folder / "out", folder / "log", -1).wait(60) == 0
    return folder / "out"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_killed_in_the_middle_and_then_finished(
    tmp_path: Path, uninterrupted: Path, number: signal.Signals, status: int
) -> None:
    folder, log = tmp_path / "out", tmp_path / "log"
    process = start(folder, log, 3)
    deadline = time.monotonic() + 60
    while "3" not in lines(log) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) == status
    assert lines(log) == ["0", "1", "2", "3"]
    assert not (folder / "parts.json").exists()
    damaged = part_path(next((folder / ".unfinished").iterdir()), "part 1")
    damaged.write_text(damaged.read_text()[:-9])

    log.unlink()
    again = start(folder, log, -1)
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert lines(log) == ["1", "3", "4"]  # what is whole is not computed again
    assert "2 of 5 parts are there already" in out
    assert numbers(folder) == numbers(uninterrupted)
    assert (folder / "parts.samples.jsonl").read_bytes() == (uninterrupted / "parts.samples.jsonl").read_bytes()
    assert not (folder / ".unfinished").exists()


def test_what_comes_back_has_been_through_json_whether_kept_or_not(tmp_path: Path) -> None:
    jobs = [("a", lambda: {"x": (1, 2.5), "y": {3: math.nan}}), ("b", lambda: None)]
    for each in (Parts(), Parts(tmp_path), Parts(tmp_path)):
        first, second = each.map(jobs)
        assert first["x"] == [1, 2.5]
        assert math.isnan(first["y"]["3"])
        assert second is None
    with pytest.raises(AssertionError, match="parts of one name"):
        Parts().map([("a", lambda: 1), ("a", lambda: 2)])


@pytest.mark.parametrize("damage", ["cut", "value changed", "other part", "not text"])
def test_a_damaged_part_is_computed_again(tmp_path: Path, damage: str) -> None:
    Parts(tmp_path).map([("a", lambda: [1, 2, 3]), ("b", lambda: 4)])
    path = part_path(tmp_path, "a")
    text = path.read_text()
    assert read_part(path, "a") == "[1, 2, 3]"
    content = {
        "cut": text[:-3].encode(),
        "value changed": text.replace("[1, 2, 3]", "[1, 2, 4]").encode(),
        "other part": part_path(tmp_path, "b").read_bytes(),
        "not text": b"\xff\n\xff\n",
    }
    path.write_bytes(content[damage])
    assert read_part(path, "a") is None
    assert Parts(tmp_path).map([("a", lambda: "new"), ("b", lambda: "not used")]) == ["new", 4]


def test_a_part_that_cannot_be_kept_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"part a cannot be kept in .*file"):
        Parts(tmp_path / "file").map([("a", lambda: 1)])


def test_a_folder_removed_by_another_evaluation_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two evaluations of one key: the one that finishes first removes the parts of both, at any moment."""
    folder, removals = tmp_path / "parts", [1, 2]

    def write(path: Path, data: bytes, *, shared: bool) -> None:
        if removals:
            removals.pop()
            shutil.rmtree(folder)
        write_atomic(path, data, shared=shared)

    monkeypatch.setattr(parts, "write_atomic", write)
    assert Parts(folder).map([("a", lambda: 1)]) == [1]
    assert read_part(part_path(folder, "a"), "a") == "1"
    removals.extend([1, 2, 3])
    with pytest.raises(UserError, match="disappears while parts are written"):
        Parts(folder).map([("b", lambda: 1)])


# --- several processes; each function runs in all of them -------------------------------------------------------------


def shared(folder: str, log: str) -> dict[str, Any]:
    """Map twice: seven parts whose values depend on a generator, then one that uses theirs."""
    import torch

    from eval.results.parts import Parts
    from eval.team import join

    def job(number: int) -> list[float]:
        with open(log, "a") as file:
            file.write(f"{os.environ.get('RANK', '0')}:{number}\n")
        torch.manual_seed(number)
        return (torch.randn(40, 40) @ torch.randn(40, 3)).flatten().tolist()

    with join() as team, team.alike():
        parts = Parts(Path(folder), team)
        values = parts.map([(f"{number}", lambda number=number: job(number)) for number in range(7)])
        total = parts.one("sum", lambda: float(sum(map(sum, values))))
        return {"values": values, "total": total, "rank": team.rank, "first": team.first(lambda: team.rank)}


def mistaken(kind: str, log: str) -> str:
    """A mistake of process 1, or of two parts, in different places; the message that each process gets."""
    from data_pipeline.errors import UserError
    from eval.results.parts import Parts
    from eval.team import SharedError, join

    def job(number: int) -> int:
        if kind == "parts" and number >= 1:
            raise UserError(f"part {number} is wrong")
        if kind == "crash" and number == 1:
            raise ZeroDivisionError
        return number

    with join() as team:
        try:
            with team.alike():
                if kind == "before" and team.rank == 1:
                    raise UserError("no such file on process 1")
                values = Parts(None, team).map([(f"{n}", lambda n=n: job(n)) for n in range(4)])
                if kind == "after" and team.rank == 1:
                    raise UserError("process 1 does not like it")
                assert values == [0, 1, 2, 3]
        except SharedError as error:
            caught = str(error)
        assert team.gather(team.rank) == [0, 1]  # they are in step again
        return caught


def test_parts_are_divided_and_the_numbers_are_those_of_one_process(tmp_path: Path) -> None:
    alone = shared(str(tmp_path / "one"), str(tmp_path / "log1"))
    together = values(run_ranks(shared, 2, folder=str(tmp_path / "two"), log=str(tmp_path / "log2")))
    assert [end["rank"] for end in together] == [0, 1]
    for end in together:
        assert end["values"] == alone["values"]  # to the bit
        assert end["total"] == alone["total"]
        assert end["first"] == 0
    assert sorted(lines(tmp_path / "log2")) == ["0:0", "0:2", "0:4", "0:6", "1:1", "1:3", "1:5"]

    for number in (0, 2, 5):  # one of the three would be left to process 0 if it took its share of all
        part_path(tmp_path / "two", str(number)).unlink()
    (tmp_path / "log2").unlink()
    again = values(run_ranks(shared, 2, folder=str(tmp_path / "two"), log=str(tmp_path / "log2")))
    assert sorted(lines(tmp_path / "log2")) == ["0:0", "0:5", "1:2"]
    assert [end["values"] for end in again] == [alone["values"]] * 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("parts", "part 1 is wrong"),  # the first of them, whoever met it
        ("before", "no such file on process 1"),
        ("after", "process 1 does not like it"),
    ],
)
def test_a_mistake_of_one_process_is_raised_by_all(tmp_path: Path, kind: str, message: str) -> None:
    assert values(run_ranks(mistaken, 2, timeout=60, kind=kind, log="")) == [message, message]


def test_a_crash_of_one_process_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    first, second = run_ranks(mistaken, 2, timeout=60, kind="crash", log="")
    assert time.monotonic() - began < 30
    assert "ZeroDivisionError" in second.output
    assert "process 0: another process of this evaluation went away" in first.output
    assert (first.code, second.code) == (1, 1)


def test_the_result_says_how_many_processes_there_were(uninterrupted: Path) -> None:
    assert read_result(uninterrupted / "parts.json").environment["processes"] == 1
