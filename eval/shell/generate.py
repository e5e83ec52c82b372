"""``nystrom generate``: a causal model continues prompts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from data_pipeline.command_line import Parser
from data_pipeline.console import say_loading, say_next
from data_pipeline.errors import UserError
from eval.shell.options import add_model, add_output, check_output, not_negative, opened, positive
from eval.shell.texts import Given, at_terminal, converse, given_texts

if TYPE_CHECKING:
    from eval.shell.writing import Decoding, Row, Writer

EXAMPLES = (
    'nystrom generate --checkpoint runs/books-clm --prompt "The river"',
    ("nystrom generate --checkpoint runs/books-clm", "asks for prompts, Ctrl-D ends"),
    "nystrom generate --checkpoint runs/books-clm --prompts prompts.txt --batch-size 16 --jsonl --out texts.jsonl",
    'echo "The river" | nystrom generate --checkpoint runs/books-clm --greedy',
)
EPILOG = """A text goes to standard output as it is written; everything else goes to standard error. The same seed
gives the same text: docs/generating.md says what that rests on."""


def build_parser() -> argparse.ArgumentParser:
    """The options of ``nystrom generate``."""
    parser = Parser(
        prog="nystrom generate",
        description="Continue prompts with a causal model. Without a prompt: standard input, a prompt a line, or at a "
        "terminal a conversation.",
        examples=EXAMPLES,
        epilog=EPILOG,
        allow_abbrev=False,
    )
    add_model(parser)
    source = parser.add_argument_group("prompts")
    one = source.add_mutually_exclusive_group()
    one.add_argument("--prompt", action="append", default=[], metavar="TEXT", help='repeatable; "": a new document')
    one.add_argument(
        "--prompts",
        metavar="FILE",
        help=".txt with a prompt a line, .jsonl, .csv, .parquet, ...; - for standard input",
    )
    source.add_argument(
        "--text-field",
        metavar="NAME",
        help="field or column of the prompts (default: text); with standard input: it holds JSON lines",
    )
    source.add_argument("--samples", type=positive, default=1, metavar="N", help="texts for each prompt (default: 1)")
    source.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="texts that are written together (default: 1)"
    )
    how = parser.add_argument_group("decoding")
    how.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="longest text (default: 128)")
    how.add_argument("--greedy", action="store_true", help="always the likeliest token")
    how.add_argument("--temperature", type=float, metavar="T", help="0: the likeliest token (default: 0.8)")
    how.add_argument("--top-k", type=not_negative, metavar="K", help="the K likeliest tokens; 0: all (default: 50)")
    how.add_argument("--top-p", type=float, metavar="P", help="the likeliest tokens that reach this (default: 1)")
    how.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1: tokens of the text get less likely (default: 1)"
    )
    how.add_argument("--beams", type=positive, metavar="N", help="a beam search, which is not streamed")
    how.add_argument("--length-penalty", type=float, metavar="X", help="of the beam search (default: 1)")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text, repeatable")
    how.add_argument(
        "--stop-id", action="append", type=not_negative, default=[], metavar="ID", help="end before this token"
    )
    how.add_argument(
        "--seed", type=not_negative, default=0, metavar="N", help="text i is drawn with N + i (default: 0)"
    )
    add_output(parser, "prompt, sample, text, tokens, finish_reason, seed")
    parser.add_argument("--no-echo", action="store_true", help="text without its prompt (a conversation never has it)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the continuations. Raises :class:`UserError` for what cannot be continued."""
    args = build_parser().parse_args(argv)
    check_arguments(args)
    asks = not args.prompt and args.prompts is None and at_terminal()
    given: Iterator[Given] | None = None
    if not asks:
        given = given_texts(args.prompt, args.prompts, args.text_field, "--prompt")
    say_loading()
    from eval.shell.opening import gate_note, open_model
    from eval.shell.writing import Writer
    from pretrain.next_commands import converting

    how = decoding_of(args)
    subject = open_model(args.checkpoint, "clm", args.device, args.precision)
    note = gate_note(subject, args.checkpoint)
    if note:
        print(note, file=sys.stderr, flush=True)
    writer = Writer(subject, how)
    with opened(args.out) as out:
        shown = Records(out) if args.jsonl else Texts(out, echo=not args.no_echo and given is not None)
        if given is None:
            hello = "Type the beginning of a text and Enter; Ctrl-C ends a text, Ctrl-D the conversation."
            converse(lambda line: _all(writer, shown, iter([line]), args.batch_size), hello)
        else:
            _all(writer, shown, given, args.batch_size)
    if not args.jsonl:
        say_next(converting(args.checkpoint))
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raises :class:`UserError` for options that exclude each other, before anything is loaded."""
    sampling = ("temperature", "top_k", "top_p", "repetition_penalty")
    given = [f"--{name.replace('_', '-')}" for name in sampling if getattr(args, name) is not None]
    if args.greedy:
        given.append("--greedy")
    if args.beams and given:
        raise UserError(f"--beams looks for the likeliest text and takes no {given[0]}: leave one of them out")
    if args.greedy and args.temperature is not None:
        raise UserError("--greedy is --temperature 0: leave one of them out")
    if args.length_penalty is not None and not args.beams:
        raise UserError("--length-penalty is of a beam search: give --beams too")
    if args.samples > 1 and (args.greedy or args.beams or args.temperature == 0):
        raise UserError("--samples: this way of decoding has one text for a prompt; sample with a --temperature")
    if args.text_field and args.prompt:
        raise UserError("--text-field names a field of a file: give --prompts too, or leave it out")
    check_output(args.out, args.prompts)


def decoding_of(args: argparse.Namespace) -> Decoding:
    """The settings, with the defaults of what was left out; raises :class:`UserError` for one that is out of range."""
    from eval.shell.writing import Decoding

    names = ("temperature", "top_k", "top_p", "repetition_penalty", "length_penalty", "beams")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.greedy:
        given["temperature"] = 0.0
    return Decoding(
        max_new_tokens=args.max_new_tokens,
        stops=tuple(args.stop),
        stop_ids=tuple(args.stop_id),
        samples=args.samples,
        seed=args.seed,
        **given,
    )


class Texts:
    """Texts as they grow, in the order of their prompts, an empty line between two."""

    def __init__(self, out: TextIO, *, echo: bool) -> None:
        self.out = out
        self.echo = echo
        self.first = True

    def batch(self, writer: Writer, rows: list[Row]) -> None:
        """Write a batch."""
        from eval.shell.stream import InOrder

        def begin(place: int) -> None:
            if self.echo:
                self._put(rows[place].prompt if self.first else "\n" + rows[place].prompt)
            elif not self.first:
                self._put("\n")
            self.first = False

        order = InOrder(len(rows), begin, self._put, lambda place: self._put("\n"))
        writer.write(rows, order.add, order.finish)

    def _put(self, piece: str) -> None:
        self.out.write(piece)
        self.out.flush()


class Records:
    """JSON lines, those of a batch as soon as it is done."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def batch(self, writer: Writer, rows: list[Row]) -> None:
        """Write a batch."""
        for written in writer.write(rows):
            self.out.write(json.dumps(asdict(written), ensure_ascii=False) + "\n")
        self.out.flush()


def _all(writer: Writer, shown: Texts | Records, given: Iterator[Given], size: int) -> None:
    for rows in writer.batches(given, size):
        shown.batch(writer, rows)
