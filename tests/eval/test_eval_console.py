"""What the terminal says: the verdict, what numbers are of, results of other weights, how far long work is."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from eval.cli import main
from eval.console import aligned, describe, print_table, table_lines
from eval.results.schema import Metric, ModelInfo, Result, Table, read_result, write_result
from eval.runner import outdated
from eval.shared.progress import Progress, about, bars_on_terminals_only
from eval.tasks.validity import CHECKS_TABLE


def result(
    task: str, metrics: dict[str, Metric], tables: list[Table] | None = None, model: ModelInfo | None = None
) -> Any:
    about_it = model or ModelInfo("weights", "run", "clm", "nystrom", 10, 1_200_000)
    return Result(task, task, "key", about_it, {}, {"hash": "d"}, metrics, tables or [], [], [], [], {},
                  {"count": 0, "sha256": ""}, "passed", 1.0, "", {})  # fmt: skip


def gate(*passed: bool) -> Any:
    table = Table(
        CHECKS_TABLE, ["check", "measured", "bound", "passed", "detail"], [["c", 0.0, "", p, ""] for p in passed]
    )
    return result("validity", {"passed": Metric(float(all(passed)), True, n=len(passed), unit="checks")}, [table])


def test_the_table_says_verdict_units_and_values(capsys: Any) -> None:
    """The gate was "passed 1.0000", and n was tokens, passages or seeds under one heading."""
    metrics = {
        "loss": Metric(3.5, False, n=123_456, low=3.4, high=3.6, unit="tokens"),
        "accuracy": Metric(0.5, True, std=0.1, n=3, unit="seeds"),
        "old": Metric(0.5, True, std=0.1, n=1),
        "unknown": Metric(0.5, True, n=7),
        "bare": Metric(float("nan"), None),
    }
    print_table([("validity", gate(True, True), True), ("other", gate(True, False, False), True)], Path("eval"))
    print_table([("lm", result("lm", metrics), True)], Path("eval"))
    rows = [[cell for cell in line.split("  ") if cell] for line in capsys.readouterr().out.splitlines()]
    cells = {tuple(cell.strip() for cell in row) for row in rows}
    assert ("validity", "passed", "all 2 checks") in cells
    assert ("other", "FAILED", "2 of 3 checks") in cells
    assert ("lm", "loss", "3.5000 [3.4000, 3.6000]", "123,456 tokens") in cells
    assert ("accuracy", "0.5000 ± 0.1000", "3 seeds") in cells
    assert ("old", "0.5000 ± 0.1000", "1 seed") in cells
    assert ("unknown", "0.5000", "7") in cells
    assert ("bare", "not finite") in cells
    assert describe(metrics["loss"]) == "3.5000 [3.4000, 3.6000]"
    assert table_lines(Table("t", ["a", "b"], [["x", None], ["y", 0.25]], "A note.")) == [
        "a  b", "-  ------", "x", "y  0.2500", "A note.",
    ]  # fmt: skip


def test_results_of_other_weights_are_named(tmp_path: Path) -> None:
    """Evaluated at 520k tokens, trained on, evaluated in part: what is left is of the old weights."""
    now = ModelInfo("weights", "run", "clm", "nystrom", 10, 1_200_000)
    for name, model in {
        "lm": now,
        "classify": replace(now, weights_hash="older", tokens=520_000),
        "context": replace(now, weights_hash="older", tokens=520_000),
        "generate": replace(now, weights_hash="other"),
        "lra": ModelInfo(),
    }.items():
        write_result(tmp_path / f"{name}.json", result(name, {}, model=model))
    assert read_result(tmp_path / "classify.json").model.tokens == 520_000
    (tmp_path / "notes.json").write_text("{}")
    these = "these are weights, 1,200,000): evaluate again"
    assert outdated(tmp_path, now, {"lm"}) == [
        f"classify, context: still of other weights (older, 520,000 tokens seen; {these}",
        f"generate: still of other weights (other, 1,200,000 tokens seen; {these}",
    ]
    assert outdated(tmp_path, now, {"classify", "context", "generate"}) == []


def test_long_work_says_how_far_it_is_where_there_is_no_terminal(capsys: Any) -> None:
    now = [0.0]
    with Progress(10, "fit", "step", clock=lambda: now[0]) as progress:
        for step in range(10):
            now[0] += 20
            progress.remark(f"loss {step}")
            progress.update()
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "fit: 2 of 10 steps, about 3 min left (loss 1)",
        "fit: 4 of 10 steps, about 2 min left (loss 3)",
        "fit: 6 of 10 steps, about 80 s left (loss 5)",
        "fit: 8 of 10 steps, about 40 s left (loss 7)",
    ]
    assert captured.err == ""
    with Progress(3, "short", "step", clock=lambda: now[0]) as progress:  # nothing to say about
        progress.update(3)
    assert capsys.readouterr().out == ""
    assert [about(seconds) for seconds in (0.2, 89, 400, 9000)] == [
        "about 1 s",
        "about 89 s",
        "about 7 min",
        "about 2.5 h",
    ]


def test_bars_of_libraries_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(**options: Any) -> str:
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        list(tqdm(range(3), **options))
        return stream.getvalue()

    before = vars(tqdm)["__init__"]
    assert "3/3" in drawn()
    with bars_on_terminals_only():
        assert drawn() == drawn(disable=False) == drawn(disable=True) == ""
    assert vars(tqdm)["__init__"] is before
    assert "3/3" in drawn()


def test_the_last_column_is_wrapped_to_the_width() -> None:
    rows = [("suite", "what it is"), ("lm", "held-out loss and perplexity of windows"), ("x", "")]
    whole = ["suite  what it is", f"-----  {'-' * 39}", "lm     held-out loss and perplexity of windows", "x"]
    assert aligned(rows).split("\n") == aligned(rows, 80).split("\n") == whole
    narrow = [
        "suite  what it is",
        f"-----  {'-' * 21}",
        "lm     held-out loss and",
        "       perplexity of windows",
        "x",
    ]
    assert aligned(rows, 31).split("\n") == narrow
    assert aligned(rows, 5).split("\n") == narrow  # a column of text never gets narrower


@pytest.mark.parametrize("words", [["list"], ["list", "lm"]])
def test_the_list_fits_a_terminal_and_has_a_line_each_in_a_pipe(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    assert main(words) == 0
    piped = capsys.readouterr().out.splitlines()
    assert max(map(len, piped)) > 100
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 90
    assert " ".join("".join(shown).split()).count("held-out loss") == "".join(piped).count("held-out loss")
    assert len(shown) > len(piped)
