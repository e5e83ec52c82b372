"""A user's mistake in a notebook: the message and the line that was called, without the frames of the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.errors import UserError


def test_ipython_shows_the_message_and_the_line_of_the_cell(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shells = pytest.importorskip("IPython.core.interactiveshell", reason="IPython is not installed")
    shell = shells.InteractiveShell()
    shell.run_cell("from data_pipeline.tokenization.tokenizer import Tokenizer")
    shell.run_cell("print(1)\nTokenizer.load('/none/there')")
    printed = capsys.readouterr()
    shown = [line for line in (printed.out + printed.err).splitlines() if line]
    assert shown[0] == "1"
    assert shown[1].startswith("UserError: ")
    assert "/none/there" in shown[1]
    assert shown[-1] == "in line 2: Tokenizer.load('/none/there')"
    assert not [line for line in shown if "Traceback" in line or "tokenizer.py" in line]


def test_an_error_that_was_never_raised_has_its_message_alone() -> None:
    assert UserError("the path is missing")._render_traceback_() == ["UserError: the path is missing"]
