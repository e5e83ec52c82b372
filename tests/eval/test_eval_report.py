"""The report's page: everything in it, nothing loaded, nothing unescaped, forgiving of what killed runs leave."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_pipeline.errors import UserError, run_cli
from eval.classification.task import MAJORITY_ROW, MODEL_ROW, SCRATCH_ROW, TABLE, TFIDF_ROW
from eval.language_modeling.task import POSITION_SERIES
from eval.report.cli import main
from eval.report.page import best_of, differences, number, visible
from eval.report.runs import Run, flatten, read_run
from eval.results.schema import Metric, ModelInfo, Outcome, Series, Table
from eval.results.store import obtain
from eval.validity.checks import CHECKS_TABLE

EVIL = '<script>alert("x")</script> & http://evil.example/a.png'


def make_run(root: Path, name: str, objective: str = "clm", *, results: bool = True, lr: float = 1e-3) -> Path:
    run = root / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        f"name: {name}\nmodel: {{objective: {objective}, attention: nystrom}}\noptimizer: {{lr: {lr}}}\n"
        "curriculum:\n- {until_tokens: 4000, seq_len: 64, micro_batch: 4}\n"
        "- {until_tokens: 8000, seq_len: 128, micro_batch: 2}\n"
    )
    lines: list[dict[str, object]] = [{"kind": "event", "event": "start", "step": 0, "tokens": 0}]
    for step in range(1, 81):
        tokens = step * 100
        lines.append(
            {"kind": "train", "step": step, "tokens": tokens, "loss": 5 - step / 40, "lr": lr, "grad_norm": 1 / step,
             "tokens_per_second": 900 + step, "mfu": None, "data_wait": 0.01, "seconds": step}
        )  # fmt: skip
        if step % 20 == 0:
            lines.append({"kind": "valid", "step": step, "tokens": tokens, "loss": 5.1 - step / 40})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st')
    (run / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13"}}))
    if results:
        write_results(run, objective)
    return run


def write_results(run: Path, objective: str) -> None:
    checks = [["causality", 0.0, "<= 0.0001", True, "detail"], ["batch mates", 1e-7, "<= 0.0001", True, ""]]
    outcomes = {
        "validity": Outcome({"passed": Metric(1.0, True)}, [Table(CHECKS_TABLE, ["check"] * 5, checks)]),
        "lm": Outcome(
            {"perplexity": Metric(20.0, False), "unigram_entropy": Metric(6.0, False)},
            [Table("held-out loss", ["predictor", "loss"], [["model", 3.0], ["unigram entropy of the text", 6.0]])],
            [Series(POSITION_SERIES, [4.0, 12.0, 24.0], [4.0, 3.0, 2.5], "position", "loss")],
        ),
        "classify": Outcome(
            {"accuracy": Metric(0.9, True, 0.01, 3)},
            [
                Table(
                    TABLE,
                    ["predictor", "accuracy", "± std", "macro F1", "± std", "seeds"],
                    [
                        [MODEL_ROW, 0.9, 0.01, 0.88, 0.02, 3],
                        [SCRATCH_ROW, 0.6, 0.02, 0.5, 0.02, 3],
                        [TFIDF_ROW, 0.95, None, 0.94, None, 1],
                        [MAJORITY_ROW, 0.4, None, 0.1, None, 1],
                    ],
                )
            ],
        ),
        "generate": Outcome(
            {"distinct_2": Metric(0.7, True)},
            [Table("generated text", ["text", "distinct-2"], [["model", 0.7]])],
            samples=[
                {"kind": "continuation", "prompt": EVIL, "text": EVIL, "real": EVIL},
                {
                    "kind": "fill_mask",
                    "parts": [EVIL, "."],
                    "answers": [{"right": EVIL, "rank_in_top_5": 1, "top": [[EVIL, 0.5]]}],
                },
            ],
        ),
    }
    model = ModelInfo("hash", run.name, objective, "nystrom", 1234567, 8000)
    data = {
        "hash": "d", "path": "shards", "tokens": 5000, "classes": ["a", "b"], "train": "a.csv", "test": "b.csv",
        "train_records": 10, "test_records": 5,
    }  # fmt: skip
    for task, outcome in outcomes.items():
        obtain(
            run / "eval", task, task=task, version=1, model=model, data=data, gate="passed",
            settings={"length": 128, "max_tokens": None, "max_length": 128}, compute=lambda _, outcome=outcome: outcome,
        )  # fmt: skip


class Page(HTMLParser):
    """Collects elements, ids and text; fails on tags that do not nest."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._open and self._open[-1] in ("h1", "h2"):
            self.headings.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("report")
    runs = [make_run(root, "one"), make_run(root, "two", lr=3e-3), make_run(root, "three", "mlm", results=False)]
    main([*map(str, runs), "--out", str(root / "out" / "report.html"), "--title", "A <title>"])
    return (root / "out" / "report.html").read_text(encoding="utf-8")


def test_page_is_well_formed_and_has_every_section(page: str) -> None:
    parsed = Page(page)
    wanted = ["Summary", "Training", "Language modelling", "Classification", "Samples", "Configuration", "Environment"]
    assert [h for h in parsed.headings if h in wanted] == wanted
    assert parsed.headings[0] == "A <title>"
    assert len(parsed.ids) == len(set(parsed.ids))
    for reference in re.findall(r'(?:href="|url\()#([^")]+)', page):
        assert reference in parsed.ids
    text = " ".join(parsed.text)
    for words in (
        "all 2 validity checks passed", "validity not checked", "three has no evaluation results yet", "optimizer.lr",
        "TF-IDF + logistic regression", "majority class", "1,234,567", "packages.torch", "could not be read",
        "0.900", "± 0.010",
    ):  # fmt: skip
        assert words in text, words
    assert parsed.tags.count("svg") == 8  # two losses, throughput, lr, gradient norm, data wait, positions, bars


