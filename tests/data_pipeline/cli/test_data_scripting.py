"""``nystrom data`` in scripts: answers in JSON, and the command that comes next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands_case import next_commands, parse

from data_pipeline.cli import main
from data_pipeline.errors import run_cli
from data_pipeline.shards.shardset import ShardSet

TEXTS = [f"the document number {i} is about {'many words ' * (i % 9)}" for i in range(200)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, " "]))
    return path


def nystrom(*words: object) -> None:
    assert not main([str(word) for word in words])


def tokenizer_of(corpus: Path) -> Path:
    nystrom("tokenizer", "--input", corpus, "--vocab-size", 300, "--out", corpus.parent / "tok")
    return corpus.parent / "tok"


def as_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """What a command prints with ``--json``, which names no next command."""
    capsys.readouterr()
    nystrom(*words, "--json")
    said = capsys.readouterr()
    assert next_commands(said.err) == []
    found: dict[str, Any] = json.loads(said.out)
    return found


def test_commands_answer_in_json(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tok, out = corpus.parent / "tok", corpus.parent / "out"
    words = ("tokenizer", "--input", corpus, "--vocab-size", 300, "--out", tok)
    trained = as_json(capsys, *words)
    assert (trained["folder"], trained["trained"], trained["vocab_size"]) == (str(tok), True, 300)
    assert trained["text_bytes"] == sum(len(text) for text in TEXTS)
    assert as_json(capsys, *words) == trained | {"trained": False, "documents": None, "text_bytes": None}

    words = ("prepare", "--input", corpus, "--tokenizer", tok, "--out", out)
    written, shards = as_json(capsys, *words), ShardSet.open(out)
    assert (written["folder"], written["documents"], written["empty_documents"]) == (str(out), 200, 1)
    assert (written["tokens"], written["fingerprint"]) == (shards.num_tokens, shards.fingerprint)
    assert written["tokenizer_hash"] == trained["tokenizer_hash"]
    assert (written["complete"], written["already_complete"]) == (True, False)
    assert as_json(capsys, *words)["already_complete"] is True

    verified = as_json(capsys, "verify", out)
    assert (verified["intact"], verified["fingerprint"]) == (True, shards.fingerprint)
    files = [path for path in out.iterdir() if path.name != "manifest.json"]
    assert (verified["files"], verified["bytes"]) == (len(files) + 1, sum(path.stat().st_size for path in files))
    assert verified["bytes"] == written["bytes"]

    inspected = as_json(capsys, "inspect", out)
    assert {key: inspected[key] for key in ("tokens", "text_bytes", "fingerprint")} == {
        key: written[key] for key in ("tokens", "text_bytes", "fingerprint")
    }
    found = as_json(capsys, "contamination", "--shards", out, "--eval", corpus, "--workers", 1, "--n", 5)
    assert found["files"][0]["texts"] == 200
    assert found["shards"] == [{"folder": str(out), "fingerprint": shards.fingerprint}]


def test_a_part_of_an_array_answers_too(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", "--input", corpus, "--tokenizer", tokenizer_of(corpus), "--out", corpus.parent / "out"]
    part = as_json(capsys, *words, "--shard-index", 0, "--num-shards", 2)
    assert (part["complete"], part["units"]) == (False, 1)
    assert "fingerprint" not in part


def test_damage_leaves_no_answer(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = corpus.parent / "out"
    nystrom("prepare", "--input", corpus, "--tokenizer", tokenizer_of(corpus), "--out", out)
    (out / "tokens-00000-00000.bin").unlink()
    capsys.readouterr()
    assert run_cli(main, "nystrom data", ["verify", str(out), "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "is damaged, 1 fault" in said.err


def test_each_command_names_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my texts").mkdir()
    for name in ("train", "valid"):
        lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
        Path("my texts", f"{name}.jsonl").write_text(lines)

    def following(*words: object) -> list[str]:
        """The command that this one names, which the program takes."""
        capsys.readouterr()
        nystrom(*words)
        (command,) = next_commands(capsys.readouterr().err)
        parse(monkeypatch, command)
        return command[1:] if command[0] == "data" else command

    given = ["--input", "my texts/train.jsonl", "--text-field", "body"]
    prepare = following("tokenizer", *given, "--vocab-size", 300, "--out", "tok")
    assert prepare == ["prepare", *given, "--tokenizer", "tok", "--out", "shards/train"]
    assert following("tokenizer", *given, "--vocab-size", 300, "--out", "tok") == prepare
    assert following(*prepare) == ["inspect", "shards/train"]
    assert following("verify", "shards/train") == ["inspect", "shards/train"]
    assert following("inspect", "shards/train") == ["init", "--data", "shards/train", "--out", "run.yaml"]
    Path("run.yaml").write_text("")
    nystrom(*(word.replace("train", "valid") for word in prepare))
    both = ["init", "--data", "shards/train", "--valid", "shards/valid", "--out", "run-2.yaml"]
    assert following("inspect", "shards/train") == following("inspect", "shards/valid") == both
