"""The commands of docs/embeddings.md, run as they stand there on a tiny model and tiny data."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from suites_case import WORDS
from test_documented_commands import REPOSITORY, commands

from eval.results.schema import read_result
from launch import program

PAGE = REPOSITORY / "docs" / "embeddings.md"
FROM_THE_HUB = {"eval stsb-cosine --checkpoint runs/books-clm", "eval stsb --checkpoint runs/books-clm"}
SHORTER = {"regress": ["--seeds", "1", "--epochs", "1"], "stsb": ["--seeds", "1", "--epochs", "1"]}


def files(folder: Path) -> None:
    """What the page names: pairs, reviews, STS-B as GLUE lays it out, ratings."""
    rng = np.random.default_rng(0)

    def text(words: int = 6) -> str:
        return " ".join(rng.choice(WORDS, words))

    def lines(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines("pairs.jsonl", [{"query": text(), "positive": text()} for _ in range(20)])
    lines("reviews.jsonl", [{"text": text(30)} for _ in range(20)])
    for name in ("ratings", "ratings-test"):
        lines(f"{name}.jsonl", [{"text": text(), "stars": i % 5} for i in range(20)])
    (folder / "stsb").mkdir()
    (folder / "glue" / "stsb").mkdir(parents=True)
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    for name in ("train.tsv", "dev.tsv", "stsb/dev.tsv", "glue/stsb/train.tsv", "glue/stsb/test.tsv"):
        rows = [f'{i}\tnews\tx\t2012\t{i}\tnone\tnone\t"{text()}\t{text()}\t{i % 6}.000\n' for i in range(20)]
        (folder / name).write_text(header + "".join(rows))


@pytest.mark.slow
def test_the_commands_of_the_page_run(
    export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = commands(PAGE.read_text(encoding="utf-8"))
    assert set(found) >= FROM_THE_HUB
    files(tmp_path)
    for name, attention in (("books-clm", "nystrom"), ("exact", "softmax")):
        shutil.copytree(export(f"page-{name}", objective="clm", attention=attention), tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    after: list[str] = []
    for command in found:
        words = shlex.split(command)
        if command in FROM_THE_HUB:
            continue
        if words[0] == "report" or words[1] == "compare":
            after.append(command)
            continue
        fewer = SHORTER.get(words[1], ["--random-networks", "1"])
        twice = "--name" not in words and words[1] != "stsb"  # what the two are compared by
        for run in ("runs/books-clm", "runs/exact")[: 1 + twice]:
            given = [run if word == "runs/books-clm" else word for word in words]
            assert program.main([*given, *fewer]) == 0, command
    said = capsys.readouterr().out
    for name in ("retrieval", "retrieval-reviews", "sts", "regress", "regress-ratings", "stsb"):
        assert f"\n{name} " in said
        assert any(path.stem == name for path in tmp_path.rglob("*.json")), name
    assert len(after) == 2
    for command in after:
        assert program.main(shlex.split(command)) == 0, command
    compared = capsys.readouterr().out
    for metric in ("ndcg@10", "spearman", "gain over tfidf"):
        line = next(line for line in compared.splitlines() if f" {metric} " in line)
        assert "[" in line, line  # with an interval: the records of both are paired
    assert "not compared" not in compared
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words_of_page in ("Retrieval nDCG@10, no training", "Sentence similarity, Spearman", "Regression, Spearman"):
        assert words_of_page in page
    assert "the same network with random weights" in page
    result = read_result(next(path for path in tmp_path.rglob("sts.json")))
    assert result.data["records"] == 20
