"""`--config NAME`: a preset of the working directory or of the program. A path wins; near names are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import UserError
from launch import program
from pretrain.config import load_config
from pretrain.config.cli import values_of
from pretrain.config.load import PRESETS, find_config

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = yaml.safe_load((PRESETS / "books-clm.yaml").read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**raw, "name": name}))


@pytest.mark.parametrize("name", NAMES)
def test_each_preset_is_found_by_its_name_anywhere(name: str) -> None:
    assert load_config(name).name == name


def test_the_working_directory_comes_before_the_program_and_a_path_before_both(elsewhere: Path) -> None:
    write(elsewhere / "configs" / "books-clm.yaml", "mine")
    write(elsewhere / "configs" / "own.yaml", "own")
    assert load_config("books-clm").name == "mine"
    assert load_config("own").name == "own"
    write(elsewhere / "books-clm", "a-file")  # a path, if a strange one
    assert load_config("books-clm").name == "a-file"
    assert load_config("configs/books-clm.yaml").name == "mine"


def test_overrides_and_the_table_of_values_take_a_name() -> None:
    assert load_config("books-clm", ["optimizer.lr=1e-3"]).optimizer.lr == 1e-3
    values = {value.name: value.text for value in values_of("books-clm")}
    assert values["name"] == "books-clm"


@pytest.mark.parametrize("command", ["config", "plan"])
def test_an_unknown_name_is_told_the_near_one_and_all(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([command, "--config", "book-clm"]) == 2
    message = capsys.readouterr().err
    assert "there is no configuration 'book-clm': did you mean 'books-clm'?" in message
    assert ", ".join(NAMES) in message


def test_a_path_that_is_not_there_stays_one(elsewhere: Path) -> None:
    for path in ("books-clm.yaml", "configs/books-clm", "runs/x.yml"):
        assert find_config(path) == Path(path)
        with pytest.raises(UserError, match=f"configuration {path} does not exist"):
            load_config(path)
    (elsewhere / "configs").mkdir()
    with pytest.raises(UserError, match="there is no configuration 'configs'"):
        load_config("configs")
