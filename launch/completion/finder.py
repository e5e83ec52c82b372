"""The answer to a press of Tab: the parser of the command on the line, and argcomplete's reading of it.

The shell starts ``nystrom`` with the line in ``COMP_LINE`` and the variable ``_ARGCOMPLETE``. Only the module of the
command on the line is imported, as without completion, and never torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import argcomplete
from argcomplete.lexers import split_line

from data_pipeline.command_line import Parser
from data_pipeline.errors import UserError
from launch.completion.values import completer

Commands = Mapping[str, tuple[str, str]]
"""Names of the program's commands, with the module of each and a line about it."""


def complete(commands: Commands, stream: TextIO | None = None, leave: Callable[[int], Any] = os._exit) -> None:
    """Write what fits the line, and end the process with ``leave``.

    ``commands``: those of the program. ``stream``: where to (default: what the shell says, which is file descriptor 8).
    """
    words = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    first = int(os.environ["_ARGCOMPLETE"])  # words before the program's own: `nystrom`, or `python -m ...`
    words = words[first:]
    try:
        parser, used = parser_for(words, commands)
        command = command_of(words)
        for each, action in actions(parser):
            offered = completer(command, each, action, words)
            if offered is not None:
                action.completer = offered  # type: ignore[attr-defined]
    except UserError:  # a suite's file at fault, say: the command itself will tell
        leave(1)
        return
    os.environ["_ARGCOMPLETE"] = str(first + used)
    argcomplete.autocomplete(parser, always_complete_options="long", exit_method=leave, output_stream=stream)


def parser_for(words: Sequence[str], commands: Commands) -> tuple[argparse.ArgumentParser, int]:
    """The parser that takes what comes behind ``words``, and how many of them stand before its own.

    ``words`` are those before the cursor, without the program's name.
    """
    if words and words[0] == "help":
        parser, used = parser_for(words[1:], commands)
        return parser, used + 1
    if not words:
        return _first_word(commands), 0
    if words[0] not in commands:
        return Parser(prog="nystrom", add_help=False), 0  # nothing is known of what follows
    if words[0] == "launch" and "--" in words:
        start = words.index("--") + 1
        if words[1] == "node":
            return importlib.import_module("pretrain.cli").build_parser(), start
        parser, used = parser_for(words[start:], commands)
        return parser, start + used
    if words[:2] == ["eval", "compare"]:
        return importlib.import_module("eval.compare").build_parser(), 2
    module = importlib.import_module(commands[words[0]][0])
    return (module.build_parser(module.named_tasks(words[1:])) if words[0] == "eval" else module.build_parser()), 1


def command_of(words: Sequence[str]) -> str:
    """The command that the word at the cursor belongs to; "" for the first word."""
    if words and words[0] == "help":
        return command_of(words[1:])
    if words and words[0] == "launch" and "--" in words:
        inner = words[words.index("--") + 1 :]
        return "train" if words[1] == "node" else command_of(inner)
    return words[0] if words else ""


def actions(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, argparse.Action]]:
    """All arguments of a parser and of its subparsers."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions(inner)
        else:
            yield parser, action


def _first_word(commands: Commands) -> argparse.ArgumentParser:
    """A parser that knows the commands by name."""
    parser = Parser(prog="nystrom")
    parser.add_argument("--version", action="store_true", help="print the version")
    known = parser.add_subparsers(dest="command")
    for name, (_, summary) in commands.items():
        known.add_parser(name, help=summary.replace("%", "%%"), add_help=False)
    known.add_parser("help", help="explain a command", add_help=False)
    return parser
