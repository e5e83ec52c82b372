"""Lines about long work, where no bar is drawn."""

from __future__ import annotations

import pytest

from data_pipeline import bars


def test_lines_where_no_bar_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = bars.Lines("tokenizing", 4 << 20, "B", clock=lambda: now)
    assert capsys.readouterr() == ("", "tokenizing 4.0 MiB ...\n")
    for now in (10.0, 29.0, 40.0):  # noqa: B007 - the clock reads it
        lines.update(1 << 20)
    assert capsys.readouterr().err == "tokenizing: 3.0 MiB of 4.0 MiB, about 13 s left\n"
    now = 75.0
    lines.update(2 << 20)  # more than was thought: JSON's characters are not counted, say
    assert capsys.readouterr().err == "tokenizing: 5.0 MiB\n"


def test_counting_without_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    with bars.counting("reading", None, " tokens") as update:
        update(5)
    assert capsys.readouterr() == ("", "reading ...\n")
