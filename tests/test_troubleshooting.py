"""Each message of this project that docs/troubleshooting.md explains is still one of its source."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "troubleshooting.md"
FOLDERS = ("data_pipeline", "pretrain", "launch", "eval", "tools")
ROW = re.compile(r"\| `([^`]+)` (?:\*\((.+?)\)\* )?\|(.*)\|(.*)\|$", re.MULTILINE)


class Entry(NamedTuple):
    """A row of the page: a message, ``...`` for what varies. ``library``: whose it is; None if it is ours."""

    message: str
    library: str | None
    remedy: str


def entries(page: str) -> list[Entry]:
    """The rows of the tables of messages."""
    cells = page.replace(r"\|", "/")
    return [Entry(found[1], found[2], found[4].strip()) for found in ROW.finditer(cells)]


def plain(code: str) -> str:
    """Python with adjacent strings joined and the fields of f-strings cut out, as NUL."""
    joined = re.sub(r"([\"'])\s*(?:\+\s*)?(?:#[^\n]*\n\s*)?[rf]*\1(?!\1)", "", code)
    while True:
        cut = re.sub(r"\{[^{}]*\}", "\0", joined)
        if cut == joined:
            return cut
        joined = cut


@functools.cache
def source() -> str:
    """The messages of all modules and of the Makefile, and the code around them."""
    files = [REPOSITORY / "Makefile", *(file for name in FOLDERS for file in sorted((REPOSITORY / name).rglob("*.py")))]
    return "\n".join(plain(file.read_text(encoding="utf-8")) for file in files)


def stands_in(message: str, text: str) -> bool:
    """Whether the constant parts of a message follow each other in ``text``, a field between each two."""
    parts = [re.escape(part).replace(r"\ ", " ") for part in re.split(r"\.\.\.", message)]
    return re.search('[^"\n]{0,60}?\0[^"\n]{0,60}?'.join(parts), text) is not None


OURS = sorted({entry.message for entry in entries(PAGE.read_text(encoding="utf-8")) if entry.library is None})


@pytest.mark.parametrize("message", OURS)
def test_the_message_is_one_of_the_source(message: str) -> None:
    assert stands_in(message, source())


def test_the_page_has_the_messages_that_are_met_most() -> None:
    found = entries(PAGE.read_text(encoding="utf-8"))
    assert len({entry.message for entry in found}) == len(found)
    assert len(OURS) >= 40
    assert [entry.message for entry in found if entry.library is None and not entry.remedy] == []
    assert {"torch", "NCCL", "gloo", "DeepSpeed", "transformers"} <= {entry.library for entry in found}


def test_a_message_that_was_reworded_is_found() -> None:
    code = 'raise UserError(\n    f"{path} holds {count:,} rows, "\n    f"but {", ".join(names)} are needed"\n)\n'
    assert stands_in("holds ... rows, but ... are needed", plain(code))
    assert not stands_in("holds ... lines", plain(code))
    assert not stands_in("are needed ... holds", plain(code))
    rows = entries("| `a ... b` | why | do `x \\| y` |\n| `c` *(torch)* | why | |\n| 2 | a mistake | correct it |\n")
    assert rows == [Entry("a ... b", None, "do `x / y`"), Entry("c", "torch", "")]
