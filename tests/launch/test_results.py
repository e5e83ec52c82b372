"""What Python gets from several suites where some cannot be run, and how a notebook shows it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import eval.subject
import nystrom_pretrain as nystrom
from data_pipeline.errors import UserError
from data_pipeline.html import html_facts, html_table
from eval.results.schema import Metric, ModelInfo, Result
from eval.runner import Runner
from eval.suites.load import Suite

RESULT = Result(
    suite="lm", task="lm", key="k", model=ModelInfo(), settings={}, data={}, metrics={}, tables=[], series=[], grids=[],
    samples=[], estimators={}, records={}, gate="passed", seconds=1.0, created="", environment={},
)  # fmt: skip
FAILED_GATE = "the validity gate failed"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Suites that only pretend: those named raise, the gate passes or not. Returns the list of those begun."""

    def prepare(failing: dict[str, str], passed: float = 1.0) -> list[str]:
        begun: list[str] = []

        def run(self: Runner, suite: Suite) -> tuple[Result, bool]:
            begun.append(suite.name)
            if suite.name in failing:
                raise UserError(failing[suite.name])
            metric = {"passed": Metric(passed, True, n=2)} if suite.task.is_gate else {"loss": Metric(1.5, False, n=9)}
            return replace(RESULT, suite=suite.name, task=suite.task.name, metrics=metric), True

        subject = SimpleNamespace(loaded=SimpleNamespace(run_dir=None))
        monkeypatch.setattr(eval.subject, "load_subject", lambda *_: subject)
        monkeypatch.setattr(Runner, "run", run)
        monkeypatch.setattr(Runner, "expect", lambda *_: None)
        return begun

    return prepare


def test_suites_that_cannot_be_run_do_not_keep_the_others(computed: Any, tmp_path: Path) -> None:
    begun = computed({"pppl": "pppl is for <masked> models", "classify": "say --train"})
    with pytest.warns(UserWarning, match="not run: pppl, classify") as said:
        results = nystrom.evaluate(tmp_path, ["pppl", "classify", "lm", "validity"], out=tmp_path)
    assert said[0].filename == __file__
    assert begun == ["validity", "pppl", "classify", "lm"]
    assert list(results) == ["validity", "lm"]
    assert len(results) == 2
    assert results.skipped == {"pppl": "pppl is for <masked> models", "classify": "say --train"}
    assert "pppl" not in results
    with pytest.raises(KeyError, match="suite pppl could not be run: pppl is for <masked> models"):
        _ = results["pppl"]
    with pytest.raises(KeyError, match="other"):
        _ = results["other"]
    assert repr(results).splitlines()[2:] == [
        "validity  passed  all 2 checks",
        "lm        loss    1.5000        9",
        "pppl could not be run: pppl is for <masked> models",
        "classify could not be run: say --train",
    ]
    html = results._repr_html_()
    assert "pppl is for &lt;masked&gt; models" in html
    assert "<masked>" not in html
    assert [row["suite"] for row in results.rows()] == ["validity", "lm"]


def test_strict_raises_at_the_first(computed: Any, tmp_path: Path) -> None:
    begun = computed({"pppl": "for masked models"})
    with pytest.raises(UserError, match=r"^for masked models$"):
        nystrom.evaluate(tmp_path, ["pppl", "lm"], out=tmp_path, strict=True)
    assert begun == ["pppl"]


def test_nothing_but_the_gate_is_an_error(computed: Any, tmp_path: Path) -> None:
    computed({"lm": FAILED_GATE, "generate": FAILED_GATE, "pppl": "for masked models"}, passed=0.0)
    with pytest.raises(UserError) as caught:
        nystrom.evaluate(tmp_path, ["lm", "generate", "pppl", "validity"], out=tmp_path)
    lines = ["no suite could be run", f"lm, generate: {FAILED_GATE}", "pppl: for masked models"]
    assert str(caught.value).splitlines() == lines
    with pytest.raises(UserError, match=f"^{FAILED_GATE}$"):
        nystrom.evaluate(tmp_path, "lm", out=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nystrom.evaluate(tmp_path, "validity", out=tmp_path)["validity"].metrics["passed"].value == 0.0


def test_mistakes_in_arguments_are_told_before_anything_is_computed(computed: Any, tmp_path: Path) -> None:
    begun = computed({})
    for suites, settings, message in (
        (["lm", "nothing"], {}, "no suite 'nothing'"),
        (["lm", "pppl"], {"lenght": 3}, "'lenght' has no effect"),
        (["lm"], {"length": "long"}, "length"),
        (["lm"], {"data": tmp_path, "text": ("held-out.txt",)}, "no suite reads --data"),
        ([], {}, "no suite is named"),
        (3, {}, "suites must be a name or several, not int"),
    ):
        with pytest.raises(UserError, match=message):
            nystrom.evaluate(tmp_path, suites, out=tmp_path, **settings)
    assert begun == []


def test_html_is_escaped() -> None:
    assert '<td style="text-align: left">a &lt;b&gt; &amp; &quot;c&quot;<br>d</td>' in html_table(
        ["x"], [['a <b> & "c"\nd']]
    )
    facts = html_facts("<t>", [("n", 1234567), ("none", None), ("yes", True), ("<k>", "<v>")])
    assert facts.startswith("<b>&lt;t&gt;</b>")
    assert "1,234,567" in facts
    assert "none" not in facts
    assert ">True<" in facts
    assert "&lt;k&gt;" in facts
    assert "<v>" not in facts


def test_a_run_shows_how_far_it_is(tmp_path: Path) -> None:
    run = nystrom.Run(str(tmp_path / "a<b>"))
    assert run == nystrom.Run(tmp_path / "a<b>")
    assert "unknown" in run._repr_html_()
    run.folder.mkdir()
    row = {"kind": "train", "step": 3, "tokens": 12345, "loss": 2.0}
    (run.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    html = run._repr_html_()
    for text in ("a&lt;b&gt;", "12,345", "2.0000"):
        assert text in html
    assert "<b>a" not in html
