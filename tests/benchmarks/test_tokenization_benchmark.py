"""``python -m benchmarks.tokenization``, on a little text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.tokenization import divided
from benchmarks.tokenization.__main__ import main, write_corpus
from benchmarks.tokenization.measure import run_method
from data_pipeline.errors import UserError


def test_the_corpus_is_the_same_every_time_and_repeats(tmp_path: Path) -> None:
    documents, size = write_corpus(tmp_path / "a", 0.2)
    assert size >= 0.2e6
    assert write_corpus(tmp_path / "b", 0.2, repeat=3) == (3 * documents, 3 * size)
    lines = [line for file in sorted((tmp_path / "a").iterdir()) for line in file.read_text().splitlines()]
    assert len(lines) == documents
    assert sum(len(json.loads(line)["text"].encode()) for line in lines) == size


def test_the_corpus_may_be_the_users_own(tmp_path: Path) -> None:
    text = tmp_path / "own.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(100)))
    assert write_corpus(tmp_path / "a", 0.0005, inputs=[str(text)]) == (73, 501)
    lines = (tmp_path / "a" / "03.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == [f"line {i}" for i in range(3, 73, 16)]
    with pytest.raises(UserError, match="the --input has 690 bytes, less than --megabytes 64"):
        write_corpus(tmp_path / "b", 64, inputs=[str(text)])


@pytest.mark.slow
def test_all_agree_on_the_number_of_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    words = ["--methods", "bare,ours,ours-tiktoken", "--megabytes", "0.3", "--vocab-size", "400", "--rounds", "1"]
    assert main([*words, "--work", str(tmp_path), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["method"] for row in result["rows"]] == ["bare", "ours", "ours-tiktoken"]
    assert len({row["tokens"] for row in result["rows"]}) == 1
    assert all(row["peak_bytes"] > 10e6 for row in result["rows"])
    assert {(goal["first"], goal["second"]) for goal in result["goals"]} == {
        ("ours", "bare"),
        ("ours-tiktoken", "bare"),
    }
    assert result["provenance"]["command"].startswith("python -m benchmarks.tokenization --methods")
    assert "| ours, stock backend |" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]  # the scratch text is gone


def test_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no 'theirs'; there are bare, ours"):
        main(["--methods", "theirs"])
    with pytest.raises(UserError, match="--rounds 0: must be at least 1"):
        main(["--rounds", "0"])


@pytest.mark.slow
def test_a_method_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ours failed with status 1"):
        run_method("ours", tmp_path / "none", tmp_path / "none", 1, tmp_path)


@pytest.mark.slow
def test_one_file_is_divided_among_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    words = ["--megabytes", "10", "--vocab-size", "400", "--kinds", "csv", "--out", str(out)]
    assert divided.main(words) == 0
    [row] = json.loads(out.read_text())["rows"]
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == row
    assert row["same_bytes"]
    assert row["one"]["parts"] == row["several"]["parts"] == 3  # of 4 MiB
    assert 0 < row["several"]["cores"] < 64
