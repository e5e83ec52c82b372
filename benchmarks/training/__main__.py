"""Arguments of ``python -m benchmarks.training``, the turns, and the table."""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import check_file, check_positive, chosen, goal_lines, in_turns, markdown, run, settings_of

GOAL_SLOWER = 1.10
"""Time of a step at ZeRO 0 and 1, at most, as a multiple of the plain loop's."""
GOAL_STAGES = (0, 1)
DESCRIPTION = """Time of a training step through our trainer, one process, as a ratio to a plain PyTorch loop over the
same rows in the same precision. Each contender is a process; they take turns in an order drawn anew each round."""
EXAMPLES = ("OMP_NUM_THREADS=1 python -m benchmarks.training --rounds 9 --out training.json",)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    from benchmarks.training.contenders import CONTENDERS

    parser = common.build_parser("training", DESCRIPTION, EXAMPLES)
    names = ",".join(CONTENDERS)
    parser.add_argument("--contenders", default=names, metavar="C,C", help=f"of {names.replace(',', ', ')}")
    parser.add_argument("--objective", choices=["mlm", "clm"], default="clm")
    parser.add_argument("--hidden-size", type=int, default=256, metavar="N")
    parser.add_argument("--layers", type=int, default=6, metavar="N")
    parser.add_argument("--seq-len", type=int, default=256, metavar="N")
    parser.add_argument("--micro-batch", type=int, default=8, metavar="N", help="rows at a time")
    parser.add_argument("--accumulate", type=int, default=2, metavar="N", help="micro-batches in a step")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="of a turn")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 1 if ``--check`` and a goal is not met."""
    from benchmarks.training.contenders import CONTENDERS

    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    names = chosen("--contenders", args.contenders, CONTENDERS)
    for precision in {CONTENDERS[name].precision for name in names}:
        if f"plain-{precision}" not in names:
            names.insert(0, f"plain-{precision}")  # what the others are compared with
    check_positive(args, "hidden_size", "layers", "micro_batch", "accumulate", "steps", "rounds")
    check_file("--out", args.out)
    return _run(args, arguments, names)


def run_settings(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The run's configuration, but for name, precision and stage."""
    batch = args.micro_batch * args.accumulate * args.seq_len
    stage = {
        "until_tokens": 4 * batch * args.steps * (args.rounds + 2),
        "seq_len": args.seq_len,
        "micro_batch": args.micro_batch,
    }
    return {
        "output_dir": str(folder),
        "model": {
            "objective": args.objective,
            "hidden_size": args.hidden_size,
            "num_layers": args.layers,
            "num_heads": max(1, args.hidden_size // 64),
        },
        "data": {"train": str(folder / "shards")},
        "curriculum": [stage],
        "batch_tokens": batch,
        "telemetry": {"wandb": "disabled"},
    }


def _run(args: argparse.Namespace, arguments: list[str], names: list[str]) -> int:
    import torch

    from benchmarks.loading.corpus import write_corpus
    from benchmarks.training.contenders import serve
    from benchmarks.turns import Turns

    made = common.provenance("training", arguments, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as work:
        write_corpus(Path(work), 4096, args.seq_len, args.micro_batch, 1 << 24)
        config = run_settings(args, Path(work))
        with Turns(multiprocessing.get_context("spawn"), Path(work)) as turns:
            for name in names:  # one after another: what they build would slow each other
                turns.start(name, serve, {**config, "name": name})
            for number, name in in_turns(names, args.rounds, warm_up=True):
                taken = turns.turn(name, args.steps)
                if number:
                    times[name].append(sum(taken) / len(taken))
            for name in names:
                turns.stop(name)
    rows = [_row(name, times) for name in names]
    goals = _goals(rows)
    print(_report(rows, goals))
    settings = settings_of(args, "contenders")
    content = {"schema": 1, "provenance": made, "settings": settings, "rows": rows, "goals": goals}
    common.write_json(args.out, content)
    return int(args.check and any(not goal["met"] for goal in goals))


def _row(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    from benchmarks.training.contenders import CONTENDERS

    contender = CONTENDERS[name]
    plain = times[f"plain-{contender.precision}"]
    return {
        "contender": name,
        "title": contender.title,
        "precision": contender.precision,
        "zero_stage": contender.zero_stage,
        "seconds_per_step": statistics.median(times[name]),
        "all_seconds_per_step": times[name],
        # Of the same round each: a spell that slows the machine slows both.
        "ratio_to_plain": statistics.median(a / b for a, b in zip(times[name], plain, strict=True)),
    }


def _goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for row in rows:
        if row["zero_stage"] in GOAL_STAGES:
            what = f"{row['title']}, {row['precision']}, to the plain loop: at most {GOAL_SLOWER}"
            out.append({"goal": what, "value": row["ratio_to_plain"], "met": row["ratio_to_plain"] <= GOAL_SLOWER})
    return out


def _report(rows: list[dict[str, Any]], goals: list[dict[str, Any]]) -> str:
    lines = [
        [
            f"{row['title']}, {row['precision']}" if row["zero_stage"] is not None else row["title"],
            f"{row['seconds_per_step'] * 1000:.0f}",
            f"{row['ratio_to_plain']:.3f}",
        ]
        for row in rows
    ]
    table = markdown(["", "ms a step", "to the plain loop"], lines)
    return "\n".join([table, "", *goal_lines(goals)])


if __name__ == "__main__":
    run(main, "training")