def test_page_loads_nothing_and_escapes_everything(page: str) -> None:
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "image", "base"} & set(parsed.tags)
    for name, value in parsed.attributes:
        assert not re.search(r"(?:https?:)?//", value or ""), (name, value)
        assert not name.startswith("on")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    assert not re.search(r"//|@import|url\(", style[1])
    assert "alert(" in page  # the samples are there,
    assert "<script" not in page  # as text


def test_pictures_follow_the_pages_colours(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for picture in pictures:
        colours = set(re.findall(r"#[0-9a-fA-F]{6}\b", picture))
        assert not colours, colours
        assert "var(--" in picture
        assert "viewBox" in picture
        assert 'aria-label="' in picture
    used = set(re.findall(r"var\((--[\w]+)\)", page))
    for scheme in page.split("prefers-color-scheme: dark"):
        assert used <= set(re.findall(r"(--\w+):", scheme))
    assert any(">64 tokens<" in p and ">128<" in p for p in pictures)  # the stages and their lengths


def test_failed_gate_is_said_first(tmp_path: Path) -> None:
    run = make_run(tmp_path, "leaky")
    path = run / "eval" / "validity.json"
    raw = json.loads(path.read_text())
    raw["tables"][0]["rows"][0][3] = False
    path.write_text(json.dumps(raw))
    main([str(run), "--out", str(tmp_path / "r.html")])
    text = (tmp_path / "r.html").read_text()
    assert 'class="banner failed"' in text
    assert "failed: causality" in text
    assert text.index("failed: causality") < text.index("Summary</h2>")


def test_run_without_anything_measured(tmp_path: Path) -> None:
    run = tmp_path / "young"
    run.mkdir()
    (run / "config.yaml").write_text("name: young\n")
    main([str(run), "--out", str(tmp_path / "r.html")])
    text = (tmp_path / "r.html").read_text()
    for words in ("nothing was trained yet", "No training records yet", "no evaluation results yet"):
        assert words in text


def test_resumed_metrics_count_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, "resumed", results=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"kind": "train", "step": 50, "tokens": 5000, "loss": 1.0}) + "\n")
    read = read_run(run)
    tokens = [record["tokens"] for record in read.train]
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == 5000
    assert read.train[-1]["loss"] == 1.0
    assert [(s.start, s.end, s.seq_len) for s in read.stages()] == [(0, 4000, 64), (4000, 8000, 128)]


@pytest.mark.parametrize("config", ["", "- a\n", "model: mlm\n", "curriculum: 3\nmodel: {}\n", "curriculum: [{}]\n"])
def test_odd_configurations_do_not_break_the_page(tmp_path: Path, config: str) -> None:
    run = make_run(tmp_path, "odd")
    (run / "config.yaml").write_text(config)
    status = run_cli(lambda argv: main(argv), "nystrom report", [str(run), "--out", str(tmp_path / "r.html")])
    assert status in (0, 2)


def test_damaged_result_is_reported_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path, "damaged")
    (run / "eval" / "lm.json").write_text("{")
    main([str(run), "--out", str(tmp_path / "r.html")])
    assert "not a readable result file" in (tmp_path / "r.html").read_text()


def test_rejections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    run = make_run(tmp_path, "run", results=False)
    for command, words in [
        ([str(tmp_path / "missing")], "does not exist"),
        ([str(tmp_path / "empty")], "not a run folder"),
        ([str(run), "--out", str(tmp_path)], "is a folder"),
        ([str(run), "--out", str(run / "config.yaml" / "r.html")], "cannot be written"),
    ]:
        assert run_cli(lambda argv: main(argv), "nystrom report", command) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(UserError):
        read_run(tmp_path / "empty")


def test_best_is_marked_only_when_ahead_by_more_than_the_deviation() -> None:
    assert best_of([Metric(0.9, True, 0.01), None, Metric(0.8, True, 0.02)]) == 0
    assert best_of([Metric(0.9, True, 0.01), Metric(0.88, True, 0.03)]) is None
    assert best_of([Metric(3.0, False), Metric(2.0, False)]) == 1
    assert best_of([Metric(3.0, False), None]) is None
    assert best_of([Metric(float("nan"), False), Metric(2.0, False)]) is None


def test_numbers_and_differences() -> None:
    shown = [number(v) for v in (None, True, False, 1234567, 0.93214, 64.123, 12623.4, 0.0, 3e-7, "x", float("nan"))]
    assert shown == ["–", "pass", "FAIL", "1,234,567", "0.932", "64.12", "12,623", "0", "3.0e-07", "x", "not finite"]
    assert visible(" the") == "the"
    assert visible("\n        ") == "↵␣×8"
    configs = [
        flatten({"a": {"b": 1}, "c": [{"d": 2}], "name": "x"}),
        flatten({"a": {"b": 1}, "c": [{"d": 3}], "name": "y"}),
    ]
    assert differences(configs, {"name"}) == [("c.0.d", ["2", "3"])]
    assert Run(Path("."), "x", {"model": "odd"}).objective == ""
