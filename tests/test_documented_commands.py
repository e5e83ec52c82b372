"""Every ``nystrom`` command in the pages is taken by the program: its options, suites and configurations exist."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands_case import parse

from launch import program

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md"))
)


def commands(text: str) -> list[str]:
    """The commands in blocks of code, without comments and redirections.

    Left out are those with a place to fill in (``SUITE``, ``...``), and those of a task that docs/extending.md adds.
    """
    joined = re.sub(r"\\\n\s*", "", text)
    lines = re.findall(r"^ {4,}(?:\$ )?nystrom ([a-z]+ .*)$", joined, re.MULTILINE)
    found = [re.split(r" [#>|] ", line)[0].strip() for line in lines]
    return [line for line in found if not re.search(r"\.\.\.|\b[A-Z]{3,}\b|<|^\w+: |^eval (list )?guesses", line)]


@functools.cache
def is_suite(name: str) -> bool:
    """Whether there is such a suite or task."""
    return program.main(["eval", "list", name]) == 0


def parts(words: list[str]) -> Iterator[list[str]]:
    """A command, and the one that it starts behind ``--``."""
    yield words
    if words[0] == "launch" and "--" in words:
        inner = words[words.index("--") + 1 :]
        yield ["train", *inner] if words[1] == "node" else inner


@pytest.mark.parametrize("page", PAGES)
def test_the_program_takes_every_command(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands((REPOSITORY / page).read_text(encoding="utf-8"))
    assert found or page in NO_COMMANDS
    for command in found:
        for words in parts(shlex.split(command)):
            try:
                args = parse(monkeypatch, words)
            except SystemExit:
                pytest.fail(f"{page}: `nystrom {shlex.join(words)}` is refused")
            own = getattr(args, "suite_path", None)  # suites of one's own
            suites = [] if own else getattr(args, "suites", [])
            assert [suite for suite in suites if suite != "list" and not is_suite(suite)] == [], command
        for config in re.findall(r"\bconfigs/\S+\.yaml", command):
            assert (REPOSITORY / config).is_file(), command


NO_COMMANDS = {
    "docs/checkpoints.md",
    "docs/configuration.md",
    "docs/glossary.md",
    "docs/pyramid.md",
    "docs/python.md",
    "docs/troubleshooting.md",
}


def test_a_wrong_command_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "    nystrom data verify shards --not-there > x   # a comment\n    $ nystrom eval \\\n      lm\n"
    text += "    nystrom eval SUITE\n    nystrom data: error: x\n"
    assert commands(text) == ["data verify shards --not-there", "eval lm"]
    with pytest.raises(SystemExit):
        parse(monkeypatch, ["data", "verify", "shards", "--not-there"])
    assert parse(monkeypatch, ["eval", "lm"]).suites == ["lm"]
    assert is_suite("lm")
    assert not is_suite("ml")


@pytest.mark.parametrize("page", PAGES)
def test_the_modules_to_run_exist(page: str) -> None:
    named = set(re.findall(r"python -m ([\w.]+)", (REPOSITORY / page).read_text(encoding="utf-8")))
    named -= {"venv", "pip", "benchmarks.NAME"}
    missing = [name for name in named if importlib.util.find_spec(name.rstrip(".")) is None]
    assert not missing
