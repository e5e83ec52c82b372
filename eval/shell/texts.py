"""Where the commands take their texts from: options, a file, standard input, or a person at a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from data_pipeline.errors import UserError

STDIN = "-"
DEFAULT_FIELD = "text"


class Given(NamedTuple):
    """A text, and where it came from, for messages."""

    text: str
    where: str


def at_terminal() -> bool:
    """Whether a person types what standard input gives."""
    return sys.stdin is not None and sys.stdin.isatty()


def given_texts(texts: Sequence[str], file: str | None, field: str | None, option: str) -> Iterator[Given]:
    """The texts of an option, else of ``file`` ("-": standard input), else of standard input; at least one.

    Lines of plain text, blank ones left out, or the field ``field`` of records; standard input holds JSON lines where a
    ``field`` is named. What comes in is handed on line by line. Raises :class:`UserError` naming file and line for
    what cannot be read, and where there is no text at all.
    """
    found: Iterator[Given]
    if texts:
        several = len(texts) > 1
        found = (
            Given(_whole(text, option), f"{option} {i} of {len(texts)}" if several else option)
            for i, text in enumerate(texts, 1)
        )
        source = option
    elif file is not None and file != STDIN:
        found, source = _of_file(file, field or DEFAULT_FIELD), file
    else:
        found, source = _of_stdin(field), "standard input"
    first = next(found, None)
    if first is None:
        raise UserError(f"{source} holds no text: give some with {option} TEXT, a file, or standard input")
    return chain([first], found)


def converse(handle: Callable[[Given], None], hello: str) -> None:
    """Handle each line that a person types, until Ctrl-D, or Ctrl-C before a line is done.

    What is wrong with a line is said and ends nothing; Ctrl-C while a line is handled ends that line only.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then has a history and editing
    print(hello, file=sys.stderr, flush=True)
    number = 0
    while True:
        try:
            if sys.stdout.isatty():
                line = input("> ")
            else:  # standard output is for text only
                print("> ", end="", file=sys.stderr, flush=True)
                line = input()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not line.strip():
            continue
        number += 1
        try:
            handle(Given(_whole(line, "the line"), f"line {number}"))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print(file=sys.stderr, flush=True)  # standard output is for texts


def _of_file(file: str, field: str) -> Iterator[Given]:
    from data_pipeline.sources.records import read_records

    for record, place in read_records(file, (field,), ("--text-field",), text_unit="line"):
        text = record[field]
        if not isinstance(text, str):
            raise UserError(f"{file}, {place}: field '{field}' is {type(text).__name__}, not text")
        if text.strip():
            yield Given(text, f"{file}, {place}")


def _of_stdin(field: str | None) -> Iterator[Given]:
    if sys.stdin is None:  # closed
        return
    for number, raw in enumerate(sys.stdin.buffer, 1):
        where = f"standard input, line {number}"
        try:
            line = raw.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 (byte {error.start + 1}): convert it with iconv") from None
        text = line if field is None or not line.strip() else _field(line, field, where)
        if text.strip():
            yield Given(text, where)


def _field(line: str, field: str, where: str) -> str:
    from data_pipeline.sources.reading import MISSING, find_field

    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not JSON; with --text-field each line is one JSON object") from None
    text = find_field(record, field) if isinstance(record, dict) else MISSING
    if text is MISSING:
        raise UserError(f"{where}: no field '{field}': name the one with the text with --text-field")
    if not isinstance(text, str):
        raise UserError(f"{where}: field '{field}' is {type(text).__name__}, not text")
    return _whole(text, where)


def _whole(text: str, where: str) -> str:
    """``text`` if it can be written as UTF-8; a terminal of another encoding may give what cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not UTF-8 at character {error.start + 1}") from None
    return text
