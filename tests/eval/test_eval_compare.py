"""Two models compared: what the files say, what the bootstrap says, and what cannot be compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import run_cli
from eval import cli
from eval.report.compare import Member, differences
from eval.report.runs import read_run
from eval.report.tables import metric_rows, unequal_sentence
from eval.results.comparable import obstacle, unequal
from eval.results.schema import Estimator, Metric, ModelInfo, Outcome, read_result
from eval.results.statistics import paired_bootstrap
from eval.results.store import obtain

N = 200
NAMES = ("short", "long")


def write(folder: Path, weights: str, accuracy: float, suite: str = "classify", **changes: Any) -> list[dict[str, Any]]:
    """A result of ``N`` items of which about ``accuracy`` are right; those of two models are correlated."""
    hard = np.random.default_rng(0).random(N)
    own = np.random.default_rng(len(weights)).normal(0, 0.1, N)
    right = [int(level < accuracy) for level in hard + own]
    records = [{"id": f"i{i}", "correct": correct, "wrong": 1 - correct} for i, correct in enumerate(right)]
    value = sum(right) / N
    arguments: dict[str, Any] = {
        "task": "classify", "version": 1, "settings": {"train": f"/{weights}/train.csv", "lr": 0.1},
        "data": {"hash": "d", "train": f"/{weights}/train.csv", "test": "test.csv"}, "gate": "passed",
    } | changes  # fmt: skip
    outcome = Outcome(
        {
            "accuracy": Metric(value, True, n=N),
            "error": Metric(100 * (1 - value), False, n=N),
            "cut": Metric(0.25 + 0.25 * accuracy, False, std=0.1, n=3),
        },
        records=records,
        estimators={"accuracy": Estimator("correct"), "error": Estimator("wrong", scale=100)},
    )
    obtain(folder, suite, model=ModelInfo(weights, weights), compute=lambda _: outcome, **arguments)
    return records


def compare(*words: object) -> int:
    return run_cli(cli.main, "nystrom eval", ["compare", *map(str, words)])


def test_metrics_with_records_get_an_interval_and_others_a_difference(tmp_path: Path, capsys: Any) -> None:
    first = write(tmp_path / "a" / "eval", "a", 0.5)
    second = write(tmp_path / "bb" / "eval", "bb", 0.8)
    assert compare(tmp_path / "a", tmp_path / "bb" / "eval", "--out", tmp_path / "out.json") == 0
    (suite,) = json.loads((tmp_path / "out.json").read_text())["suites"]
    accuracy, error, cut = suite["metrics"]
    expected = paired_bootstrap(first, second, Estimator("correct"))
    assert accuracy["difference"] == pytest.approx(accuracy["b"] - accuracy["a"])
    assert accuracy["difference"] == pytest.approx(expected.value)
    assert [accuracy[key] for key in ("low", "high", "p", "n")] == [expected.low, expected.high, expected.p, N]
    assert accuracy["low"] > 0
    assert (accuracy["better"], error["better"]) == ("b", "b")
    assert error["high"] < 0  # fewer of them
    assert (cut["difference"], cut["low"], cut["std_a"], cut["better"]) == (pytest.approx(0.075), None, 0.1, "")
    out = capsys.readouterr().out
    assert "B is better" in out
    assert "± 0.1000" in out
    assert compare(tmp_path / "a", tmp_path / "bb" / "eval", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out.json").read_text())

    assert compare(tmp_path / "bb", tmp_path / "a", "--out", tmp_path / "out.json") == 0
    back = json.loads((tmp_path / "out.json").read_text())["suites"][0]["metrics"][0]
    assert (back["difference"], back["better"]) == (-accuracy["difference"], "a")


def test_the_table_says_what_each_number_is_over_and_a_shared_baseline_once(tmp_path: Path, capsys: Any) -> None:
    """A column n held items and seeds; half of the rows were the same baseline on both sides."""
    for name, accuracy, tokens, attention in (("a", 0.5, 520_000, "softmax"), ("bb", 0.8, 254_000, "nystrom")):
        write(tmp_path / name, name, accuracy)
        for path in (tmp_path / name).rglob("*.json"):
            raw = json.loads(path.read_text())
            raw["metrics"]["majority_accuracy"] = {"value": 0.25, "higher_is_better": True, "n": N, "unit": "texts"}
            raw["metrics"]["gain"] = {"value": accuracy, "higher_is_better": True, "n": N, "unit": "texts"}
            raw["model"] |= {"tokens": tokens, "attention": attention}
            path.write_text(json.dumps(raw))
    assert compare(tmp_path / "a", tmp_path / "bb", "--out", tmp_path / "out.json") == 0
    out = capsys.readouterr().out
    models = "tokens seen 520,000 and 254,000; attention softmax and nystrom"
    assert f"The models differ in more than their weights: {models}\n" in out
    over = {line.split("  ")[0]: line for line in (line.strip() for line in out.splitlines())}
    assert over["cut"].endswith(" 3 seeds")
    assert over["gain"].endswith(" 200 texts")
    assert " 200 items " in next(line for line in out.splitlines() if " accuracy " in line)
    assert "classify: the same in both: majority accuracy 0.2500\n" in out
    assert out.count("majority") == 1
    (suite,) = json.loads((tmp_path / "out.json").read_text())["suites"]
    assert suite["models"] == models
    assert [d["metric"] for d in suite["metrics"]] == ["accuracy", "error", "cut", "majority_accuracy", "gain"]
    assert [d["unit"] for d in suite["metrics"]] == ["items", "items", "seeds", "texts", "texts"]


def test_no_difference_is_said_where_there_is_none(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "a", "a", 0.6)
    write(tmp_path / "bb", "bb", 0.6)
    assert compare(tmp_path / "a" / "classify.json", tmp_path / "bb" / "classify.json") == 0
    assert "is better" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"hash": "e", "test": "other.csv"}}, "other data: test.csv and other.csv"),
        (
            {"data": {"hash": "e", "test": "test.csv", "prompts_hash": "p", "prompts": 2}},
            "other data: test.csv in both, but the content of the prompts differs; prompts None and 2",
        ),
        ({"settings": {"train": "/bb/train.csv", "lr": 0.2}}, "other settings: lr 0.1 and 0.2 (--ignore SETTING"),
        ({"gate": "forced"}, "the validity gate failed for B and was forced"),
        ({"version": 2}, "computed by versions 1 and 2"),
        ({"task": "lm"}, "other tasks: classify and lm"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path: Path, capsys: Any, changes: dict[str, Any], words: str) -> None:
    write(tmp_path / "a", "a", 0.5)
    write(tmp_path / "bb", "bb", 0.8, **changes)
    assert compare(tmp_path / "a", tmp_path / "bb") == 1
    assert f"classify: not compared: {words}" in capsys.readouterr().out
    if "settings" in changes:
        assert compare(tmp_path / "a", tmp_path / "bb", "--ignore", "lr") == 0


def test_figures_by_token_of_different_tokenizers_are_not_compared(tmp_path: Path, capsys: Any) -> None:
    """Tokens of one are not those of the other; bytes are."""
    for name, nats, per_passage in (("short", 1.0, 400), ("long", 3.0, 100)):
        records = [{"id": f"i{i}", "nats": nats * per_passage, "tokens": per_passage, "bytes": 400} for i in range(50)]
        obtain(
            tmp_path / name, "lm", task="lm", version=1, settings={}, data={"hash": "d"}, gate="passed",
            model=ModelInfo(name, objective="clm", tokenizer_hash=name),
            compute=lambda _, records=records, nats=nats, per_passage=per_passage: Outcome(
                {"loss": Metric(nats, False), "nats_per_byte": Metric(nats * per_passage / 400, False)},
                records=records,
                estimators={"loss": Estimator("nats", "tokens"), "nats_per_byte": Estimator("nats", "bytes")},
            ),
        )  # fmt: skip
    assert compare(tmp_path / "short", tmp_path / "long", "--out", tmp_path / "out.json") == 0
    loss, by_byte = json.loads((tmp_path / "out.json").read_text())["suites"][0]["metrics"]
    assert (loss["better"], loss["p"], by_byte["better"]) == ("", None, "b")
    assert "loss: by token, and their tokenizers differ: compare by byte or word" in capsys.readouterr().out
    members = [Member(i, read_run(tmp_path / n), read_result(tmp_path / n / "lm.json")) for i, n in enumerate(NAMES)]
    assert [row.metric for row in differences(members)] == ["nats_per_byte"]
    rows = metric_rows(members)
    assert [row.hint for row in rows] == ["by token, and tokenizers differ", "lower is better"]
    assert [[figure.best for figure in row.figures] for row in rows] == [[False, False], [False, True]]


def test_settings_that_have_no_bearing_may_differ(tmp_path: Path) -> None:
    """A sweep that is tried besides; the precision, but for timings, which it makes others."""
    write(tmp_path / "a", "a", 0.5, task="approximation", settings={"landmarks": [8], "precision": "fp32"})
    write(tmp_path / "bb", "bb", 0.8, task="approximation", settings={"landmarks": [16], "precision": "bf16"})
    a, b = (read_result(tmp_path / name / "classify.json") for name in ("a", "bb"))
    assert (obstacle(a, b), unequal([a, b])) == ("", [])
    a, b = (replace(one, task="efficiency") for one in (a, b))
    assert "landmarks" in obstacle(a, b)
    assert unequal([a, b]) == ["setting landmarks", "setting precision"]
    a, b = (replace(one, settings={"decode_tokens": n}) for one, n in ((a, 0), (b, 16)))
    assert (obstacle(a, b), unequal([a, b])) == ("", [])


def test_damage_and_disagreement_are_said(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "a", "a", 0.5)
    write(tmp_path / "bb", "bb", 0.8)
    write(tmp_path / "bb", "bb", 0.8, suite="other")
    raw = json.loads((tmp_path / "a" / "classify.json").read_text())
    raw["metrics"]["accuracy"]["value"] = 0.9
    (tmp_path / "a" / "classify.json").write_text(json.dumps(raw))
    assert compare(tmp_path / "a", tmp_path / "bb") == 0
    out = capsys.readouterr().out
    assert "classify: accuracy: the records of A give " in out
    assert "its result says 0.9" in out
    assert "in one of the two only: other" in out
    for path in (tmp_path / "a").rglob("*samples.jsonl"):
        path.unlink()
    assert compare(tmp_path / "a", tmp_path / "bb") == 0
    assert "classify: no intervals: " in capsys.readouterr().out


def test_rejections(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "a", "a", 0.5)
    write(tmp_path / "bb", "bb", 0.5, suite="other")
    (tmp_path / "empty").mkdir()
    for words, message in [
        ((tmp_path / "a", tmp_path / "none"), "none does not exist"),
        ((tmp_path / "a", tmp_path / "empty"), "holds no results"),
        ((tmp_path / "a", tmp_path / "bb"), "no suite is in both"),
        ((tmp_path / "a", tmp_path / "a", "--out", tmp_path), "--out"),
    ]:
        assert compare(*words) == 2, message
        assert message in capsys.readouterr().err
    (tmp_path / "a" / "broken.json").write_text("{")
    assert compare(tmp_path / "a", tmp_path / "a") == 0
    out = capsys.readouterr().out
    assert "both are of the same weights" in out
    assert "broken: not compared" in out


def test_masked_and_causal_models_are_compared_only_where_the_figures_mean_the_same(tmp_path: Path) -> None:
    write(tmp_path / "a", "a", 0.5)
    result = read_result(tmp_path / "a" / "classify.json")
    masked = replace(result, model=replace(result.model, objective="mlm"))
    causal = replace(result, model=replace(result.model, objective="clm"))
    assert obstacle(masked, causal) == ""
    refused = obstacle(replace(masked, task="context"), replace(causal, task="context"))
    assert refused == "other objectives, mlm and clm: the figures do not mean the same"
    assert obstacle(replace(masked, task="context"), replace(masked, task="context")) == ""


def _on(result: Any, **changes: Any) -> Any:
    return replace(result, model=replace(result.model, **changes))


SAME: dict[str, Any] = {"data": {"hash": "d"}, "settings": {"length": 64, "precision": "fp32"}}
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], list[str]]] = [
    ("the same", "lm", {}, {}, []),
    ("other paths to the same content", "lm", {"data": {"hash": "d", "path": "here"}},
     {"data": {"hash": "d", "path": "there"}}, []),
    ("the path is a setting too", "classify", {"data": {"hash": "d", "train": "x"}, "settings": {"train": "x"}},
     {"data": {"hash": "d", "train": "y"}, "settings": {"train": "y"}}, []),
    ("the same path, other content", "lm", {"data": {"hash": "d", "path": "here"}},
     {"data": {"hash": "e", "path": "here"}}, ["data"]),
    ("another setting", "lm", {}, {"settings": {"length": 32, "precision": "fp32"}}, ["setting length"]),
    ("a setting that one has", "lm", {}, {"settings": {"length": 64, "precision": "fp32", "new": 1}}, ["setting new"]),
    ("another precision", "lm", {}, {"settings": {"length": 64, "precision": "bf16"}}, []),
    ("another precision of timings", "efficiency", {}, {"settings": {"length": 64, "precision": "bf16"}},
     ["setting precision"]),
    ("an immaterial setting", "approximation", {"settings": {"landmarks": [8]}}, {"settings": {"landmarks": [4]}}, []),
    ("the same number", "lm", {"settings": {"rate": 1}}, {"settings": {"rate": 1.0}}, []),
    ("another version", "lm", {}, {"version": 2}, ["version of the task"]),
    ("another task", "lm", {}, {"task": "pppl"}, ["task"]),
    ("a forced gate", "lm", {}, {"gate": "forced"}, ["validity gate"]),
    ("a gate that was not asked", "lm", {}, {"gate": "none"}, []),
    ("two things", "lm", {}, {"gate": "forced", "data": {"hash": "e"}}, ["validity gate", "data"]),
]  # fmt: skip


@pytest.mark.parametrize(("task", "first", "second", "conditions"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_the_command_and_the_report_agree_on_what_is_comparable(
    tmp_path: Path, capsys: Any, task: str, first: dict[str, Any], second: dict[str, Any], conditions: list[str]
) -> None:
    for name, changes in (("a", first), ("bb", second)):
        write(tmp_path / name, name, 0.5 + 0.1 * len(name), suite="s", **({"task": task} | SAME | changes))
    a, b = (read_result(tmp_path / name / "s.json") for name in ("a", "bb"))
    assert unequal([a, b]) == unequal([b, a]) == conditions
    assert compare(tmp_path / "a" / "s.json", tmp_path / "bb" / "s.json") == (1 if conditions else 0)
    assert ("not compared" in capsys.readouterr().out) == bool(conditions)
    members = [Member(i, read_run(tmp_path / name), result) for i, (name, result) in enumerate((("a", a), ("bb", b)))]
    assert bool(differences(members)) == (not conditions)


def test_other_objectives_and_tokenizers_are_an_obstacle_where_they_matter(tmp_path: Path) -> None:
    write(tmp_path / "a", "a", 0.5)
    result = read_result(tmp_path / "a" / "classify.json")
    for task, expected in (("lm", ["objective"]), ("classify", []), ("efficiency", []), ("unheard-of", ["objective"])):
        masked, causal = (_on(replace(result, task=task), objective=name) for name in ("mlm", "clm"))
        assert unequal([masked, causal]) == expected
    # A tokenizer decides metric by metric: bytes are bytes.
    assert unequal([_on(result, tokenizer_hash=name) for name in ("one", "two")]) == []


def test_of_many_results_any_two_must_be_comparable(tmp_path: Path) -> None:
    write(tmp_path / "a", "a", 0.5)
    result = read_result(tmp_path / "a" / "classify.json")
    others = [replace(result, settings={"lr": 0.2}), replace(result, data={**result.data, "hash": "e"})]
    assert unequal([result, result, *others]) == ["setting lr", "setting train", "data"]


def test_a_result_in_doubt_keeps_no_best_from_being_marked(tmp_path: Path) -> None:
    """It takes no part, whatever it was measured on."""
    for name, accuracy, changes in (("a", 0.2, {}), ("bb", 0.8, {}), ("ccc", 0.9, {"gate": "forced"})):
        write(tmp_path / name, name, accuracy, **(SAME | changes))
    members = [
        Member(i, read_run(tmp_path / n), read_result(tmp_path / n / "classify.json"), "forced" if n == "ccc" else "")
        for i, n in enumerate(("a", "bb", "ccc"))
    ]
    row = metric_rows(members)[0]
    assert [figure.best for figure in row.figures] == [False, True, False]
    assert unequal_sentence(members) == ""
