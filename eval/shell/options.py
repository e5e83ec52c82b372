"""Options that both commands have."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from data_pipeline.errors import UserError


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, where and in what precision it runs."""
    group = parser.add_argument_group("the model")
    group.add_argument("--checkpoint", required=True, metavar="RUN", help="run, checkpoint or export folder")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    group.add_argument(
        "--precision",
        choices=["fp32", "bf16", "auto"],
        default="fp32",
        help="of weights and arithmetic; auto: bf16 where the device is faster in it (default: fp32)",
    )


def add_output(parser: argparse.ArgumentParser, record: str) -> None:
    """Where the text goes, and as what."""
    group = parser.add_argument_group("output")
    group.add_argument("--jsonl", "--json", action="store_true", help=f"one JSON object a line: {record}")
    group.add_argument("--out", type=Path, metavar="FILE", help="write to FILE (default: standard output)")


def check_output(out: Path | None, source: str | None) -> None:
    """Raises :class:`UserError` for a file that cannot be written, or that is the input."""
    if out is None:
        return
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}: make it first")
    if source is not None and out.exists() and Path(source).exists() and out.samefile(source):
        raise UserError(f"--out {out} is the file that is read: name another")


@contextlib.contextmanager
def opened(out: Path | None) -> Iterator[TextIO]:
    """``out`` to be written anew, or standard output; raises :class:`UserError` where it cannot be opened."""
    if out is None:
        yield sys.stdout
        return
    try:
        file = out.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
    with file:
        yield file


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(text, 1)


def not_negative(text: str) -> int:
    """A whole number of at least 0, as a random generator takes it."""
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value < 2**62:
        raise argparse.ArgumentTypeError(f"a whole number of at least {least} is expected, got '{text}'")
    return value
