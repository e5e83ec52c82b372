"""What the report marks as best, when it takes a difference, how it draws, and whether it can be read."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_case import make_run, write, write_everything

from data_pipeline.report.base import style
from eval.report.charts import NUM_COLOURS
from eval.report.compare import Member, best_of, differences
from eval.report.curves import charts_of
from eval.report.heatmap import DARK_TURNS, LIGHT_TURNS, Scale, heatmap, scale_of, short, text_class
from eval.report.numbers import measure, number, title, visible
from eval.report.page import FOLDER
from eval.report.runs import Run, flatten, read_run
from eval.report.samples import Continued, Filled, Other, samples_of
from eval.report.summary import scores
from eval.report.tables import config_differences, joined_tables
from eval.results.comparable import unequal
from eval.results.schema import Grid, Metric, ModelInfo, Outcome, Series, Table
from eval.results.statistics import paired_bootstrap


def members(root: Path, outcomes: dict[str, Outcome], **kwargs: Any) -> list[Member]:
    """One result of the task "t" for each run name."""
    found = []
    for index, (name, outcome) in enumerate(outcomes.items()):
        run = make_run(root, name)
        write(run / "eval", "t", outcome, **kwargs)
        read = read_run(run)
        found.append(Member(index, read, read.results["t"]))
    return found


@pytest.mark.parametrize(
    ("metrics", "best"),
    [
        ([Metric(0.9, True, 0.01), None, Metric(0.8, True, 0.02)], 0),
        ([Metric(0.9, True, 0.01), Metric(0.88, True, 0.03)], None),
        ([Metric(3.0, False), Metric(2.0, False)], 1),
        ([Metric(3.0, False), None], None),
        ([Metric(float("nan"), False), Metric(2.0, False)], None),
        ([Metric(3.0, None), Metric(2.0, None)], None),
        # Intervals over items decide where there are any,
        ([Metric(0.9, True, 0.01, 9, 0.85, 0.95), Metric(0.8, True, 0.01, 9, 0.74, 0.86)], None),
        ([Metric(0.9, True, 0.2, 9, 0.85, 0.95), Metric(0.8, True, 0.2, 9, 0.74, 0.84)], 0),
        # and one that is far behind but wide can still meet the first.
        ([Metric(5.0, False), Metric(6.0, False), Metric(8.0, False, None, 9, 4.0, 12.0)], None),
        ([Metric(2.0, False), Metric(2.0, False)], None),
    ],
)
def test_best_is_marked_only_where_the_intervals_do_not_meet(metrics: list[Metric | None], best: int | None) -> None:
    assert best_of(metrics) == best


def test_results_are_comparable_on_the_same_data_with_the_same_settings(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    outcome = Outcome({"m": Metric(1.0, True)})
    for suite, settings, data in (
        ("a", {"length": 64, "precision": "fp32"}, {"hash": "d"}),
        ("b", {"length": 64, "precision": "bf16"}, {"hash": "d", "path": "elsewhere"}),
        ("c", {"length": 32, "precision": "fp32"}, {"hash": "d"}),
        ("d", {"length": 64, "precision": "fp32"}, {"hash": "e"}),
    ):
        write(run / "eval", "t", outcome, suite=suite, settings=settings, data=data)
    results = read_run(run).results
    assert unequal([results["a"], results["b"]]) == []
    assert unequal([results["a"], results["c"]]) == ["setting length"]
    assert unequal([results["a"], results["d"]]) == ["data"]
    assert unequal([results["a"], replace(results["a"], version=2)]) == ["version of the task"]
    masked = replace(results["a"], model=replace(results["a"].model, objective="mlm"))
    assert unequal([results["a"], masked]) == ["objective"]
    assert unequal([replace(result, task="classify") for result in (results["a"], masked)]) == []


def test_differences_are_paired_over_the_records(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name) for name in ("one", "two", "three")]
    write_everything(runs[0])
    write_everything(runs[1], shift=0.08)
    write_everything(runs[2], shift=0.08)
    with (runs[2] / "eval" / "lm.samples.jsonl").open("a") as file:
        file.write("\n")  # no longer the file that the result was computed from
    shutil.rmtree(runs[2] / "eval" / "finished")  # nor is the other copy there
    group = [Member(i, read, read.results["lm"]) for i, read in enumerate(map(read_run, runs))]
    (row,) = differences(group)
    lines = [(run / "eval" / "lm.samples.jsonl").read_text().splitlines() for run in runs[:2]]
    first, second = ([json.loads(line) for line in part] for part in lines)
    expected = paired_bootstrap(first, second, group[0].result.estimators["perplexity"])
    assert (row.metric, row.member.run.name, row.first.run.name, row.n) == ("perplexity", "two", "one", 300)
    assert (row.value, row.low, row.high, row.p) == (expected.value, expected.low, expected.high, expected.p)
    assert row.verdict == "worse"  # a higher perplexity
    (back,) = differences([group[1], group[0]])
    assert back.verdict == "better"
    assert back.value == pytest.approx(-row.value)


def test_tables_of_runs_are_joined_where_their_columns_are_the_same(tmp_path: Path) -> None:
    table = Table("t", ["a", "b"], [["x", 1]], "the same note")
    group = members(
        tmp_path,
        {
            "one": Outcome({}, [table]),
            "two": Outcome({}, [table]),
            "three": Outcome({}, [Table("t", ["a", "c"], [["y", None]], "another note")]),
        },
    )
    joined = joined_tables(group)
    assert [(t.columns, len(t.rows), t.notes) for t in joined] == [
        (["a", "b"], 2, ["the same note"]),
        (["a", "c"], 1, ["another note"]),
    ]
    assert joined[0].numeric == [False, True]


def test_a_note_that_not_all_runs_share_says_whose_it_is(tmp_path: Path) -> None:
    def outcome(note: str) -> Outcome:
        return Outcome({}, [Table("t", ["a"], [[1]], note)])

    group = members(tmp_path, {"one": outcome("said by two"), "two": outcome("alone"), "three": outcome("said by two")})
    notes = ["one, three: said by two", "two: alone"]
    assert joined_tables(group)[0].notes == notes
    assert joined_tables([group[0], group[2]])[0].notes == ["said by two"]
    assert joined_tables(group[1:2])[0].notes == ["alone"]


def test_the_summary_sets_the_networks_of_long_range_arena_side_by_side(tmp_path: Path) -> None:
    for suite, softmax in (("lra", 0.3), ("lra-text", 0.6)):  # of other data, so that neither stands for the other
        outcome = Outcome(
            {
                "accuracy_softmax": Metric(softmax, True),
                "accuracy_nystrom": Metric(softmax + 0.05, True),
                "nystrom_minus_softmax": Metric(0.05, True),
                "majority_accuracy": Metric(0.1, True),
            }
        )
        write(tmp_path / "lra", "lra", outcome, suite=suite, model=ModelInfo(), gate="none", data={"hash": suite})
    found = [(row.label, row.figures[0].text) for row in scores([read_run(tmp_path / "lra")])]
    assert [row for row in found if row[0].startswith("Long Range Arena")] == [
        ("Long Range Arena accuracy, softmax", "0.300"),
        ("Long Range Arena accuracy, softmax (lra-text)", "0.600"),
        ("Long Range Arena accuracy, Nyström", "0.350"),
        ("Long Range Arena accuracy, Nyström (lra-text)", "0.650"),
        ("Long Range Arena, Nyström minus softmax", "0.050"),
        ("Long Range Arena, Nyström minus softmax (lra-text)", "0.050"),
    ]


def test_curves_of_one_chart_share_a_picture(tmp_path: Path) -> None:
    x, y = [1.0, 2.0], [3.0, 4.0]

    def outcome(names: int) -> Outcome:
        own = [Series(f"s{i}", x, y, "x", "y", chart="both") for i in range(names)]
        published = Series("published", x, y, "x", "y", chart="both", reference=True)
        return Outcome({}, series=[*own, published, Series("other", x, y, "x", "y", low=y, high=y)])

    group = members(tmp_path, {"one": outcome(2), "two": outcome(2)})
    both, other = charts_of(group, "context")
    assert [line.label for line in both.lines] == ["one: s0", "one: s1", "two: s0", "two: s1", "published"]
    assert [line.colour for line in both.lines] == [0, 0, 1, 1, None]  # the reference once, without a colour
    assert [line.dash for line in both.lines[:4]] == [0, 1, 0, 1]
    assert [line.label for line in other.lines] == ["one", "two"]
    assert "Shaded" in other.caption
    assert "Shaded" not in both.caption
    (alone, _) = charts_of(group[:1], "context")
    assert [(line.label, line.colour) for line in alone.lines[:2]] == [("s0", 0), ("s1", 1)]
    prefixed = [Series(f"loss, {name}", x, y, "x", "y", chart="c") for name in ("model", "control")]
    (chart,) = charts_of(members(tmp_path / "prefixed", {"one": Outcome({}, series=prefixed)}), "context")
    assert [line.label for line in chart.lines] == ["model", "control"]
    crowded = charts_of(members(tmp_path / "more", {"one": outcome(5), "two": outcome(5)}), "context")
    assert [chart.title for chart in crowded] == ["both: one", "both: two", "other"]


def test_references_that_differ_between_runs_say_whose_they_are(tmp_path: Path) -> None:
    def outcome(scratch: float) -> Outcome:
        x, names = [1.0, 2.0], [("own", 3.0, False), ("from scratch", scratch, True), ("chance", 0.5, True)]
        return Outcome({}, series=[Series(n, x, [v, v], "x", "y", chart="c", reference=r) for n, v, r in names])

    (chart,) = charts_of(members(tmp_path, {"one": outcome(1.0), "two": outcome(2.0)}), "context")
    assert [line.label for line in chart.lines] == ["one", "two", "one: from scratch", "chance", "two: from scratch"]


def test_heat_map() -> None:
    grid = Grid("<g>", ["head 0", "head 1"], ["layer <0>"], [[None, 0.5]], "head", "layer", 0.0, 1.0)
    picture = str(heatmap(grid, scale_of([grid]), "<title>"))
    assert picture.count('fill="url(#hatch)"') == 1
    assert picture.count('class="high"') == 1
    assert 'fill-opacity="0.500"' in picture
    assert ">0.50</text>" in picture
    assert ">&lt;0&gt;</text>" in picture  # the axis' name is not repeated on its labels
    assert "<title>&lt;0&gt;, 0: none</title>" in picture
    assert 'aria-label="&lt;title&gt;"' in picture
    big = Grid("g", [str(i) for i in range(60)], ["0"], [[i / 60 for i in range(60)]], "x", "y")
    assert 'class="lo"' not in str(heatmap(big, scale_of([big]), "big"))  # no room for values
    empty = Grid("g", [], [], [], "x", "y")
    assert "<svg" in str(heatmap(empty, scale_of([empty]), "empty"))


def test_scale_of_heat_maps() -> None:
    grids = [Grid("g", ["a"], ["b"], [[value]], "x", "y") for value in (2.0, 5.0, None)]
    assert scale_of(grids) == Scale(2.0, 5.0)
    assert scale_of([Grid("g", ["a"], ["b"], [[0.3]], "x", "y", 0.1, 1.0)]) == Scale(0.1, 1.0)
    assert [Scale(2.0, 6.0).share(v) for v in (1.0, 3.0, 9.0)] == [0.0, 0.25, 1.0]
    assert Scale(2.0, 2.0).share(2.0) == 1.0
    assert [short(v, Scale(0, 1)) for v in (0.034, 1.0)] == ["0.03", "1.00"]
    shown = [short(v, Scale(0, 5000)) for v in (0.0, 0.034, 3.456, 42.4, 2e-5, 12345.0)]
    assert shown == ["0", "0.034", "3.46", "42", "2e-05", "12.3k"]


def test_samples_of_several_runs_stand_together(tmp_path: Path) -> None:
    def outcome(name: str, guess: int) -> Outcome:
        return Outcome(
            {},
            samples=[
                {"kind": "continuation", "prompt": "p", "text": name, "real": "r", "id": "i", "perplexity": 2.0},
                {"kind": "fill_mask", "parts": ["a", "b"],
                 "answers": [{"right": "x", "rank_in_top_5": guess, "top": [["x", 0.5]]}]},
                # Half a sample each: no part behind the hidden word, nothing guessed.
                {"kind": "fill_mask", "parts": ["a"],
                 "answers": [{"right": "x", "rank_in_top_5": guess, "top": [["x", 0.5]]}]},
                {"kind": "fill_mask", "parts": ["a", "b"], "answers": [{"right": "x"}]},
                {"kind": "odd", "value": [1, None]},
            ],
        )  # fmt: skip

    found = samples_of(members(tmp_path, {"one": outcome("1", 1), "two": outcome("2", 2)}))
    continued, filled, *others = found
    assert isinstance(continued, Continued)
    assert [(m.run.name, text, known) for m, text, known in continued.answers] == [
        ("one", "1", [("perplexity", "2.000")]),
        ("two", "2", [("perplexity", "2.000")]),
    ]
    assert isinstance(filled, Filled)
    assert len(filled.answers) == 2
    assert not filled.hit(0)
    assert [(o.member.run.name, o.name) for o in others if isinstance(o, Other)] == [
        (run, kind) for run in ("one", "two") for kind in ("fill mask", "fill mask", "odd")
    ]
    assert isinstance(others[2], Other)
    assert others[2].items == [("value", "1, –")]


def test_numbers_and_differences_of_configurations() -> None:
    shown = [number(v) for v in (None, True, False, 1234567, 0.93214, 64.123, 12623.4, 0.0, 3e-7, "x", float("nan"))]
    assert shown == ["–", "pass", "FAIL", "1,234,567", "0.932", "64.12", "12,623", "0", "3.0e-07", "x", "not finite"]
    # As many digits on both sides of a bound, and no number that has to be counted out.
    assert [number(v) for v in (0.00069, 0.0020589, 1_124_148_737, 29953575.01)] == [
        "0.00069",
        "0.00206",
        "1.12B",
        "30M",
    ]
    assert measure("<= 0.0020589, 3 of 4, 1e-04") == "<= 0.00206, 3 of 4, 0.0001"
    assert visible(" the") == "the"
    assert visible("\n        ") == "↵␣×8"
    assert title("macro_f1") == "Macro F1"
    configs = [
        flatten({"a": {"b": 1}, "c": [{"d": 2}], "name": "x"}),
        flatten({"a": {"b": 1}, "c": [{"d": 3}], "name": "y"}),
    ]
    assert config_differences(configs, {"name"}) == [("c.0.d", ["2", "3"])]
    assert Run(Path("."), "x", {"model": "odd"}).objective == ""


def palettes() -> dict[str, dict[str, str]]:
    """The colours of the light and of the dark page by the names of their variables."""
    _, *blocks = style(FOLDER).split(":root {")  # of the base and of the report, each the light one and the dark one
    light1, dark1, light2, dark2 = (dict(re.findall(r"(--[\w-]+): #([0-9a-f]{6});", block)) for block in blocks)
    light = light1 | light2
    return {"light": light, "dark": light | dark1 | dark2}


def rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def contrast(one: list[float], other: list[float]) -> float:
    """Contrast ratio of two sRGB colours (WCAG 2.2)."""

    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_can_be_read(scheme: str) -> None:
    colours = palettes()[scheme]
    text = [(name, paper) for name in ("ink", "muted", "link", "bad") for paper in ("paper", "raised", "band")]
    text += [(name, f"{name}-paper") for name in ("good", "bad", "unsure")]
    text += [("ink", f"{name}-paper") for name in ("good", "bad", "unsure")]
    text += [("ink", "written"), ("muted", "written"), ("good", "paper"), ("good", "raised")]
    for name, paper in text:
        assert contrast(rgb(colours[f"--{name}"]), rgb(colours[f"--{paper}"])) >= 4.5, (name, paper)
    for index in range(1, NUM_COLOURS + 1):
        for paper in ("paper", "band", "raised"):
            assert contrast(rgb(colours[f"--c{index}"]), rgb(colours[f"--{paper}"])) >= 3, (index, paper)
    low, high = rgb(colours["--heat-low"]), rgb(colours["--heat-high"])
    for step in range(101):
        share = step / 100
        cell = [a + (b - a) * share for a, b in zip(low, high, strict=True)]
        assert contrast(rgb(colours[f"--on-{text_class(share)}"]), cell) >= 4.5, share
    assert [text_class(v) for v in (DARK_TURNS - 0.01, LIGHT_TURNS - 0.01, LIGHT_TURNS)] == ["lo", "mid", "hi"]
