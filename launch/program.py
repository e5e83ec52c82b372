"""The program ``nystrom``: one name for every folder's command line.

The first word says whose ``main`` gets the rest of the line. It is imported only then: ``nystrom --help`` and
``nystrom data --help`` answer at once, without importing torch.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import textwrap
from collections.abc import Sequence

from launch import shadowing

COMMANDS = {
    "data": ("data_pipeline.cli", "text -> tokenizer -> shards: stdlib, tokenizer, prepare, verify, inspect"),
    "init": ("launch.init", "a first configuration for a corpus and a machine, each choice with its reason"),
    "config": ("pretrain.config.cli", "the keys of a run's YAML: type, default, meaning; what a file comes to"),
    "plan": ("pretrain.planning.cli", "before a run: its memory, time, cost, and whether it fits"),
    "train": ("pretrain.cli", "pretrain on this process, or as one rank of a launcher's"),
    "launch": ("launch.cli", "start `train` or `eval` on several processes, here or on a cluster; see, stop a run"),
    "replay": ("pretrain.replay", "look again at the batch of a step that went wrong, row by row"),
    "eval": ("eval.cli", "evaluate a checkpoint: validity gate, loss, classification, long range, generation, ..."),
    "generate": ("eval.shell.generate", "a causal model continues prompts, in the shell"),
    "fill": ("eval.shell.fill", "a masked model names the likeliest words for a mask, in the shell"),
    "convert": ("pretrain.convert.cli", "a checkpoint to another library's format, or from it"),
    "push": ("pretrain.convert.push", "a converted folder to the Hugging Face hub"),
    "report": ("eval.report.cli", "one HTML page with the curves, tables and samples of runs"),
    "demo": ("launch.demo", "all of the above on a built-in corpus, in minutes"),
    "completion": ("launch.completion.cli", "the code by which bash, zsh or fish complete these commands"),
}

WITHIN = {
    **dict.fromkeys(("stdlib", "tokenizer", "prepare", "verify", "inspect", "contamination"), "data"),
    **dict.fromkeys(("local", "slurm", "hostfile", "kubernetes", "array", "doctor", "status", "stop"), "launch"),
    **dict.fromkeys(("validity", "lm", "classify", "compare", "list"), "eval"),
}
"""Words that are commands of a command: those that are looked for most."""


def usage() -> str:
    """The help of the program itself, for the width of the terminal."""
    from data_pipeline.command_line import fill, help_width

    width, column = help_width() - 2, max(map(len, COMMANDS))
    indent = " " * (column + 4)
    lines = [
        textwrap.fill(summary, width, initial_indent=f"  {name:<{column}}  ", subsequent_indent=indent)
        for name, (_, summary) in COMMANDS.items()
    ]
    ways = "`nystrom help COMMAND` and `nystrom COMMAND --help` explain one, `nystrom --version` tells the version. "
    return "\n".join(
        [
            "usage: nystrom COMMAND ...",
            "",
            fill("Pretrain and evaluate Nyströmformer language models, masked and causal.", width),
            "",
            "commands, in the order in which they are used:",
            *lines,
            "",
            fill(ways + "New here? `nystrom demo` runs all of it on a built-in corpus.", width),
        ]
    )


def version() -> str:
    """The installed version; of a checkout that was never installed it is unknown."""
    from importlib import metadata  # costs as much as the rest of this program

    try:
        return metadata.version("nystrom-pretrain")
    except metadata.PackageNotFoundError:
        return "unknown"


def suggestion(word: str) -> str:
    """What somebody may have meant by a command that there is not, as the end of a sentence; empty if nothing is near.

    That is a command with a similar name, or one below another command: ``nystrom prepare``.
    """
    whole = {name: name for name in COMMANDS} | {name: f"{above} {name}" for name, above in WITHIN.items()}
    close = difflib.get_close_matches(word, whole, n=1)
    return f": did you mean `nystrom {whole[close[0]]}`?" if close else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch ``argv`` (default: the process's); returns its exit status.

    That is 2 for a command that is unknown, or whose packages another file hides.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        print(f"nystrom {version()}")
        return 0
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    hidden = shadowing.message(words)
    if hidden is not None:
        print(f"nystrom: error: {hidden}", file=sys.stderr)
        return 2
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        print(f"nystrom: error: no command '{command}'{suggestion(command)}\n\n{usage()}", file=sys.stderr)
        return 2
    from data_pipeline.errors import run_cli
    from pretrain.heap import use_huge_pages

    use_huge_pages()
    note = shadowing.foreign_libraries()
    if note is not None:
        print(f"nystrom: warning: {note}", file=sys.stderr)
    module = importlib.import_module(COMMANDS[command][0])
    return run_cli(module.main, f"nystrom {command}", rest)


def entry() -> None:
    """``python -m launch.program``, and the console script by way of ``nystrom_pretrain``."""
    if "_ARGCOMPLETE" in os.environ:  # Tab was pressed; argcomplete is imported for nothing else
        from launch.completion.finder import complete

        complete(COMMANDS)
    raise SystemExit(main())


if __name__ == "__main__":
    entry()
