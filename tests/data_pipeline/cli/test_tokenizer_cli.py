"""`nystrom data tokenizer`."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.cli import main
from data_pipeline.errors import UserError
from data_pipeline.tokenization.tokenizer import Tokenizer


def nystrom(*words: object) -> None:
    main([str(word) for word in words])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("The fox ran over the hill. " * 30)
    (tmp_path / "text" / "b.txt").write_text("Another dog runs over another hill. " * 30)
    return tmp_path


@pytest.mark.parametrize("model", ["bpe", "wordpiece", "unigram"])
def test_each_model_is_trained_once(text: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    command = ("tokenizer", "--input", text / "text", "--vocab-size", 400, "--model", model, "--out", text / "out")
    nystrom(*command)
    # Two of the models read the text twice; it counts once.
    assert "from 2 documents, 1.8 KiB of text" in capsys.readouterr().out
    trained = Tokenizer.load(text / "out")
    assert trained.decode(trained.encode("another fox")) == "another fox"
    nystrom(*command)
    assert f"already trained on this text, {trained.vocab_size} tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="already holds a tokenizer trained otherwise"):
        nystrom(*command, "--model", "bpe" if model == "wordpiece" else "wordpiece")
    (text / "out" / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    with pytest.raises(UserError, match="already holds a tokenizer trained otherwise"):
        nystrom(*command)
    nystrom(*command, "--overwrite")
    assert Tokenizer.load(text / "out").hash == trained.hash


def test_lowercase(text: Path) -> None:
    command = ("tokenizer", "--input", text / "text", "--vocab-size", 200, "--out", text / "out", "--lowercase")
    nystrom(*command, "--model", "wordpiece")
    assert Tokenizer.load(text / "out").decode(Tokenizer.load(text / "out").encode("THE Fox")) == "the fox"
    with pytest.raises(UserError, match="lowercase is for wordpiece"):
        nystrom(*command, "--model", "unigram", "--vocab-size", 400)


def test_broken_records_are_left_out_as_far_as_is_allowed(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ['{"text": "the fox ran over the hill"}\n'] * 9
    (text / "rows.jsonl").write_text("".join(rows) + '{"text": "cut')
    command = ("tokenizer", "--input", text / "rows.jsonl", "--vocab-size", 300, "--out", text / "out")
    with pytest.raises(UserError, match=r"1 of 10 records are broken.*(?s:.*)or allow more with --max-bad-fraction"):
        nystrom(*command)
    with pytest.raises(UserError, match="share between 0 and 1, got -1"):
        nystrom(*command, "--max-bad-fraction", "-1")
    nystrom(*command, "--max-bad-fraction", "0.1")
    assert "line 10: not a JSON record" in capsys.readouterr().out
    assert Tokenizer.load(text / "out").vocab_size <= 300
