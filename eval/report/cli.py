"""``nystrom report``: one HTML page that compares runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.command_line import Parser
from data_pipeline.console import add_json, print_json, say_next
from data_pipeline.errors import UserError
from data_pipeline.units import count


def build_parser() -> argparse.ArgumentParser:
    """The options of ``nystrom report``."""
    parser = Parser(
        prog="nystrom report",
        description="Write one self-contained HTML page that shows and compares runs: validity, training curves, "
        "evaluation results, samples, configuration. It loads nothing from anywhere and works as a mail attachment.",
        examples=["nystrom report runs/books-clm runs/exact --out report.html"],
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folder, one of its checkpoints (RUN/checkpoints/stepN), or a folder with evaluation results only",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="the page to write (default: report.html)"
    )
    parser.add_argument("--title", help="heading of the page (default: the names of the runs)")
    add_json(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page; raises :class:`UserError` for a folder that is no run or a page that cannot be written."""
    args = build_parser().parse_args(argv)
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder: name the page, for example {args.out / 'report.html'}")
    print(f"reading {count(len(args.runs), 'run')} and drawing ...", file=sys.stderr, flush=True)
    from data_pipeline.files import write_atomic
    from eval.report.page import render
    from eval.report.runs import read_runs
    from pretrain.next_commands import with_text

    runs = read_runs(args.runs)
    text = render(runs, args.title)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out, text.encode(errors="replace"))
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error}") from None
    if args.json:
        print_json({"file": args.out.resolve(), "bytes": args.out.stat().st_size, "runs": [run.name for run in runs]})
        return
    print(f"report written to {args.out.resolve()}")
    usable = next((run for run in runs if run.trained and run.setting("model", "objective")), None)
    if usable is not None:
        say_next(with_text(usable.path, str(usable.setting("model", "objective"))))
