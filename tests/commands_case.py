"""Commands as text: what the program makes of them, and those that it names as the next ones."""

from __future__ import annotations

import argparse
import re
import shlex
from typing import Any, NoReturn

import pytest

from launch import program


class Parsed(BaseException):
    """Carries the arguments of a command out of it, before it does anything."""


def parse(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> argparse.Namespace:
    """The arguments that the command gets; raises ``SystemExit`` where it refuses them."""
    real = argparse.ArgumentParser.parse_args

    def parse_and_leave(self: argparse.ArgumentParser, *arguments: Any, **named: Any) -> NoReturn:
        raise Parsed(real(self, *arguments, **named))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
        with pytest.raises(Parsed) as caught:
            program.main(words)
    return caught.value.args[0]


def next_commands(errors: str) -> list[list[str]]:
    """The words behind ``nystrom`` of each command that standard error names as a next one."""
    return [shlex.split(line)[1:] for line in re.findall(r"^(?:next|then): (nystrom .*)$", errors, re.MULTILINE)]
