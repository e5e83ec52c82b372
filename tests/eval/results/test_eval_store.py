"""Results by content: nothing finished is computed again, damage is noticed, two writers leave whole results."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import UserError
from eval.results import store
from eval.results.parts import Parts
from eval.results.records import finished_folder, read_records, samples_path
from eval.results.schema import Metric, ModelInfo, Outcome, Result, read_result, write_result
from eval.results.store import KEEP_UNFINISHED_DAYS, UNFINISHED, obtain, remove_leftovers

# A line separator within a record must not be taken for the end of a line.
RECORDS = [{"id": str(i), "text": "ü\u2028", "nats": i / 3} for i in range(20)]


def outcome(value: float, records: int = 20) -> Outcome:
    return Outcome({"loss": Metric(value, False)}, records=RECORDS[:records])


def ask(folder: Path, length: int, compute: Callable[[Parts], Outcome] | None = None, **more: Any) -> Any:
    return obtain(
        folder, more.pop("suite", "lm"), task="lm", version=1, model=ModelInfo("w"), settings={"length": length},
        data={"hash": "d"}, gate=more.pop("gate", "passed"), compute=compute or (lambda _: outcome(length)), **more,
    )  # fmt: skip


def never(_: Parts) -> Outcome:
    raise AssertionError("computed again")


def test_a_result_is_read_again_after_another_was_asked_for(tmp_path: Path) -> None:
    first, _ = ask(tmp_path, 8)
    second, fresh = ask(tmp_path, 16, lambda _: outcome(16, records=7))
    assert fresh
    assert read_result(tmp_path / "lm.json") == second
    assert len(read_records(tmp_path / "lm.json")) == 7
    again, fresh = ask(tmp_path, 8, never)
    assert (again, fresh) == (first, False)
    assert read_result(tmp_path / "lm.json") == first  # the one last asked for
    assert read_records(tmp_path / "lm.json") == RECORDS
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json*")}
    ask(tmp_path, 8, never)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json*")} == before


def test_a_result_without_records_leaves_none_of_the_one_before(tmp_path: Path) -> None:
    ask(tmp_path, 8)
    ask(tmp_path, 16, lambda _: outcome(16, records=0))
    assert not (tmp_path / "lm.samples.jsonl").exists()
    assert read_records(tmp_path / "lm.json") == []


def test_another_name_finds_the_same_result(tmp_path: Path) -> None:
    ask(tmp_path, 8)
    result, fresh = ask(tmp_path, 8, never, suite="lm-short")
    assert not fresh
    assert result.suite == "lm-short"
    assert read_result(tmp_path / "lm-short.json") == result
    assert read_records(tmp_path / "lm-short.json") == RECORDS


def test_the_verdict_of_today_stands_in_a_stored_result(tmp_path: Path) -> None:
    ask(tmp_path, 8, gate="forced")
    assert ask(tmp_path, 8, never, gate="passed")[0].gate == "passed"
    assert read_result(tmp_path / "lm.json").gate == "passed"
    assert ask(tmp_path, 8, never, gate="forced")[0].gate == "forced"
    assert read_result(tmp_path / "lm.json").gate == "forced"


@pytest.mark.parametrize("place", ["finished", "asked for"])
def test_either_place_restores_the_other(tmp_path: Path, place: str) -> None:
    result, _ = ask(tmp_path, 8)
    own = finished_folder(tmp_path, result.key) / "result.json"
    lost = own if place == "finished" else tmp_path / "lm.json"
    samples_path(lost).unlink()
    lost.unlink()
    assert not ask(tmp_path, 8, never)[1]
    assert read_result(lost) == result
    assert read_records(lost) == RECORDS


@pytest.mark.parametrize("name", ["result.json", "samples.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_what_is_damaged_in_both_places_is_computed_again(tmp_path: Path, name: str, damage: str) -> None:
    result, _ = ask(tmp_path, 8)
    own = finished_folder(tmp_path, result.key)
    for path in (own / name, tmp_path / ("lm.json" if name == "result.json" else "lm.samples.jsonl")):
        text = path.read_text(encoding="utf-8")
        if damage == "gone":
            path.unlink()
        elif damage == "cut":
            path.write_text(text[: len(text) // 2], encoding="utf-8")
        elif name == "result.json":
            path.write_text(text.replace(result.key, "0" * 64), encoding="utf-8")
        else:
            path.write_text(text.replace('"nats": 0.0', '"nats": 9.0'), encoding="utf-8")
    with pytest.raises(AssertionError, match="computed again"):
        ask(tmp_path, 8, never)
    assert ask(tmp_path, 8)[1]
    assert read_records(tmp_path / "lm.json") == RECORDS


def test_records_that_are_not_the_result_s_are_refused(tmp_path: Path) -> None:
    result, _ = ask(tmp_path, 8)
    path = tmp_path / "lm.samples.jsonl"
    path.write_text('{"id": "other"}\n')
    assert read_records(tmp_path / "lm.json") == RECORDS  # from the finished ones
    samples_path(finished_folder(tmp_path, result.key) / "result.json").unlink()
    with pytest.raises(UserError, match=r"lm\.samples\.jsonl does not hold the records .* evaluate again with --rerun"):
        read_records(tmp_path / "lm.json")
    path.unlink()
    with pytest.raises(UserError, match=r"lm\.samples\.jsonl is missing"):
        read_records(tmp_path / "lm.json")
    with pytest.raises(UserError, match="no evaluation result"):
        read_records(tmp_path / "other.json")


def test_numbers_of_records_that_are_not_finite_are_null(tmp_path: Path) -> None:
    ask(tmp_path, 8, lambda _: Outcome({}, records=[{"id": "1", "nats": float("inf")}]))
    line = (tmp_path / "lm.samples.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == {"id": "1", "nats": None}


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"result lm cannot be written to .*file: Not a directory"):
        ask(tmp_path / "file", 8)


def test_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    old, young = tmp_path / UNFINISHED / "old", tmp_path / UNFINISHED / "young"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "part.json").touch()
    (tmp_path / "lm.json.12ab.tmp").touch()
    now = time.time()
    for path in (old, tmp_path / "lm.json.12ab.tmp"):
        os.utime(path, (now, now - (KEEP_UNFINISHED_DAYS + 1) * 86400))
    os.utime(young, (now, now - (KEEP_UNFINISHED_DAYS - 1) * 86400))
    ask(tmp_path, 8)  # a suite that ends cleans up
    assert young.is_dir()
    assert not old.exists()
    assert not (tmp_path / "lm.json.12ab.tmp").exists()
    remove_leftovers(tmp_path, now + 2 * 86400)
    assert not (tmp_path / UNFINISHED).exists()


def _writer(folder: Path, number: int) -> None:
    for turn in range(25):
        ask(folder, turn % 3, lambda _, n=5 * (number + 1) + turn % 3: outcome(n, n), rerun=turn % 2 == 0)


def test_two_evaluations_into_one_folder_do_not_corrupt_it(tmp_path: Path) -> None:
    """The number of records says who wrote them; the two disagree, as on GPUs, and every pair of files must agree."""
    ask(tmp_path, 0, lambda _: outcome(3, 3))
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_writer, args=(tmp_path, number)) for number in (0, 1)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        read_result(tmp_path / "lm.json")  # whole at every moment
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    results = [tmp_path / "lm.json", *tmp_path.glob("finished/*/result.json")]
    assert len(results) == 4
    for path in results:
        result: Result = read_result(path)
        assert len(samples_path(path).read_bytes().decode().split("\n")) - 1 == result.records["count"]
        assert len(read_records(path)) == result.metrics["loss"].value
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_result_and_its_records_are_replaced_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is held up between its records and its result; the second must wait for it."""
    between = threading.Event()

    def slowly(path: Path, result: Result) -> None:
        if result.metrics["loss"].value == 5:
            between.set()
            time.sleep(0.2)
        write_result(path, result)

    monkeypatch.setattr(store, "write_result", slowly)
    first = threading.Thread(target=ask, args=(tmp_path, 1, lambda _: outcome(5, 5)))
    first.start()
    assert between.wait(10)
    ask(tmp_path, 1, lambda _: outcome(7, 7), rerun=True)
    first.join()
    for path in (tmp_path / "lm.json", *tmp_path.glob("finished/*/result.json")):
        assert len(samples_path(path).read_text(encoding="utf-8").split("\n")) - 1 == read_result(path).records["count"]
