"""Arguments of ``python -m benchmarks.tokenization``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.presentation import markdown, provenance
from benchmarks.tokenization.corpus import write_corpus
from benchmarks.tokenization.measure import Run, run
from benchmarks.tokenization.methods import METHODS, NEEDS, TITLES
from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic

GOALS = {("ours", "bare"): 0.95, ("ours", "datasets"): 2.5, ("ours-tiktoken", "bare"): 3.0}
"""The least ratio of speeds, of the first to the second."""
DESCRIPTION = """Tokenize the same text with every competitor, in turns, each in a process of its own: MB of text a
second, as a ratio to the bare tokenizer, and the peak of memory of all processes together."""
EXAMPLE = """example:
  python -m benchmarks.tokenization --rounds 5 --out tokenization.json
  python -m benchmarks.tokenization --methods ours-tiktoken --megabytes 64 --repeat 16 --rounds 1   # 1 GB"""


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.tokenization",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--methods", default=",".join(METHODS), metavar="M,M", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--megabytes", type=float, default=64.0, metavar="X", help="text (default 64)")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="the same text so many times (default 1)")
    parser.add_argument("--vocab-size", type=int, default=32768, metavar="N", help="of the tokenizer (default 32768)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes or threads each (default 2)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each (default 3)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="scratch folder (default: a temporary one)")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a measured goal is not met")
    parser.add_argument("--out", type=Path, metavar="FILE", help="all numbers as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 1 if ``--check`` and a goal is not met."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    names = args.methods.split(",")
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods: no '{name}'; there are {', '.join(METHODS)}")
    if min(args.rounds, args.repeat, args.workers) < 1 or args.megabytes <= 0:
        raise UserError("--rounds, --repeat, --workers and --megabytes must be positive")
    skipped = {name: f"{NEEDS[name]} is not installed" for name in names if name in NEEDS and not _has(NEEDS[name])}
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        runs, text = _measure(args, [name for name in names if name not in skipped], Path(work))
    rows = [_row(name, runs, text["bytes"]) for name in runs]
    goals = _goals(runs)
    print(_table(rows, skipped, text))
    for goal in goals:
        print(f"{goal['first']} / {goal['second']}: {goal['ratio']:.2f} (goal {goal['goal']}): {goal['met']}")
    if args.out:
        import torch

        content = {
            "schema": 1,
            "provenance": provenance("benchmarks.tokenization", arguments, torch.device("cpu")),
            "text": text,
            "rows": rows,
            "skipped": skipped,
            "goals": goals,
        }
        write_atomic(args.out, (json.dumps(content, indent=1) + "\n").encode())
    return int(args.check and any(not goal["met"] for goal in goals))


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _measure(args: argparse.Namespace, names: Sequence[str], work: Path) -> tuple[dict[str, list[Run]], dict[str, Any]]:
    from data_pipeline.tokenization.training import train_tokenizer

    documents, size = write_corpus(work / "corpus", args.megabytes, args.repeat)
    with open(work / "corpus" / "00.jsonl", encoding="utf-8") as lines:
        train_tokenizer((json.loads(line)["text"] for line in lines), args.vocab_size).save(work / "tokenizer")
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for _ in range(args.rounds):
        # In an order drawn anew, so that a slow spell of the machine falls on all alike.
        for name in random.sample(list(names), len(names)):
            runs[name].append(run(name, work / "corpus", work / "tokenizer", args.workers, work))
            print(f"  {name}: {size / 1e6 / runs[name][-1].seconds:.2f} MB/s", file=sys.stderr, flush=True)
    return runs, {"documents": documents, "bytes": size, "vocab_size": args.vocab_size, "workers": args.workers}


def _row(name: str, runs: dict[str, list[Run]], size: int) -> dict[str, Any]:
    mine = runs[name]
    speeds = [size / 1e6 / each.seconds for each in mine]
    return {
        "method": name,
        "title": TITLES[name],
        "megabytes_per_second": statistics.median(speeds),
        "all_megabytes_per_second": speeds,
        "ratio_to_bare": _ratio(runs, name, "bare") if "bare" in runs else None,
        "peak_bytes": max(each.peak_bytes for each in mine),
        "tokens": mine[0].tokens,
    }


def _ratio(runs: dict[str, list[Run]], first: str, second: str) -> float:
    """Median over the rounds of the ratio of speeds."""
    return statistics.median(b.seconds / a.seconds for a, b in zip(runs[first], runs[second], strict=True))


def _goals(runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    out = []
    for (first, second), goal in GOALS.items():
        if first in runs and second in runs:
            ratio = _ratio(runs, first, second)
            out.append({"first": first, "second": second, "goal": goal, "ratio": ratio, "met": ratio >= goal})
    return out


def _table(rows: Sequence[dict[str, Any]], skipped: dict[str, str], text: dict[str, Any]) -> str:
    head = ["", "MB/s", "of the bare tokenizer", "memory, MB", "tokens"]
    lines = [
        [
            row["title"],
            f"{row['megabytes_per_second']:.2f}",
            "" if row["ratio_to_bare"] is None else f"{row['ratio_to_bare']:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['tokens']:,}",
        ]
        for row in rows
    ]
    lines += [[TITLES[name], why, "", "", ""] for name, why in skipped.items()]
    title = f"{text['documents']:,} documents, {text['bytes'] / 1e6:.1f} MB of Python source, {text['workers']} workers"
    return f"{title}\n\n{markdown(head, lines)}"
