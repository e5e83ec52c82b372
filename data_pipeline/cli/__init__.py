"""``nystrom data``: from text to shards. One module is one command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from data_pipeline.cli import contamination, export, import_tokens, inspect, prepare, stdlib, tokenizer, verify
from data_pipeline.command_line import Parser

DESCRIPTION = """Turn text into what training reads: collect documents, train a tokenizer, write checksummed shards of
tokens.

Text comes from JSONL (one record a line), CSV, plain text (a file or a line is a document), each also as .gz or .zst,
from Parquet, from datasets of the Hugging Face hub, and from standard input. Tokens come from and go to the files of
Megatron-LM, datatrove and Parquet."""
EXAMPLES = (
    "nystrom data stdlib --out corpus",
    "nystrom data tokenizer --input corpus/train.jsonl --vocab-size 8192 --out tokenizer",
    "nystrom data prepare --input corpus/train.jsonl --tokenizer tokenizer --out shards/train",
    "nystrom data inspect shards/train",
)
EPILOG = "The examples lead from nothing to shards. `nystrom data COMMAND --help` explains one command."

COMMANDS = {
    "stdlib": stdlib,
    "tokenizer": tokenizer,
    "prepare": prepare,
    "verify": verify,
    "inspect": inspect,
    "contamination": contamination,
    "import": import_tokens,
    "export": export,
}


def build_parser() -> argparse.ArgumentParser:
    """The options of ``nystrom data``."""
    parser = Parser(prog="nystrom data", description=DESCRIPTION, examples=EXAMPLES, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        about = f"{module.SUMMARY[0].upper()}{module.SUMMARY[1:]}."
        command = commands.add_parser(name, help=module.SUMMARY, description=about, examples=[module.EXAMPLE])
        module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run one command; raises :class:`UserError` for the user's mistakes."""
    args = build_parser().parse_args(argv)
    status: int | None = COMMANDS[args.command].run(args)
    return status
