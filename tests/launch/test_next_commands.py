"""What runs, evaluations and the demo name as the next command; the program takes each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands_case import next_commands, parse
from training_case import settings, write_config, write_corpus

from launch import program
from pretrain.next_commands import converting, resuming, with_text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_corpus(folder)
    return folder


def write_run(corpus: Path, folder: Path, **changes: Any) -> str:
    return write_config(folder / "my run.yaml", settings(corpus, folder / "runs", **changes))


@pytest.mark.parametrize("place", ["launch local", "train"])
@pytest.mark.parametrize("code", [0, 75, 76])
def test_after_training(
    place: str,
    code: int,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_run(corpus, tmp_path, data={"valid": str(corpus / "valid")})
    monkeypatch.setattr("launch.places.local.launch_local", lambda *_, **__: code)
    monkeypatch.setattr("pretrain.run.train", lambda *_, **__: code)
    words = [*place.split(), "--config", config, "--resume", "never", "--set", "name=other"]
    assert program.main(words) == code
    found = next_commands(capsys.readouterr().err)
    run = str(tmp_path / "runs" / "other")
    again = [word if word != "never" else "auto" for word in words]
    expected = {0: [["eval", "validity", "lm", "--checkpoint", run]], 75: [again], 76: []}
    assert found == expected[code]
    for command in found:
        parse(monkeypatch, command)


def test_a_run_without_held_out_text_is_looked_at(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.places.local.launch_local", lambda *_, **__: 0)
    assert program.main(["launch", "local", "--config", write_run(corpus, tmp_path)]) == 0
    (command,) = next_commands(capsys.readouterr().err)
    assert command == ["fill", "--checkpoint", str(tmp_path / "runs/run"), "--text", "The [MASK] of the book"]
    assert parse(monkeypatch, command).text == ["The [MASK] of the book"]


def test_a_dry_run_names_none(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["launch", "local", "--config", write_run(corpus, tmp_path), "--dry-run"]) == 0
    assert next_commands(capsys.readouterr().err) == []


@pytest.mark.parametrize("as_json", [False, True])
def test_after_an_evaluation_on_several_processes(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.evaluation.launch_evaluation", lambda *_: 0)
    words = ["launch", "local", "--nproc", "2", "--", "eval", "validity", "--checkpoint", "runs/a"]
    assert program.main(words + ["--json"] * as_json) == 0
    said = capsys.readouterr()
    assert said.err.startswith("loading PyTorch in 2 processes ...\n")
    assert next_commands(said.err) == ([] if as_json else [["report", "runs/a/eval"]])


def test_never_is_not_repeated() -> None:
    assert resuming(["train", "--resume=never"]) == ["train", "--resume=auto"]
    assert resuming(["train", "--set", "name=never"]) == ["train", "--set", "name=never"]


def test_a_checkpoint_is_converted_under_its_run_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert converting("runs/a/export") == ["convert", "to-hf", "runs/a/export", "hf/a"]
    for command in (converting("runs/a"), with_text("runs/a", "clm"), with_text("runs/a", "mlm")):
        parse(monkeypatch, command)
    Path("hf/a").mkdir(parents=True)
    assert converting("runs/a") == []
