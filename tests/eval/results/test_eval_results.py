"""The result schema: round trip, stable keys, nothing run twice, damage noticed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from eval.results.schema import (
    Estimator,
    Grid,
    Metric,
    ModelInfo,
    Outcome,
    Series,
    Table,
    read_result,
    read_result_or_none,
)
from eval.results.store import obtain, result_key

MODEL = ModelInfo("abc", "run", "clm", "nystrom", 10, 20)
PINNED = "a2119c6c4d2d40566db420a08e5cbc844a66868a7b2080486c5c11f625b8a48e"
OUTCOME = Outcome(
    {"accuracy": Metric(0.5, True, 0.1, 3), "loss": Metric(1.25, False)},
    [Table("t", ["a", "b"], [["x", 1.5], ["ü", None], ["z", True]])],
    [Series("s", [1.0, 2.0], [3.0, 4.0], "x", "y")],
    [Grid("g", ["a"], ["b", "c"], [[0.5], [None]], "x", "y", low=0.0)],
    [{"kind": "continuation", "text": "<b>"}],
    [{"id": "1", "correct": 1}, {"id": "2", "correct": 0}],
    {"accuracy": Estimator("correct")},
)


def run(path: Path, compute=lambda: OUTCOME, **changes):  # type: ignore[no-untyped-def]
    arguments = {
        "task": "lm", "version": 1, "model": MODEL, "settings": {"seq_len": 8, "x": [1, 2]}, "data": {"hash": "d"},
        "gate": "passed",
    } | changes  # fmt: skip
    return obtain(path.parent, path.stem, compute=lambda parts: compute(), **arguments)


def test_round_trip(tmp_path: Path) -> None:
    result, fresh = run(tmp_path / "deep" / "lm.json")
    assert fresh
    assert read_result(tmp_path / "deep" / "lm.json") == result
    raw = json.loads((tmp_path / "deep" / "lm.json").read_text())
    assert raw["metrics"]["loss"] == {"value": 1.25, "higher_is_better": False}
    assert {"schema", "task", "key", "model", "settings", "data", "metrics", "tables", "series", "samples"} <= set(raw)
    names = sorted(p.name for p in (tmp_path / "deep").iterdir())
    assert names == ["finished", "lm.json", "lm.samples.jsonl"]  # no temporary file is left


def test_finished_key_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "lm.json"
    first, _ = run(path)

    def never() -> Outcome:
        raise AssertionError("computed again")

    again, fresh = run(path, never)
    assert not fresh
    assert again == first
    _, fresh = run(path, rerun=True)
    assert fresh
    for change in (
        {"settings": {"seq_len": 9, "x": [1, 2]}},
        {"data": {"hash": "other"}},
        {"version": 2},
        {"model": replace(MODEL, weights_hash="other")},
        {"model": replace(MODEL, config_hash="other")},
        {"model": replace(MODEL, tokenizer_hash="other")},
    ):
        with pytest.raises(AssertionError, match="computed again"):
            run(path, never, **change)
    assert read_result(path).key == first.key  # a failed computation leaves the old result


def test_key_does_not_depend_on_order_and_is_pinned() -> None:
    by = {"code": "c", "torch": "2.6", "device": "cpu"}
    a = result_key("lm", 1, ModelInfo("w"), {"a": 1, "b": None}, "d", by)
    assert a == result_key("lm", 1, ModelInfo("w", run="another name"), {"b": None, "a": 1}, "d", by)
    assert all(a != result_key("lm", 1, ModelInfo("w"), {"a": 1, "b": None}, "d", by | {part: "other"}) for part in by)
    # Pinned: if this changes, every stored result is computed anew. Raise SCHEMA when that is meant.
    assert a == PINNED


def test_not_finite_numbers_are_null(tmp_path: Path) -> None:
    path = tmp_path / "lm.json"
    run(path, lambda: Outcome({"perplexity": Metric(math.inf, False)}, [Table("t", ["a"], [[math.nan]])]))
    raw = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert raw["metrics"]["perplexity"]["value"] is None
    assert math.isnan(read_result(path).metrics["perplexity"].value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 99}', '{"schema": 2}', '{"schema": 2, "model": 3}'])
def test_damaged_files_are_user_errors_and_computed_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lm.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"lm\.json"):
        read_result(path)
    assert read_result_or_none(path) is None
    _, fresh = run(path)
    assert fresh
    read_result(path)


def test_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no evaluation result"):
        read_result(tmp_path / "none.json")
