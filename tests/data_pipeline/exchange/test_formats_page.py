"""The commands and programs of docs/formats.md run, on tiny data."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from exchange_case import write_datatrove, write_megatron
from prepare_case import TEXTS
from spm_case import small_bpe, write

from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.tokenizer import Tokenizer
from launch import program

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "formats.md").read_text(encoding="utf-8")


def test_the_page(
    tmp_path: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for folder in ("megatron", "datatrove"):
        (tmp_path / folder).mkdir()
    small_tokenizer.save(tmp_path / "tokenizer")
    ids = [[*small_tokenizer.encode(text), small_tokenizer.eos_id] for text in TEXTS[:5]]
    write_megatron(tmp_path / "megatron" / "books", [[document] for document in ids])
    write_datatrove(tmp_path / "datatrove" / "a.ds", ids)
    write(tmp_path / "sentencepiece.model", small_bpe())
    (tmp_path / "notes.jsonl").write_text('{"text": "abc ab"}\n')
    commands = re.findall(r"^ {4}(\$ )?nystrom (.+)$", PAGE, re.MULTILINE)
    assert len(commands) == 6
    for _, command in sorted(commands, key=lambda found: bool(found[0])):  # what is made of an export comes last
        assert not program.main(shlex.split(command)), command
    said = capsys.readouterr().out
    assert said.count("verified: ") == 5
    found = [document.tolist() for document in ShardSet.open("shards/again").documents()]
    assert found == [document[:-1] for document in ids]
    assert ShardSet.open("shards/trove").num_tokens == ShardSet.open("shards/again").num_tokens
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, {})
    said = capsys.readouterr().out
    assert "['document', 'source', 'input_ids', 'text'] 5" in said
    assert "documents=2" in said
    assert ShardSet.open("shards/splits/test").num_documents == 1
