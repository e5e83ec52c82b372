"""What the page says of its figures: on which text, of which weights, of how many items, and beside what."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from report_case import Page, make_run, write

from eval.report.cli import main
from eval.report.compare import Member
from eval.report.material import lead_of
from eval.report.runs import Run, read_run
from eval.report.samples import Other, samples_of
from eval.report.summary import banner, facts, scores
from eval.report.tables import metric_row, unequal_sentence
from eval.report.training import columns, smooth, unigram_floor
from eval.results.caution import few_items, outdated
from eval.results.schema import Estimator, Metric, ModelInfo, Outcome, Table
from eval.tasks.validity import CHECKS_TABLE

TEXT = {"text": ["books/wikitext.txt"], "documents": 1, "bytes": 900, "hash": "w"}


def a_run(root: Path, name: str = "run", objective: str = "clm") -> Path:
    """A run whose own held-out text is shards/valid."""
    run = make_run(root, name, objective)
    with (run / "config.yaml").open("a") as file:
        file.write("data: {valid: shards/valid}\n")
    return run


def lm(entropy: float, n: int = 4000, loss: float = 3.0, better: bool | None = None) -> Outcome:
    """A result of ``lm`` on ``n`` tokens in 40 passages."""
    records = [{"id": str(i), "nats": loss * n / 40, "tokens": n / 40} for i in range(40)]
    metrics = {
        "loss": Metric(loss, False, n=n, unit="tokens"),
        "unigram_entropy": Metric(entropy, better, n=5000, unit="tokens"),
    }
    return Outcome(metrics, records=records, estimators={"loss": Estimator("nats", "tokens")})


def member(run: Run, suite: str = "lm", index: int = 0) -> Member:
    return Member(index, run, run.results[suite])


def rows_of(rows: Any) -> dict[str, Any]:
    return {row.label: row for row in rows}


def test_the_floor_of_a_curve_is_that_of_its_own_text(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    write(run / "eval", "lm", lm(5.96), suite="lm-wikitext", data=TEXT, settings={"text": TEXT["text"]})
    assert unigram_floor(read_run(run)) is None
    write(run / "eval", "lm", lm(6.42))
    assert unigram_floor(read_run(run)) == 6.42


def test_a_null_loss_is_a_gap_in_the_line(tmp_path: Path) -> None:
    records = [{"tokens": 1, "loss": 3.0}, {"tokens": 2, "loss": None}, {"tokens": 3, "loss": 5.0}, {"tokens": 4}]
    x, y = columns(records, "loss")
    assert x == [1.0, 2.0, 3.0]
    assert [math.isnan(value) for value in y] == [False, True, False]
    assert [round(value, 3) for value in smooth([3.0, math.nan, 5.0])[::2]] == [3.0, 5.0]
    run = a_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"kind": "valid", "step": 81, "tokens": 8100, "loss": None}) + "\n")
    row = rows_of(facts([read_run(run)]))["Last held-out loss while training"]
    assert (row.figures[0].text, row.hint) == ("3.100", "on shards/valid")


def test_a_pattern_by_layer_is_named_with_its_numbers_of_layers(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    text = (run / "config.yaml").read_text()
    for given, shown in (
        ("[window, nystrom], num_layers: 3", "window x2 + nystrom x1"),
        ("[window, nystrom]", "[window, nystrom]"),  # how many layers is not known
        ("softmax", "softmax"),
    ):
        (run / "config.yaml").write_text(text.replace("attention: nystrom", f"attention: {given}"))
        assert rows_of(facts([read_run(run)]))["Attention"].figures[0].text == shown


def test_scores_of_earlier_weights_say_so(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    model = ModelInfo("old", "run", "clm", "nystrom", 1234567, 4000)
    table = Table(CHECKS_TABLE, ["check"] * 5, [["causality", 0.0, "<= 0.0001", True, ""]])
    write(run / "eval", "validity", Outcome({"passed": Metric(1.0, True)}, [table]), gate="none", model=model)
    write(run / "eval", "lm", lm(6.4), model=model)
    said = "at 4k tokens, the weights have changed since: the run has seen 8k"
    found = banner(read_run(run))
    assert found is not None
    assert (found.state, said in found.text) == ("unknown", True)
    main([str(run), "--out", str(tmp_path / "page.html")])
    words = Page((tmp_path / "page.html").read_text(encoding="utf-8")).words
    assert f"scored {said}" in words
    assert "earlier weights" in words
    write(run / "eval", "lm", lm(6.4))  # at 8,000 tokens, where the run is
    assert member(read_run(run)).outdated == ""


def test_whether_a_model_is_of_earlier_weights() -> None:
    old, new = ModelInfo("old", tokens=520_000), ModelInfo("new", tokens=1_200_000)
    said = "scored at 520k tokens, the weights have changed since: the run has seen 1.2M"
    assert outdated(old, 1_200_000) == said
    assert outdated(new, 1_200_000) == outdated(ModelInfo(), 1_200_000) == ""


def test_the_summary_sets_figures_beside_what_they_must_beat(tmp_path: Path) -> None:
    masked = a_run(tmp_path, "masked", "mlm")
    metrics = {"masked_loss": Metric(6.191, False), "unigram_entropy": Metric(6.111, False)}
    write(masked / "eval", "lm", Outcome(metrics))
    accuracies = {"accuracy": Metric(0.861, True, 0.0049, 3), "tfidf_accuracy": Metric(0.883, True, n=500)}
    write(masked / "eval", "classify", Outcome(accuracies))
    rows = rows_of(scores([read_run(masked)]))
    loss, accuracy = rows["Masked loss, held-out, nats"], rows["Classification accuracy, fine-tuned"]
    assert loss.figures[0].notes == ("not better than unigram entropy, 6.111",)
    assert accuracy.figures[0].notes == ("not better than TF-IDF, 0.883",)
    assert accuracy.figures[0].std == "0.005"  # as many decimals as the value
    assert rows["… TF-IDF, which knows no language"].figures[0].text == "0.883"
    unigrams = rows["… the loss of knowing only how frequent tokens are"]
    assert (unigrams.figures[0].text, unigrams.hint) == ("6.111", "")  # of earlier versions: "lower is better"


def test_the_summary_names_the_text_of_a_figure_that_is_of_another_one(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, "one"), a_run(tmp_path, "two")]
    write(runs[0] / "eval", "lm", lm(6.4))
    write(runs[1] / "eval", "lm", lm(6.4), data=TEXT, settings={"text": TEXT["text"]})
    read = [read_run(run) for run in runs]
    both = rows_of(scores(read))["Held-out loss, nats per token"]
    assert [figure.notes for figure in both.figures] == [("on shards/valid",), ("on books/wikitext.txt",)]
    alone = rows_of(scores(read[1:]))["Held-out loss, nats per token"]
    assert alone.hint == "lower is better, on books/wikitext.txt"
    assert rows_of(scores(read[:1]))["Held-out loss, nats per token"].hint == "lower is better"


def test_what_a_figure_is_over_and_how_much_of_the_text_was_scored(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    write(run / "eval", "lm", lm(6.4, better=False), data=TEXT)
    read = read_run(run)
    assert lead_of([member(read)]) == (
        "Measured on books/wikitext.txt (1 document, 900 bytes); scored: 4,000 tokens in 40 items"
    )  # fmt: skip
    assert metric_row("loss", [member(read)], "loss").n == "4,000 tokens"
    entropy = metric_row("unigram entropy", [member(read)], "unigram_entropy")
    assert (entropy.n, entropy.hint) == ("5,000 tokens", "")
    # Of an earlier version, which had no units: the estimator tells, and a deviation is over seeds.
    path = run / "eval" / "lm.json"
    raw = json.loads(path.read_text())
    raw["metrics"] = {"loss": {"value": 3.0, "higher_is_better": False, "n": 1},
                      "accuracy": {"value": 0.5, "higher_is_better": True, "std": 0.1, "n": 3},
                      "repetition": {"value": 0.5, "higher_is_better": True, "n": 40}}  # fmt: skip
    raw["estimators"]["repetition"] = {"numerator": "nats", "denominator": "tokens"}
    path.write_text(json.dumps(raw))
    old = [member(read_run(run))]
    said = [metric_row("", old, name).n for name in ("loss", "accuracy", "repetition")]
    assert said == ["1 token", "3 seeds", "40 items"]


def test_few_items_are_told(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    outcome = lm(6.4)
    write(run / "eval", "lm", Outcome(outcome.metrics, records=outcome.records[:12], estimators=outcome.estimators))
    read = read_run(run)
    assert few_items(read.results["lm"]) == "12 items are few: the intervals are wide, and only roughly of 95%"
    assert "few items" in rows_of(scores([read]))["Held-out loss, nats per token"].figures[0].notes
    write(run / "eval", "lm", outcome, settings={"length": 256})
    assert few_items(read_run(run).results["lm"]) == ""


def test_in_what_results_differ_is_a_sentence(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for suite, prompt, data in (("a", "x", {"hash": "d"}), ("b", "y", {"hash": "e"}), ("c", "x", {"hash": "d"})):
        write(run / "eval", "t", lm(6.4), suite=suite, settings={"prompt": prompt}, data=data)
    read = read_run(run)
    a, b, c = (member(read, suite) for suite in "abc")
    assert unequal_sentence([a, b]) == "the data and the setting prompt"
    assert unequal_sentence([a, c]) == ""


@pytest.mark.parametrize("kind", ["new", "old"])
def test_a_card_of_the_harness_shows_the_choices(tmp_path: Path, kind: str) -> None:
    run = a_run(tmp_path)
    choices = {"yes": "log p -100.31, right", "no": "log p -99.00, chosen"}
    new = {"kind": "harness", "task": "boolq", "prompt": "Is it?", "choices": choices}
    old = {"kind": "harness", "task": "boolq", "prompt": "Is it?", "responses": [[-100.31, False], [-101.0, False]]}
    write(run / "eval", "harness", Outcome({}, samples=[new if kind == "new" else old]))
    (card,) = samples_of([member(read_run(run), "harness")])
    assert isinstance(card, Other)
    if kind == "new":
        assert card.choices == [("yes", "log p -100.31, right", True), ("no", "log p -99.00, chosen", False)]
        assert [name for name, _ in card.items] == ["task", "prompt"]
    else:
        assert card.items[-1] == ("log p of the choices", "-100.3, -101.0")
