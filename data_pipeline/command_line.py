"""The parsers of all commands: one layout of ``--help`` for the width of the terminal, and errors with suggestions.

It lives in ``data_pipeline`` because that is the bottom layer, and imports nothing of the project.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

NARROWEST, WIDEST = 60, 100
"""Columns between which help is laid out: longer lines are hard to read, and shorter ones leave no room for text."""
STATUSES: Mapping[int, str] = {0: "done", 2: "a mistake in the command, or in what it reads"}
"""What the exit statuses of every command mean, where it says nothing else."""
Example = str | tuple[str, str]
"""A command as one types it, or a command and what it is for."""

_WORD = re.compile(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""")
_CHOICE = re.compile(r"invalid choice: '(?P<given>[^']*)' \(choose from (?P<known>.*)\)")


def help_width() -> int:
    """Columns of help: those of the terminal or of the variable ``COLUMNS``, within bounds; 80 if neither is known."""
    return min(max(shutil.get_terminal_size((80, 24)).columns, NARROWEST), WIDEST)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Wraps prose, keeps the lines that begin with a space, and shows defaults where there are any worth showing."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"width": help_width() - 2, **options})  # argparse's own margin

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, "", [], ()) or action.required or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent(fill(text, width - len(indent)), indent)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _wrap(" ".join(text.split()), width)


class Parser(argparse.ArgumentParser):
    """A command's parser; its subparsers are of this class too.

    ``description`` and ``epilog`` are prose, paragraphs with empty lines between them, in which a line that begins
    with a space is kept as it is. ``examples``: :data:`Example` each. ``exit_status``: those that mean something else
    than :data:`STATUSES`, or more.
    """

    def __init__(
        self,
        *arguments: Any,
        examples: Sequence[Example] = (),
        exit_status: Mapping[int, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **{"formatter_class": HelpFormatter, **options})
        self.examples = tuple(examples)
        self.exit_status = {**STATUSES, **(exit_status or {})}
        self._given: Sequence[str] = ()
        self._parsed = argparse.Namespace()

    def format_help(self) -> str:
        """The whole help, with examples and exit statuses at its end."""
        prose = self.epilog
        width = help_width() - 2
        end = (examples_text(self.examples, width), prose, statuses_text(self.exit_status, width))
        try:
            self.epilog = "\n\n".join(part.strip("\n") for part in end if part)
            return super().format_help()
        finally:
            self.epilog = prose

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does; what was given is kept for :meth:`error`."""
        if args is not None:
            self._given = list(args)
        self._parsed, rest = super().parse_known_args(args, namespace)
        return self._parsed, rest

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and what was perhaps meant, and exit with status 2."""
        chosen = self._chosen() if message.startswith("unrecognized arguments") else self
        super(Parser, chosen).error(message + chosen.suggestion(message))

    def _chosen(self) -> Parser:
        """The parser of the subcommand that was given, of whose options the outer parser knows nothing."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                inner = action.choices.get(getattr(self._parsed, action.dest, ""))
                if isinstance(inner, Parser):
                    return inner._chosen()
        return self

    def suggestion(self, message: str) -> str:
        """What was perhaps meant, as the end of the message; empty where nothing is near."""
        choice = _CHOICE.search(message)
        if choice:
            known = [word.strip("'\" ") for word in choice["known"].split(",")]
            close = difflib.get_close_matches(choice["given"], known, n=1)
            return f"; did you mean '{close[0]}'?" if close else ""
        options = [option for option in self._option_string_actions if option.startswith("--")]
        for word in self._given:
            if word == "--":
                break
            name = word.partition("=")[0]
            if not name.startswith("--") or self._takes(name, options):
                continue
            close = difflib.get_close_matches(name, options, n=1)
            if close:
                return f"; did you mean {close[0]} instead of {name}?"
        return ""

    def _takes(self, name: str, options: Collection[str]) -> bool:
        return name in options or (self.allow_abbrev and any(option.startswith(name) for option in options))


def fill(text: str, width: int) -> str:
    """Prose wrapped to ``width`` columns: paragraphs stay apart, and lines that begin with a space stay whole."""
    done: list[str] = []
    prose: list[str] = []
    for line in [*text.strip("\n").split("\n"), ""]:
        if line.strip() and not line.startswith(" "):
            prose.append(line)
            continue
        done += _wrap(" ".join(prose), width)
        prose = []
        done.append(line.rstrip())
    return "\n".join(done[:-1])


def examples_text(examples: Sequence[Example], width: int) -> str:
    """The examples below a heading. What they are for stands behind them, or above where a line is too short for it.

    A command that is too long is continued on further lines, as a shell takes it.
    """
    if not examples:
        return ""
    pairs = [(each, "") if isinstance(each, str) else each for each in examples]
    column = max(len(command) for command, _ in pairs)
    beside = all(4 + column + 2 + len(comment) <= width for _, comment in pairs)
    lines = ["examples:"]
    for command, comment in pairs:
        if comment and not beside:
            lines += _wrap(comment, width, "  # ", "  # ")
        lines += _continued(command, width)
        if comment and beside:
            lines[-1] = f"  {command:<{column}}  # {comment}"
    return "\n".join(lines)


def statuses_text(statuses: Mapping[int, str], width: int) -> str:
    """The exit statuses below a heading, one a line."""
    if not statuses:
        return ""
    column = max(len(str(number)) for number in statuses)
    lines = ["exit status:"]
    for number, meaning in sorted(statuses.items()):
        lines += _wrap(meaning, width, f"  {number:<{column}}  ", " " * (column + 4))
    return "\n".join(lines)


def _wrap(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    """Lines of text; options (``--no-head``) and paths are not broken."""
    return textwrap.wrap(
        text,
        max(width, 11),
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _continued(command: str, width: int) -> list[str]:
    """A command as indented lines, broken with a backslash: before options, so that values stay with them."""
    if len(command) + 2 <= width:
        return [f"  {command}"]
    parts: list[str] = []
    for word in _WORD.findall(command):
        if parts and not word.startswith("-") and len(parts[-1]) + len(word) + 7 <= width:
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    lines = [f"  {parts[0]}"]
    for part in parts[1:]:
        if len(lines[-1]) + 1 + len(part) + 2 > width:
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}"
    return lines
