"""Arguments of ``python -m benchmarks.loading``."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import check_file, check_positive, chosen, goal_lines, in_turns, markdown, run, settings_of
from data_pipeline.errors import UserError
from data_pipeline.processes import die_with_parent

GOAL_RATIO = 0.5
"""Ours, causal, to the bare memory map."""
GOAL_FIRST_BATCH = 0.1
"""Seconds to the first batch, wherever the run stands."""
POSITIONS = (0, 10_000_000)
"""Rows consumed before."""
NAMES = ("bare", "clm", "mlm", "packed", "mixture", "datasets", "datatrove", "grain", "litdata", "streaming")
DESCRIPTION = """Shuffled batches from tokens on disk, every contender in turns in one process: million tokens a second,
as a ratio to a bare gather from a memory map; and the time to the first batch of a run that begins or resumes."""
EXAMPLES = ("OMP_NUM_THREADS=1 python -m benchmarks.loading --rounds 7 --out loading.json",)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = common.build_parser("loading", DESCRIPTION, EXAMPLES)
    parser.add_argument("--contenders", default=",".join(NAMES), metavar="C,C", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--rows", type=int, default=600_000, metavar="N", help="on disk")
    parser.add_argument("--seq-len", type=int, default=512, metavar="N", help="tokens of a row")
    parser.add_argument("--batch-rows", type=int, default=32, metavar="N", help="rows of a batch")
    parser.add_argument("--batches", type=int, default=4000, metavar="N", help="a turn at most")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="X", help="a turn at most")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each")
    parser.add_argument("--shard-tokens", type=int, default=1 << 27, metavar="N", help="of a shard")
    parser.add_argument("--work", type=Path, metavar="DIR", help="scratch folder (default: a temporary one)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 1 if ``--check`` and a goal is not met."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    names = chosen("--contenders", args.contenders, NAMES)
    check_positive(args, "rows", "seq_len", "batch_rows", "batches", "rounds", "shard_tokens", "seconds")
    if args.seq_len < 2 or args.rows < args.batch_rows:
        raise UserError("--seq-len must be at least 2, and --rows at least --batch-rows")
    check_file("--out", args.out)
    return _run(args, arguments, names)


def _run(args: argparse.Namespace, arguments: list[str], names: list[str]) -> int:
    import torch

    from benchmarks.loading.contenders import CONTENDERS, FIRST_BATCH
    from benchmarks.loading.corpus import write_corpus

    made = common.provenance("loading", arguments, torch.device("cpu"))
    skipped = {
        name: f"{needs} is not installed"
        for name in names
        if (needs := CONTENDERS[name].needs) is not None and importlib.util.find_spec(needs) is None
    }
    names = [name for name in names if name not in skipped]
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        print("writing the tokens ...", file=sys.stderr, flush=True)
        corpus = write_corpus(Path(work), args.rows, args.seq_len, args.batch_rows, args.shard_tokens)
        first = [
            {"contender": name, "after_rows": position, "seconds": _first_batch(corpus, position, FIRST_BATCH[name])}
            for name in names
            if name in FIRST_BATCH
            for position in POSITIONS
        ]
        speeds: dict[str, list[float]] = {name: [] for name in names}
        for number, name in in_turns(names, args.rounds, warm_up=True):
            batches_per_second = _turn(name, corpus, args)
            if number:
                speeds[name].append(batches_per_second * args.batch_rows * args.seq_len)
    rows = [
        {
            "contender": name,
            "title": CONTENDERS[name].title,
            "million_tokens_per_second": statistics.median(speeds[name]) / 1e6,
            "all_million_tokens_per_second": [speed / 1e6 for speed in speeds[name]],
            "ratio_to_bare": _ratio(speeds, name),
        }
        for name in names
    ]
    goals = _goals(rows, first)
    print(_report(rows, first, skipped, goals))
    content = {
        "schema": 1,
        "provenance": made,
        "settings": settings_of(args, "work", "contenders"),
        "rows": rows,
        "first_batch": first,
        "skipped": skipped,
        "goals": goals,
    }
    common.write_json(args.out, content)
    return int(args.check and any(not goal["met"] for goal in goals))


def _turn(name: str, corpus: Any, args: argparse.Namespace) -> float:
    """Batches a second. Other libraries run in a process of their own: their threads stay when they are closed."""
    from benchmarks.loading.contenders import CONTENDERS, turn

    if CONTENDERS[name].needs is None:
        return turn(name, corpus, args.batches, args.seconds)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=die_with_parent) as pool:
        return pool.submit(turn, name, corpus, args.batches, args.seconds).result()


def _first_batch(corpus: Any, position: int, options: dict[str, Any]) -> float:
    """Seconds from the path of the folder to the first batch; the median of five."""
    from benchmarks.loading.contenders import loader

    taken = []
    for _ in range(5):
        began = time.perf_counter()
        made = loader(corpus, samples=position, **options)
        next(iter(made))
        taken.append(time.perf_counter() - began)
        made.close()
    return statistics.median(taken)


def _ratio(speeds: dict[str, list[float]], name: str) -> float | None:
    """Median over the rounds of the ratio to the bare gather of the same round."""
    if "bare" not in speeds:
        return None
    return statistics.median(a / b for a, b in zip(speeds[name], speeds["bare"], strict=True))


def _goals(rows: list[dict[str, Any]], first: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for row in rows:
        if row["contender"] == "clm" and row["ratio_to_bare"] is not None:
            value = row["ratio_to_bare"]
            out.append(
                {"goal": f"ours, causal / bare: at least {GOAL_RATIO}", "value": value, "met": value >= GOAL_RATIO}
            )
    for row in first:
        if row["contender"] == "clm":
            what = f"first batch after {row['after_rows']:,} rows: under {GOAL_FIRST_BATCH} s"
            out.append({"goal": what, "value": row["seconds"], "met": row["seconds"] < GOAL_FIRST_BATCH})
    return out


def _report(
    rows: list[dict[str, Any]], first: list[dict[str, Any]], skipped: dict[str, str], goals: list[dict[str, Any]]
) -> str:
    lines = [
        [
            row["title"],
            f"{row['million_tokens_per_second']:.1f}",
            "" if row["ratio_to_bare"] is None else f"{row['ratio_to_bare']:.3f}",
        ]
        for row in rows
    ]
    out = [markdown(["", "million tokens/s", "of the bare gather"], lines)]
    out += [f"left out: {name} ({why})" for name, why in skipped.items()]
    times = [[row["contender"], f"{row['after_rows']:,}", f"{row['seconds'] * 1000:.1f}"] for row in first]
    if times:
        out.append("\n" + markdown(["first batch", "rows before", "ms"], times))
    return "\n".join([*out, "", *goal_lines(goals)])


if __name__ == "__main__":
    run(main, "loading")
