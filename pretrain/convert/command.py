"""What a command of ``nystrom convert`` is; ``commands/NAME.py`` registers the ones there are.

The modules are all imported for the help text, so none of them may import torch when it is loaded.
"""

from __future__ import annotations

import argparse
from typing import ClassVar

from data_pipeline.command_line import Example
from data_pipeline.registry import Registry

PARTS = {
    "summary": "a line for the list of commands",
    "description": "what it does, for its own help",
    "examples": "commands as one types them",
    "add_arguments": "its arguments",
    "run": "the work itself",
}


class Command:
    """One direction of conversion. Subclasses define ``name`` and all of :data:`PARTS`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    description: ClassVar[str]
    examples: ClassVar[tuple[Example, ...]]
    epilog: ClassVar[str] = ""
    """What else its own help says."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own arguments."""
        raise NotImplementedError

    def run(self, args: argparse.Namespace) -> int:
        """Convert; returns the exit status. Raises :class:`~data_pipeline.errors.UserError`."""
        raise NotImplementedError


COMMANDS: Registry[Command] = Registry("command of convert", "pretrain.convert.commands", Command, PARTS)
