"""The command: which blocks, trained how; runs what is not there yet and prints a table for each objective."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks import common
from benchmarks.attention_ablation.books import Books
from benchmarks.attention_ablation.forms import Objective, configure, window_tokens
from benchmarks.attention_ablation.study import Record, Results, Study
from benchmarks.attention_ablation.tasks import Shape
from benchmarks.attention_ablation.training import Recipe
from benchmarks.block_ablation.blocks import BASELINE, BLOCKS, select
from benchmarks.block_ablation.report import explain, table
from benchmarks.common import check_positive, chosen, listed, run
from data_pipeline.errors import UserError
from eval.subject import choose_device
from pretrain.optim.kind import KINDS

DESCRIPTION = """Train the same small model with each change of its blocks, on the same text in the same order, and
compare held-out losses at equal tokens and at equal time. A slower block gets fewer steps in the same time."""
EXAMPLES = (
    "python -m benchmarks.block_ablation --train shards/train --valid shards/valid",
    "python -m benchmarks.block_ablation --train shards/train --valid shards/valid --seeds 0,1,2 --objectives clm",
    "python -m benchmarks.block_ablation --train shards/train --valid shards/valid --blocks modern,rmsnorm+swiglu "
    "--equal time --seconds 600",
)
EPILOG = """A (block, seed, settings) whose result is in --out already is not run again. Times are measured again when
other blocks are asked for, and steps at equal time follow from them."""
MODEL = {"hidden_size": 192, "num_layers": 4, "num_heads": 4}
EQUAL = ("tokens", "time")


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = common.build_parser(
        "block_ablation",
        DESCRIPTION,
        EXAMPLES,
        epilog=EPILOG,
        check=None,
        out="finished results, which are read again",
        out_default=Path("runs/block_ablation.json"),
    )
    parser.add_argument("--train", metavar="SHARDS", required=True, help="prepared shards to train on")
    parser.add_argument("--valid", metavar="SHARDS", required=True, help="held-out shards")
    parser.add_argument("--objectives", default="mlm,clm", metavar="A,B", help="mlm, clm or both (default)")
    parser.add_argument(
        "--blocks", metavar="A,B,C", help=f"default all: {', '.join(BLOCKS)}, modern; A+B makes both changes"
    )
    parser.add_argument("--equal", default="tokens,time", metavar="A,B", help="tokens, time or both (default)")
    parser.add_argument(
        "--seconds", type=float, metavar="X", help=f"of training at equal time (default: what {BASELINE} takes)"
    )
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        metavar="X",
        help=f"of that time for all blocks but {BASELINE}: 0.75 asks which reach its loss in that (default 1)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the model, for all; repeatable"
    )
    parser.add_argument("--seeds", default="0", metavar="0,1,2", help="of initial weights and of the order of training")
    for name, default, says in (
        ("tokens", 2_000_000, "to train on, at equal tokens"),
        ("seq-len", 512, "tokens of a row"),
        ("batch-tokens", 8192, "tokens of a step"),
        ("held-out-tokens", 65_536, "tokens of the held-out rows"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{says} (default {default})")
    parser.add_argument("--lr", type=float, default=1e-3, metavar="X", help="peak learning rate (default 1e-3)")
    parser.add_argument(
        "--optimizer", default="adamw", metavar="KIND", help=f"{', '.join(KINDS.names())} (default adamw)"
    )
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False, help="bf16 autocast")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: PyTorch's)")
    parser.add_argument("--timing-rounds", type=int, default=7, metavar="N", help="interleaved rounds of steps")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the tables; raises :class:`UserError` for the user's mistakes."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    check_positive(
        args,
        "tokens",
        "seq_len",
        "batch_tokens",
        "held_out_tokens",
        "threads",
        "lr",
        "timing_rounds",
        "seconds",
        "share",
    )
    seeds = listed("--seeds", args.seeds)
    if not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"--seeds {args.seeds}: write whole numbers, for example 0,1,2")
    objectives = chosen("--objectives", args.objectives, ("mlm", "clm"))
    equal = chosen("--equal", args.equal, EQUAL)
    device = choose_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.optimizer not in KINDS.names():
        raise UserError(f"--optimizer {args.optimizer}: there are {', '.join(KINDS.names())}")
    recipe = Recipe(
        args.tokens, args.batch_tokens, args.seq_len, args.lr, args.bf16, str(device), optimizer=args.optimizer
    )
    made_by = common.provenance("block_ablation", arguments, device)
    names = None if args.blocks is None else listed("--blocks", args.blocks)
    results = Results(args.out)
    studies = [_study(args, cast(Objective, objective), recipe, names, results, made_by) for objective in objectives]
    for study in studies:
        print(
            f"{study.base.objective}: {len(study.variants)} blocks, {len(seeds)} seed(s), {recipe.steps} steps of "
            f"{recipe.step_tokens:,} tokens, rows of {recipe.seq_len}; results in {args.out}",
            flush=True,
        )
        print(
            "\n" + compare(study, list(map(int, seeds)), equal, args.seconds, args.timing_rounds, args.share) + "\n",
            flush=True,
        )
    return 0


def _study(
    args: argparse.Namespace,
    objective: Objective,
    recipe: Recipe,
    names: Sequence[str] | None,
    results: Results,
    made_by: dict[str, Any],
) -> Study:
    values: dict[str, Any] = {**MODEL, "objective": objective}
    for override in args.set:
        key, sep, value = override.partition("=")
        if not sep or not key:
            raise UserError(f"--set {override}: write it as key=value, for example --set hidden_size=128")
        if key in ("objective", "vocab_size"):
            raise UserError(f"--set {override}: --objectives and the shards say that")
        values[key] = value
    window = window_tokens(configure(values, "model"))
    shape = Shape(recipe.seq_len, recipe.batch_tokens, args.held_out_tokens)
    books = Books.open(args.train, args.valid, objective, shape, recipe.tokens, window)
    base = configure(values | {"vocab_size": books.vocab_size}, "model")
    return Study(base, books, recipe, select(names, base), results, made_by, BASELINE)


def compare(
    study: Study, seeds: Sequence[int], equal: Sequence[str], seconds: float | None, rounds: int, share: float = 1.0
) -> str:
    """Run what is missing of one objective; the table and its explanation. ``share``: of the time, for all blocks but
    the baseline."""
    by_tokens: dict[str, dict[int, Record]] = {variant.name: {} for variant in study.variants}
    by_time: dict[str, dict[int, Record]] = {variant.name: {} for variant in study.variants}
    timing, steps = None, dict[str, int]()
    if "time" in equal:
        timing = study.time(rounds)
        if seconds is None:
            seconds = study.recipe.steps * timing["forms"][BASELINE]["seconds"]
        for name in by_time:
            given = seconds * (1.0 if name == BASELINE else share)
            steps[name] = steps_within(given, timing["forms"][name]["seconds"])
    for seed in seeds:
        for variant in study.variants:
            if "tokens" in equal:
                by_tokens[variant.name][seed] = study.run(variant, seed)
            if "time" in equal:
                by_time[variant.name][seed] = _of_steps(study, steps[variant.name]).run(variant, seed)
    return f"{table(study.variants, by_tokens, by_time, timing, steps)}\n\n{explain(seeds, timing, seconds, share)}"


def steps_within(seconds: float, of_a_step: float) -> int:
    """Whole steps that fit into so many seconds, at least 1. A product's rounding does not cost the last one."""
    return max(1, int(seconds / of_a_step * (1 + 1e-9)))


def _of_steps(study: Study, steps: int) -> Study:
    """The same study with another number of steps; the text is longer or shorter, in the same order."""
    recipe = study.recipe
    if steps == recipe.steps:
        return study
    tokens = steps * recipe.step_tokens
    assert isinstance(study.task, Books)
    return replace(study, recipe=replace(recipe, tokens=tokens), task=replace(study.task, tokens=tokens))


if __name__ == "__main__":
    run(main, "block_ablation")
