"""``nystrom fill``: a masked model names the likeliest tokens for each mask."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from data_pipeline.command_line import Parser
from data_pipeline.console import say_loading, say_next
from data_pipeline.errors import UserError
from eval.shell.options import add_model, add_output, check_output, opened, positive
from eval.shell.texts import Given, at_terminal, converse, given_texts

if TYPE_CHECKING:
    from eval.shell.masks import Filled

EXAMPLES = (
    'nystrom fill --checkpoint runs/books-mlm --text "The [MASK] of the book"',
    "nystrom fill --checkpoint runs/books-mlm --texts sentences.txt --top 10 --jsonl --out filled.jsonl",
    ("nystrom fill --checkpoint runs/books-mlm", "asks for texts, Ctrl-D ends"),
)


def build_parser() -> argparse.ArgumentParser:
    """The options of ``nystrom fill``."""
    parser = Parser(
        prog="nystrom fill",
        description="The likeliest tokens for each mask of a text, with their probabilities, from a masked model. "
        "A mask is written [MASK], <mask> or as the tokenizer has it. Without a text: standard input, a text a line, "
        "or at a terminal a conversation.",
        examples=EXAMPLES,
        epilog="Each mask is filled by itself, with the other masks left as they are.",
        allow_abbrev=False,
    )
    add_model(parser)
    source = parser.add_argument_group("texts")
    one = source.add_mutually_exclusive_group()
    one.add_argument("--text", action="append", default=[], metavar="TEXT", help="repeatable")
    one.add_argument(
        "--texts", metavar="FILE", help=".txt with a text a line, .jsonl, .csv, .parquet, ...; - for standard input"
    )
    source.add_argument(
        "--text-field",
        metavar="NAME",
        help="field or column of the texts (default: text); with standard input: it holds JSON lines",
    )
    source.add_argument("--top", type=positive, default=5, metavar="N", help="tokens for each mask (default: 5)")
    add_output(parser, "text, and masks: for each a list of token, id, probability")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the masks. Raises :class:`UserError` for what cannot be filled."""
    args = build_parser().parse_args(argv)
    check_output(args.out, args.texts)
    if args.text_field and args.text:
        raise UserError("--text-field names a field of a file: give --texts too, or leave it out")
    asks = not args.text and args.texts is None and at_terminal()
    given = None if asks else given_texts(args.text, args.texts, args.text_field, "--text")
    say_loading()
    from eval.shell.masks import fill
    from eval.shell.opening import gate_note, open_model
    from pretrain.next_commands import converting

    subject = open_model(args.checkpoint, "mlm", args.device, args.precision)
    note = gate_note(subject, args.checkpoint)
    if note:
        print(note, file=sys.stderr, flush=True)
    with opened(args.out) as out:

        def handle(text: Given) -> None:
            show(fill(subject, text, args.top), out, jsonl=args.jsonl)

        if given is None:
            converse(handle, "Type a text with [MASK] in it and Enter; Ctrl-D ends.")
        else:
            for text in given:
                handle(text)
    if not args.jsonl:
        say_next(converting(args.checkpoint))
    return 0


def show(filled: Filled, out: TextIO, *, jsonl: bool) -> None:
    """Write one text: a JSON line, or the text with a line below for each candidate of each mask."""
    if jsonl:
        lines = [json.dumps(asdict(filled), ensure_ascii=False)]
    else:
        lines = [filled.text]
        for number, candidates in enumerate(filled.masks, 1):
            if len(filled.masks) > 1:
                lines.append(f"  mask {number} of {len(filled.masks)}")
            lines += [f"  {c.probability:.4f}  {json.dumps(c.token, ensure_ascii=False)}" for c in candidates]
    out.write("".join(line + "\n" for line in lines))
    out.flush()
