"""The report's page: everything in it, nothing loaded, nothing unescaped, forgiving of what killed runs leave."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands_case import next_commands
from report_case import Page, make_run, write, write_everything

from data_pipeline.errors import UserError, run_cli
from eval.report.cli import main
from eval.report.runs import read_run, read_runs
from eval.results.schema import Metric, ModelInfo, Outcome, Series, Table


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("report")
    runs = [make_run(root, "one"), make_run(root, "two", lr=3e-3), make_run(root, "masked", "mlm")]
    runs.append(make_run(root, "young", "mlm"))
    write_everything(runs[0])
    write_everything(runs[1], shift=0.08)
    write_everything(runs[2], "mlm")
    main([*map(str, runs), "--out", str(root / "out" / "report.html"), "--title", "A <title>"])
    return (root / "out" / "report.html").read_text(encoding="utf-8")


def written(*command: str | Path) -> str:
    """The page that ``nystrom report`` writes of these runs."""
    path = Path(command[0]).parent / "page.html"
    main([*map(str, command), "--out", str(path)])
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_has_every_section(page: str) -> None:
    parsed = Page(page)
    assert parsed.headings == [
        "A <title>", "Summary", "Training", "Language modelling", "Samples", "Classification", "Needle",
        "Approximation", "House task", "Configuration", "Environment",
    ]  # fmt: skip
    assert len(parsed.ids) == len(set(parsed.ids))
    references = re.findall(r'(?:href="|url\()#([^")]+)', page)
    assert "hatch" in references
    assert set(references) <= set(parsed.ids)
    for words in (
        "all 2 validity checks passed", "validity not checked", "young has no evaluation results yet", "optimizer.lr",
        "TF-IDF + logistic regression", "majority class", "1.23M", "packages.torch", "could not be read",
        "0.900 ± 0.010", "[0.500, 0.700]", "Perplexity by context", "stride 128", "unigrams", "A note.",
        "By document (40 rows)", "20 keys in each cell.", "Differences from one", "Paired bootstrap", "key 48213",
        "Causal models", "Masked models", "4 more", "what really follows", "Measured on shards/valid (5,000 tokens",
        "Grey: the prompt", "Marked: the words that were hidden",
    ):  # fmt: skip
        assert words in parsed.words, words


def test_page_loads_nothing_and_escapes_everything(page: str) -> None:
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "image", "base"} & set(parsed.tags)
    for name, value in parsed.attributes:
        # A picture's name for a screen reader may hold any text; nothing is fetched from it.
        assert name == "aria-label" or not re.search(r"(?:https?:)?//", value or ""), (name, value)
        assert not name.startswith("on")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    assert not re.search(r"//|@import|url\(", style[1])
    assert "alert(" in page  # the samples, labels and cells are there,
    assert "<script" not in page  # as text


def test_pictures_follow_the_pages_colours(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) > 20
    for picture in pictures:
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", picture), picture[:200]
        assert "var(--" in picture or 'class="' in picture or "#hatch" in picture
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert "--mono: ui-monospace" in page
    _, *blocks = page.split(":root {")  # of the base and of the report, each the light one and the dark one
    light1, dark1, light2, dark2 = (set(re.findall(r"(--[\w-]+): #", block.split("}")[0])) for block in blocks)
    assert used - {"--mono"} <= light1 | light2
    assert used - {"--mono"} <= dark1 | dark2
    assert any(">64 tokens<" in p and ">128<" in p for p in pictures)  # the stages and their lengths


def test_failed_gate_is_said_first_and_forced_scores_carry_a_mark(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "sound"), make_run(tmp_path, "leaky")]
    write_everything(runs[0])
    write_everything(runs[1], shift=-0.05, gate="forced")  # ahead in everything where lower is better
    text = written(*runs)
    assert '<details class="banner failed" open>' in text
    words = Page(text).words
    assert "failed: causality. Scored all the same, by --force: approximation, classify, generate" in words
    assert words.index("failed: causality") < words.index("Objective")
    head, *sections = text.split("<section id=")
    for section in sections:
        if section.startswith(('"task-', '"summary')):
            assert '<em class="doubt" title="forced: the validity gate failed">forced</em>' in section
            assert 'class="mark"' not in section
            assert "Differences from" not in section
    assert "leaky, pretrained, GATE FAILED" in text
    assert 'class="doubt"' not in head


def test_scores_beside_a_gate_that_fails_now_carry_a_mark(tmp_path: Path) -> None:
    run = make_run(tmp_path, "leaky")
    write_everything(run)
    path = run / "eval" / "validity.json"
    raw = json.loads(path.read_text())
    raw["tables"][0]["rows"][0][3] = False
    path.write_text(json.dumps(raw))
    text = written(run)
    assert 'class="banner failed"' in text
    assert ">gate failed</em>" in text


def test_run_without_anything_measured(tmp_path: Path) -> None:
    run = tmp_path / "young"
    run.mkdir()
    (run / "config.yaml").write_text("name: young\n")
    text = written(run)
    assert "nothing was trained yet" in text
    assert "no evaluation results yet" in text


def test_resumed_metrics_count_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, "resumed")
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


def test_results_that_cannot_be_read_are_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path, "damaged")
    paths = [write(run / "eval", "lm", Outcome({}), suite=name) for name in ("a", "b", "c", "d", "e")]
    paths[0].write_text("{")
    for path, change in (
        (paths[1], {"schema": 1}),
        (paths[2], {"tables": [{"name": "t", "columns": ["a", "b"], "rows": [[1]]}]}),
        (paths[3], {"series": [{"name": "s", "x": [1], "y": [1, 2], "xlabel": "", "ylabel": ""}]}),
        (paths[4], {"grids": [{"name": "g", "x": ["1"], "y": [], "values": [[1]], "xlabel": "", "ylabel": ""}]}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    words = Page(written(run)).words
    for fragment in (
        "a.json is not a readable result file", "b.json has schema 1", "table 't' has rows of another width",
        "series 's' has columns of different lengths", "grid 'g' has values of another shape",
        "damaged has no evaluation results that this version reads",
    ):  # fmt: skip
        assert fragment in words, fragment


def test_text_that_is_no_unicode_and_numbers_that_are_none(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    path = write(run / "eval", "odd", Outcome({"m": Metric(float("nan"), True)}, [Table("t", ["a"], [["x"]])]))
    raw = json.loads(path.read_text())
    raw["tables"][0]["rows"] = [["\ud800 half a pair"], [None]]
    raw["series"] = [{"name": "s", "x": [None, 1.0], "y": [2.0, None], "xlabel": "x", "ylabel": "y"}]
    path.write_text(json.dumps(raw))
    words = Page(written(run)).words
    assert "? half a pair" in words
    assert "not finite" in words


def test_folder_of_results_only(tmp_path: Path) -> None:
    outcome = Outcome({"accuracy": Metric(0.37, True, 0.01, 3)}, [Table("by seed", ["seed"], [[0], [1]])])
    for suite in ("listops-nystrom", "listops-softmax"):
        write(tmp_path / "lra", "lra", outcome, suite=suite, model=ModelInfo(), gate="none")
    text = written(tmp_path / "lra")
    assert "<h3>listops-nystrom</h3>" in text
    assert "<h3>listops-softmax</h3>" in text
    assert "0.370 ± 0.010" in Page(text).words
    assert 'class="banner' not in text  # no checkpoint was looked at, so no gate is missed
    assert 'id="training"' not in text


def test_results_and_checkpoints_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    write(run / "eval", "lm", Outcome({"perplexity": Metric(20.0, False)}))
    write(run / "eval" / "step000000040", "lm", Outcome({"perplexity": Metric(30.0, False)}))
    (run / "checkpoints" / "step000000040").mkdir(parents=True)
    for place in ("checkpoints", "eval"):
        early = read_run(run / place / "step000000040")
        assert early.name == "run step 40"
        assert early.results["lm"].metrics["perplexity"].value == 30.0
        assert early.train[-1]["step"] == 40
    assert read_run(run / "eval").results["lm"].metrics["perplexity"].value == 20.0
    text = written(run / "checkpoints" / "step000000040", run)
    words = Page(text).words
    assert "run step 40" in words
    assert "20.00 best" in words
    # One run's curve is drawn once, as far as it goes: the same picture as that of the run alone.
    loss = re.search(r'<svg role="img" aria-label="Loss, causal models".*?</svg>', text, re.DOTALL)
    alone = re.search(r'<svg role="img" aria-label="Loss, causal models".*?</svg>', written(run), re.DOTALL)
    assert loss is not None
    assert alone is not None
    assert loss[0].count("<path") == alone[0].count("<path")


def test_rejections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "package.json").write_text('{"metrics": 1}')
    run = make_run(tmp_path, "run")
    for command, words in [
        ([str(tmp_path / "missing")], "does not exist"),
        ([str(tmp_path / "empty")], "not a run folder"),
        ([str(tmp_path / "foreign")], "nor evaluation results"),
        ([str(run), "--out", str(tmp_path)], "is a folder"),
        ([str(run), "--out", str(run / "config.yaml" / "r.html")], "cannot be written"),
    ]:
        assert run_cli(lambda argv: main(argv), "nystrom report", command) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(UserError):
        read_run(tmp_path / "empty")


def test_long_tables_and_sample_lists_end(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    samples = [{"kind": "odd", "number": i} for i in range(70)]
    series = [Series("s", [0.0, 1.0], [1.0, 1.0], "x", "y")]  # nothing to take a logarithm of
    write(run / "eval", "odd", Outcome({}, [Table("t", ["i"], [[i] for i in range(500)])], series, [], samples))
    words = Page(written(run)).words
    assert "The first 400 of 500 rows" in words
    assert "T (500 rows)" in words
    assert "The first 60 of 70" in words


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / place, "run") for place in ("a", "b")]
    assert [run.name for run in read_runs([*map(str, runs), str(make_run(tmp_path, "c"))])] == ["a/run", "b/run", "c"]


def test_many_metrics_fold(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    write(run / "eval", "odd", Outcome({f"m_{i}": Metric(1.0, True) for i in range(30)}))
    assert "<summary>16 more metrics</summary>" in written(run)


def test_the_command_answers_and_names_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page = make_run(tmp_path, "one"), tmp_path / "page.html"
    main([str(run), "--out", str(page), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == {"file": str(page), "bytes": page.stat().st_size, "runs": ["one"]}
    main([str(run), "--out", str(page)])
    said = capsys.readouterr()
    assert said.out == f"report written to {page}\n"
    assert next_commands(said.err) == [["generate", "--checkpoint", str(run), "--prompt", "The"]]
