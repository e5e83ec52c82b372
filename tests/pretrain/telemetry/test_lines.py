"""Output on a full disk: kept, told once, written when there is room; and never the end of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.telemetry import lines
from pretrain.telemetry.lines import LineFile, print_line, write_or_warn

FULL = Path("/dev/full")  # Linux; every write to it is refused: no space left on device


def test_lines_are_kept_while_the_disk_is_full_and_written_when_it_is_not(tmp_path: Path) -> None:
    log = LineFile(FULL)
    assert log.append("one") == "/dev/full cannot be written (No space left on device); its lines are kept until it can"
    assert log.append("two") is None  # said once
    assert log._fd is not None
    room = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(room, log._fd)
    os.close(room)
    assert log.append("three") == "/dev/full is written again; no line is lost"
    assert log.append("four") is None
    assert log.close() is None
    assert (tmp_path / "log").read_text() == "one\ntwo\nthree\nfour\n"


def test_what_memory_cannot_keep_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "KEPT_BYTES", 10)
    log = LineFile(FULL)
    for _ in range(5):
        log.append("12345")
    assert log.close() == "/dev/full: 5 line(s) could not be written and are lost"


def test_a_folder_that_is_not_there_yet_is_a_failure_like_others(tmp_path: Path) -> None:
    log = LineFile(tmp_path / "later" / "log")
    assert "No such file or directory" in (log.append("one") or "")
    (tmp_path / "later").mkdir()
    assert "no line is lost" in (log.append("two") or "")
    log.close()
    assert (tmp_path / "later" / "log").read_text() == "one\ntwo\n"


def test_a_file_without_room_beside_it_is_overwritten_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lines, "write_atomic", full)
    (tmp_path / "status.json").write_text("x" * 100)
    write_or_warn(tmp_path / "status.json", b"done")
    assert (tmp_path / "status.json").read_text() == "done"
    assert capsys.readouterr().out == ""
    write_or_warn(tmp_path / "samples.txt", b"text")
    assert "samples.txt could not be written: No space left on device" in capsys.readouterr().out


def test_a_full_log_or_a_closed_pipe_does_not_end_the_run_or_change_its_status(tmp_path: Path) -> None:
    code = (
        "from pretrain.telemetry.lines import flush_output, print_line\n"
        "print_line('a line')\nprint_line('another')\nflush_output()\nraise SystemExit(74)"
    )
    with open(FULL, "w") as full:
        assert subprocess.run([sys.executable, "-c", code], stdout=full).returncode == 74
    reader, writer = os.pipe()
    os.close(reader)
    assert subprocess.run([sys.executable, "-c", code], stdout=writer).returncode == 74
    os.close(writer)


def test_tell_prints(capsys: pytest.CaptureFixture[str]) -> None:
    print_line("hello")
    assert capsys.readouterr().out == "hello\n"
