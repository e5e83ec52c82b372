"""The logs of the ranks, and the first error among them."""

from __future__ import annotations

import io
import os
from pathlib import Path

from launch.rank_logs import Followers, first_error, newest_launch, rank_logs


def write(path: Path, text: str, age: float) -> None:
    path.write_text(text)
    os.utime(path, (1e9 - age, 1e9 - age))


def test_the_culprit_is_named_and_not_those_that_lost_it(tmp_path: Path) -> None:
    write(tmp_path / "rank-0.log", "step 1\nprocess 0: another process of this run went away; ending\n", age=9)
    write(tmp_path / "rank-1.log", "ok\nprocess 1 failed:\nTraceback (most recent call last):\nboom\n", age=5)
    write(tmp_path / "rank-2.log", "process 2 failed:\nlater\n", age=1)
    error = first_error(tmp_path)
    assert error is not None
    assert (error.rank, error.lines[0], error.lines[-1]) == (1, "process 1 failed:", "boom")


def test_a_rank_that_was_killed_says_nothing_and_is_named(tmp_path: Path) -> None:
    write(tmp_path / "rank-0.log", "process 0: another process of this run went away; ending\n", age=2)
    write(tmp_path / "rank-1.log", "step 6\nstep 7\n", age=9)
    error = first_error(tmp_path)
    assert error is not None
    assert error.rank == 1
    assert "without a word" in error.lines[0]
    assert error.lines[1:] == ["step 6", "step 7"]


def test_a_loss_alone_is_better_than_nothing(tmp_path: Path) -> None:
    assert first_error(tmp_path) is None
    write(tmp_path / "rank-3.log", "process 3: another process of this run went away; ending\n", age=1)
    error = first_error(tmp_path)
    assert error is not None
    assert error.rank == 3
    write(tmp_path / "rank-3.log", "step 1: loss 3.2\n", age=1)
    assert first_error(tmp_path) is None
    write(tmp_path / "rank-3.log", "step 1: loss 3.2\ntorch.OutOfMemoryError: CUDA out of memory\n", age=1)
    error = first_error(tmp_path)
    assert error is not None
    assert error.lines == ["torch.OutOfMemoryError: CUDA out of memory"]


def test_lines_are_copied_whole_and_once(tmp_path: Path) -> None:
    out = io.StringIO()
    followers = Followers(tmp_path, [0, 1], out)
    followers.copy()
    (tmp_path / "20260101_rank1.log").write_text("one\ntw")  # as DeepSpeed's launcher names it
    followers.copy()
    assert list(rank_logs(tmp_path)) == [1]
    with open(tmp_path / "rank-1.log", "a") as log:
        log.write("o\n")
    (tmp_path / "rank-0.log").write_text("zero\nlast")
    followers.copy()
    followers.finish()
    followers.finish()
    assert out.getvalue() == "[rank 1] one\nzero\n[rank 1] two\nlast\n"


def test_the_newest_launch(tmp_path: Path) -> None:
    assert newest_launch(tmp_path) is None
    for age, name in enumerate(["new", "old"]):
        (tmp_path / "logs" / name).mkdir(parents=True)
        os.utime(tmp_path / "logs" / name, (1e9 - age, 1e9 - age))
    assert newest_launch(tmp_path) == tmp_path / "logs" / "new"
