"""``nystrom convert``: a checkpoint to another library's format, or from it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from data_pipeline.command_line import Parser
from pretrain.convert.command import COMMANDS


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments; ``command_run`` of what they parse to is the command."""
    parser = Parser(
        prog="nystrom convert",
        description="Write a checkpoint as a folder of another library, or read theirs.",
        examples=[kind.examples[0] for kind in COMMANDS.all().values()],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for kind in COMMANDS.all().values():
        command = kind()
        at = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            examples=command.examples,
            epilog=command.epilog,
        )
        command.add_arguments(at)
        at.set_defaults(command_run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(argv)
    return int(args.command_run(args))
