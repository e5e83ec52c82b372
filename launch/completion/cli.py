"""``nystrom completion``: the code by which a shell completes the program's words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from data_pipeline.command_line import Parser

SHELLS = ("bash", "zsh", "fish")
EXAMPLES = (
    ('eval "$(nystrom completion bash)"', "in ~/.bashrc"),
    ('eval "$(nystrom completion zsh)"', "in ~/.zshrc, below compinit"),
    ("nystrom completion fish > ~/.config/fish/completions/nystrom.fish", "once"),
    (
        "nystrom completion bash > ~/.local/share/bash-completion/completions/nystrom",
        "once, where the package bash-completion is installed; starts of the shell do not wait for it",
    ),
)
EPILOG = """Tab then completes commands, options and their choices. It also knows presets and YAML files for --config,
the keys of --set, suites and tasks, filters, and folders of runs and checkpoints. docs/command-line.md has more."""


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = Parser(
        prog="nystrom completion",
        description="Print the code by which a shell completes the words of `nystrom` when Tab is pressed. Give it to "
        "the shell in one of these ways, and open a new shell.",
        examples=EXAMPLES,
        epilog=EPILOG,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the code; returns 0."""
    args = build_parser().parse_args(argv)
    import argcomplete

    print(argcomplete.shellcode(["nystrom"], shell=args.shell).strip("\n"))
    return 0
