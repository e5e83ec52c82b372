"""Arguments of ``python -m benchmarks.curriculum``, the two runs in turns, and what comes of them."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import check_file, check_positive, run
from data_pipeline.errors import UserError

DESCRIPTION = """The run of a configuration, and the same run at the longest of its lengths from the first step on: the
held-out loss at the longest length by seconds of training. Each is a process of its own; they take turns of a few
steps, so that a slow spell of the machine falls on both. Validation and saving do not count as training."""
EXAMPLES = (
    "OMP_NUM_THREADS=2 python -m benchmarks.curriculum --config configs/books-clm.yaml --seeds 1,2 "
    "--out curriculum.json",
)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = common.build_parser("curriculum", DESCRIPTION, EXAMPLES, check=None)
    parser.add_argument("--config", required=True, help="YAML file of a run with several lengths and held-out shards")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="KEY=VALUE", help="as in `train`")
    parser.add_argument("--seeds", default="1", metavar="N,N", help="each a pair of runs")
    parser.add_argument("--points", type=int, default=16, metavar="N", help="of a curve")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="of a turn")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="both curves as .svg or .png")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print, write."""
    from benchmarks.curriculum.curves import draw, report, summary

    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds {args.seeds}: whole numbers with commas between them") from None
    check_positive(args, "points", "steps")
    check_file("--out", args.out)
    check_file("--picture", args.picture)
    configs = {seed: pair(args, seed) for seed in seeds}

    import torch

    made = common.provenance("curriculum", arguments, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    pairs = []
    for seed, runs in configs.items():
        with tempfile.TemporaryDirectory() as work:
            curves = train_pair(runs, Path(work), args.steps, seed)
        pairs.append({"seed": seed, "curves": curves, **summary(curves)})
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    print(report(pairs))
    config = configs[seeds[0]]
    lengths = {name: [stage["seq_len"] for stage in one["curriculum"]] for name, one in config.items()}
    content = {"schema": 1, "provenance": made, "lengths": lengths, "config": config, "pairs": pairs}
    common.write_json(args.out, content)
    if args.picture is not None:
        draw(pairs, args.picture)
        print(f"curves in {args.picture}")
    return 0


def pair(args: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
    """The two configurations. Raises :class:`UserError` for a run without several lengths or held-out text."""
    from pretrain.config import load_config, parse_config

    config = load_config(args.config, args.overrides)
    lengths = [stage.seq_len for stage in config.curriculum]
    if len(set(lengths)) < 2:
        raise UserError(f"{args.config} has one length only, {lengths[0]}: there is nothing to compare")
    if config.data.valid is None:
        raise UserError(f"{args.config} has no data.valid: the comparison is of held-out losses")
    raw = config.model_dump(mode="json")
    raw |= {"seed": seed, "checkpoint": {}}
    raw["validation"] |= {"every_tokens": max(1, config.total_tokens // args.points), "samples": 0}
    raw["telemetry"] |= {"wandb": "disabled", "log_every_steps": 1}
    longest = max(config.curriculum, key=lambda stage: stage.seq_len)
    stage = {**longest.model_dump(mode="json"), "until_tokens": config.total_tokens}
    runs = {
        "curriculum": {**raw, "name": "curriculum"},
        "fixed": {**raw, "name": "fixed", "curriculum": [stage]},
    }
    for name, one in runs.items():
        parse_config(one, where=f"{args.config} ({name})")
    return runs


def train_pair(runs: dict[str, dict[str, Any]], work: Path, steps: int, seed: int) -> dict[str, list[dict[str, float]]]:
    """Both runs in turns of ``steps`` steps; each one's curve."""
    from benchmarks.curriculum.curves import curve
    from benchmarks.turns import Turns, serve_run

    with Turns(multiprocessing.get_context("spawn"), work) as turns:
        for name, one in runs.items():
            turns.start(name, serve_run, {**one, "output_dir": str(work)})
        times: dict[str, list[float]] = {name: [] for name in runs}
        going = list(runs)
        while going:
            for name in list(going):
                taken = turns.turn(name, steps)
                times[name] += taken
                if len(taken) < steps:
                    going.remove(name)
    return {name: curve(work / name / "metrics.jsonl", times[name]) for name in runs}


if __name__ == "__main__":
    run(main, "curriculum")
