"""What all commands print alike: one answer as JSON, the next command, and that PyTorch is being loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from commands_case import next_commands

from data_pipeline import console


def test_an_answer_is_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with console.answering(True) as answer:
        print("a library's line")
        answer.value = {"path": Path("a/b"), "loss": float("nan"), "rows": ({"x": float("inf")}, 1.5), "text": "日本"}
    said = capsys.readouterr()
    assert json.loads(said.out) == {"path": "a/b", "loss": None, "rows": [{"x": None}, 1.5], "text": "日本"}
    assert said.err == "a library's line\n"


def test_without_json_all_is_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    with console.answering(False) as answer:
        print("for people")
        answer.value = {"for": "nobody"}
    assert capsys.readouterr() == ("for people\n", "")


def test_a_failure_prints_the_answer_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(value: object) -> None:
        with console.answering(True) as answer:
            answer.value = value
            raise LookupError

    for value, printed in ((None, ""), ([1], "[\n 1\n]\n")):
        with pytest.raises(LookupError):
            fail(value)
        assert capsys.readouterr().out == printed


def test_next_commands_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    console.say_next(["data", "verify", Path("my shards/it's")], [], ["plan", "--gpus", 8])
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "next: nystrom data verify 'my shards/it'\"'\"'s'\nthen: nystrom plan --gpus 8\n"
    assert next_commands(said.err) == [["data", "verify", "my shards/it's"], ["plan", "--gpus", "8"]]


@pytest.mark.parametrize(
    ("name", "value", "following", "loading"),
    [
        ("NYSTROM_INNER", "1", False, True),  # the demo's own steps
        ("NYSTROM_LAUNCH_ID", "a1", False, False),  # the launcher says both
        ("RANK", "1", False, False),
        ("RANK", "0", True, True),  # torchrun's first process speaks for all
    ],
)
def test_processes_of_others_are_quiet(
    name: str,
    value: str,
    following: bool,
    loading: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    console.say_next(["data", "verify", "shards"])
    assert bool(capsys.readouterr().err) is following
    console.say_loading(elsewhere=True)
    assert bool(capsys.readouterr().err) is loading


def test_what_is_loaded_is_not_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    console.say_loading()
    assert capsys.readouterr().err == ""
    monkeypatch.delitem(sys.modules, "torch")
    console.say_loading()
    assert capsys.readouterr().err == "loading PyTorch ...\n"
