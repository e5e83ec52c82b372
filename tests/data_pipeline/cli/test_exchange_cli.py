"""``nystrom data import`` and ``export`` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from exchange_case import write_datatrove, write_megatron

from data_pipeline.cli import main
from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.tokenizer import Tokenizer


def nystrom(*words: object) -> None:
    assert not main([str(word) for word in words])


@pytest.fixture
def tokenizer(tmp_path: Path, small_tokenizer: Tokenizer) -> Path:
    return small_tokenizer.save(tmp_path / "tok").parent


def test_import_says_what_it_counted_and_verified(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_megatron(tmp_path / "a", [[[10, 11, 2]], [[12, 2, 13, 2]], [[2]]])
    words = ("import", tmp_path / "a", "--tokenizer", tokenizer, "--out", tmp_path / "out", "--workers", 1)
    nystrom(*words)
    said = capsys.readouterr().out
    assert "2 documents, 7 tokens (uint16, 1 shard(s)) from 16" in said
    assert "source: 3 documents, 8 tokens, as the index says; 1 without a token left out" in said
    assert "ends: the source ended in '</s>' (2)" in said
    assert "verified: every id is in the vocabulary" in said
    assert "note: 1 end tokens stand inside documents" in said
    nystrom(*words)
    assert "already complete with these inputs and settings" in capsys.readouterr().out
    nystrom("verify", tmp_path / "out")
    nystrom("inspect", tmp_path / "out", "--page", tmp_path / "page.html")
    assert "not known: the shards were imported as tokens" in capsys.readouterr().out
    assert "bytes per token" not in (tmp_path / "page.html").read_text()
    nystrom("inspect", tmp_path / "out", "--json")
    assert json.loads(capsys.readouterr().out)["bytes_per_token"] is None
    nystrom(*words, "--overwrite", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["documents"], found["tokens"], found["text_bytes"], found["empty_documents"]) == (2, 7, None, 1)
    assert (found["source_documents"], found["source_tokens"]) == (3, 8)
    assert found["fingerprint"] == ShardSet.open(tmp_path / "out").fingerprint


def test_ends_are_told(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_datatrove(tmp_path / "a.ds", [[10, 300], [11, 12, 300]], index=False)
    words = ("import", source, "--tokenizer", tokenizer, "--workers", 1, "--token-size", 2, "--end-token", 300)
    nystrom(*words, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert ", no index; 0 without" in said
    assert "in the shards it is '</s>' (2)" in said
    write_datatrove(source, [[10, 2], [11, 12]])
    nystrom(*words[:6], "--mixed-ends", "--out", tmp_path / "mixed")
    assert (
        "1 documents of the source ended in '</s>' (2); '</s>' (2) was added to the others" in capsys.readouterr().out
    )
    nystrom(*words[:6], "--end-token", "none", "--out", tmp_path / "none")
    assert "no document had an end token, '</s>' (2) was added to each" in capsys.readouterr().out


def test_export_says_what_it_verified(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_megatron(tmp_path / "a", [[[40, 41]], [[42]]])
    nystrom("import", source, "--tokenizer", tokenizer, "--out", tmp_path / "shards", "--workers", 1)
    capsys.readouterr()
    nystrom("export", tmp_path / "shards", tmp_path / "parquet", "--format", "parquet", "--text")
    said = capsys.readouterr().out
    assert f"{tmp_path}/parquet/tokens-00000.parquet: 1 file(s)" in said
    assert "verified: read back, 2 documents and 5 tokens as in" in said
    nystrom("export", tmp_path / "shards", tmp_path / "b", "--format", "megatron")
    assert f"{tmp_path}/b.bin, {tmp_path}/b.idx: 2 file(s)" in capsys.readouterr().out
    nystrom("export", tmp_path / "shards", tmp_path / "b", "--format", "megatron", "--overwrite", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == [f"{tmp_path}/b.bin", f"{tmp_path}/b.idx"]
    assert found["bytes"] == sum(Path(file).stat().st_size for file in found["files"])
    assert (found["documents"], found["tokens"], found["format"]) == (2, 5, "megatron")


def test_options_that_do_not_fit_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    source = write_megatron(tmp_path / "a", [[[40, 41]], [[42]]])
    words = ("import", source, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    for more, message in (
        (("--workers", 0), "--workers must be at least 1"),
        (("--mixed-ends", "--end-token", "none"), "without an end token no document has one"),
        (("--out", tokenizer, "--overwrite"), "would remove the tokenizer"),
        (("--shard-tokens", 0), "shard_tokens must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            nystrom(*words, *more)
    nystrom(*words, "--workers", 1)
    with pytest.raises(UserError, match="Megatron-LM's files hold tokens only"):
        nystrom("export", tmp_path / "out", tmp_path / "b", "--format", "megatron", "--text")
    with pytest.raises(UserError, match="at least one token"):
        nystrom("export", tmp_path / "out", tmp_path / "b", "--format", "parquet", "--file-tokens", 0)
