"""The command: which forms, on which task, trained how; runs what is not there yet and prints the table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.attention_ablation.books import Books
from benchmarks.attention_ablation.forms import FORMS, configure, select, window_tokens
from benchmarks.attention_ablation.mqar import MultiQueryRecall
from benchmarks.attention_ablation.mqar_spread import SpreadRecall
from benchmarks.attention_ablation.passkey import Passkey
from benchmarks.attention_ablation.report import report
from benchmarks.attention_ablation.study import Record, Results, Study
from benchmarks.attention_ablation.tasks import Shape, Task
from benchmarks.attention_ablation.training import Recipe
from benchmarks.attention_ablation.variables import VariableTracking
from benchmarks.common import check_positive, listed, run
from data_pipeline.errors import UserError
from eval.subject import choose_device
from pretrain.model.attention.registry import form_of
from pretrain.model.config import ModelConfig

DESCRIPTION = """Train the same small model with each form of attention, on the same tokens in the same order from the
same initial weights, and compare loss, recall far back, time and memory."""
EXAMPLES = (
    "python -m benchmarks.attention_ablation --task passkey",
    "python -m benchmarks.attention_ablation --task mqar --forms softmax,window,nystrom,inverse --seeds 0,1,2",
    "python -m benchmarks.attention_ablation --task mqar-spread --pairs 8 --seq-len 96 --tokens 8000000",
    "python -m benchmarks.attention_ablation --task variables --hops 2 --set num_layers=4",
    "python -m benchmarks.attention_ablation --task books --train shards/train --valid shards/valid --seeds 0,1",
)
EPILOG = """A (form, seed, settings) whose result is in --out already is not run again: after an interruption the same
command resumes, and more forms or seeds only add to the table."""


@dataclass(frozen=True)
class Defaults:
    """Of a task, where the command line says nothing."""

    tokens: int
    seq_len: int
    batch_tokens: int
    lr: float
    model: Mapping[str, Any]
    held_out_tokens: int = 65_536
    pairs: int = 8
    gap: int | None = None
    spread: float = 0.5


# Two layers wide enough to solve the task with exact attention, from weights of about 1 / sqrt(hidden): passkey is
# solved after 0.5M tokens from 0.125, and from 0.02 it was half solved after 2M.
_SMALL = {"vocab_size": 48, "num_layers": 2, "num_heads": 2, "num_landmarks": 16, "conv_kernel": 5}
DEFAULTS = {
    "books": Defaults(2_000_000, 512, 8192, 1e-3, {"hidden_size": 192, "num_layers": 4, "num_heads": 4}),
    "mqar": Defaults(2_000_000, 64, 4096, 2e-3, _SMALL | {"hidden_size": 128, "init_std": 0.08, "segment_length": 4}),
    # Exact attention is right in 99.7% (seed 0): its loss fell from log 4 to 0.09 from 0.36M to 0.56M tokens, 13 s of a
    # core. Twice the row and the pairs were still at chance among the row's values after 2.4M (width 64).
    "mqar-spread": Defaults(
        600_000,
        32,
        1024,
        4e-3,
        _SMALL | {"vocab_size": 40, "hidden_size": 64, "init_std": 0.1, "segment_length": 2},
        pairs=4,
        gap=4,
        spread=0.4,
    ),
    # Without --lead-in at chance among the row's values after 2.1M tokens (width 64).
    "variables": Defaults(
        6_000_000,
        64,
        4096,
        2e-3,
        _SMALL | {"hidden_size": 128, "init_std": 0.08, "segment_length": 4, "num_layers": 3},
    ),
    "passkey": Defaults(
        1_500_000, 128, 4096, 5e-3, _SMALL | {"hidden_size": 64, "init_std": 0.125, "segment_length": 8}
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = common.build_parser(
        "attention_ablation",
        DESCRIPTION,
        EXAMPLES,
        epilog=EPILOG,
        check=None,
        out="finished results, which are read again",
        out_default=Path("runs/attention_ablation.json"),
    )
    parser.add_argument("--task", choices=tuple(DEFAULTS), required=True)
    parser.add_argument(
        "--objective",
        choices=tuple(FORMS),
        default="clm",
    )
    parser.add_argument(
        "--forms",
        metavar="A,B,C",
        help="default all; clm: " + ", ".join(f.name for f in FORMS["clm"]) + "; mlm: "
        + ", ".join(f.name for f in FORMS["mlm"]) + "; A+B makes both changes",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the model, for all forms; repeatable"
    )
    parser.add_argument("--seeds", default="0", metavar="0,1,2", help="of initial weights and of the order of training")
    for name, says in (
        ("tokens", "to train on"),
        ("seq-len", "tokens of a row"),
        ("batch-tokens", "tokens of a step"),
        ("held-out-tokens", "tokens of the held-out rows"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{says} (default by task)")
    parser.add_argument("--lr", type=float, metavar="X", help="peak learning rate (default by task)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False, help="bf16 autocast")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: PyTorch's)")
    parser.add_argument("--timing-rounds", type=int, default=7, metavar="N", help="interleaved rounds; 0: no timing")
    books = parser.add_argument_group("books")
    books.add_argument("--train", metavar="SHARDS", help="prepared shards to train on")
    books.add_argument("--valid", metavar="SHARDS", help="held-out shards")
    recall = parser.add_argument_group("mqar, mqar-spread, variables and passkey")
    recall.add_argument(
        "--pairs",
        metavar="N,N",
        help="mqar, mqar-spread: key-value pairs (default by task); mqar-spread with several numbers: each training "
        "row draws one, and the score is given for each",
    )
    recall.add_argument(
        "--lead-in",
        metavar="N,N",
        help="mqar-spread, variables: tokens of short rows that training begins with (default: none)",
    )
    recall.add_argument(
        "--lead-in-tokens", type=int, default=200_000, metavar="N", help="to train on at each length of --lead-in"
    )
    recall.add_argument(
        "--gap", type=int, metavar="N", help="mqar: filler between pairs and queries (default: out of reach of windows)"
    )
    recall.add_argument("--spread", type=float, metavar="X", help="mqar-spread: share of the row with pairs")
    recall.add_argument("--values", type=int, default=1, metavar="N", help="mqar-spread: values of a key")
    recall.add_argument("--chains", type=int, default=4, metavar="N", help="variables: chains of assignments")
    recall.add_argument("--hops", type=int, default=1, metavar="N", help="variables: assignments behind the first one")
    recall.add_argument("--digits", type=int, default=2, metavar="N", help="passkey: digits of the key")
    recall.add_argument(
        "--test-seq-lens", metavar="N,N", help="passkey: tokens of held-out rows (default: those of training)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the tables; raises :class:`UserError` for the user's mistakes."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    seeds = _check(args)
    device = choose_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    defaults = DEFAULTS[args.task]
    recipe = Recipe(
        tokens=args.tokens or defaults.tokens,
        batch_tokens=args.batch_tokens or defaults.batch_tokens,
        seq_len=args.seq_len or defaults.seq_len,
        lr=args.lr or defaults.lr,
        bf16=args.bf16,
        device=str(device),
    )
    base, task = _task(args, recipe, args.held_out_tokens or defaults.held_out_tokens)
    names = None if args.forms is None else [name.strip() for name in args.forms.split(",") if name.strip()]
    made_by = common.provenance("attention_ablation", arguments, device)
    study = Study(base, task, recipe, select(names, base), Results(args.out), made_by)
    print(
        f"{args.task}, {base.objective}: {len(study.variants)} forms, {len(seeds)} seed(s), {recipe.steps} steps of "
        f"{recipe.step_tokens:,} tokens, rows of {recipe.seq_len}; results in {args.out}",
        flush=True,
    )
    runs: dict[str, dict[int, Record]] = {variant.name: {} for variant in study.variants}
    for seed in seeds:
        for variant in study.variants:
            runs[variant.name][seed] = study.run(variant, seed)
    timing = study.time(args.timing_rounds) if args.timing_rounds else None
    print("\n" + report(task, study.variants, runs, timing, recipe.seq_len))
    return 0


def _check(args: argparse.Namespace) -> list[int]:
    check_positive(args, "tokens", "seq_len", "batch_tokens", "held_out_tokens", "lead_in_tokens", "threads", "lr")
    if args.timing_rounds < 0:
        raise UserError(f"--timing-rounds {args.timing_rounds}: must not be negative")
    seeds = listed("--seeds", args.seeds)
    if not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"--seeds {args.seeds}: write whole numbers, for example 0,1,2")
    return list(map(int, seeds))


def _task(args: argparse.Namespace, recipe: Recipe, held_out_tokens: int) -> tuple[ModelConfig, Task]:
    """The base model and the task."""
    values: dict[str, Any] = {**DEFAULTS[args.task].model, "objective": args.objective}
    for override in args.set:
        name, sep, value = override.partition("=")
        if not sep or not name:
            raise UserError(f"--set {override}: write it as key=value, for example --set hidden_size=128")
        if name in ("attention", "objective"):
            raise UserError(
                f"--set {override}: choose with --{'forms' if name == 'attention' else 'objective'} instead"
            )
        values[name] = value
    shape = Shape(recipe.seq_len, recipe.batch_tokens, held_out_tokens)
    if args.task == "books":
        if "vocab_size" in values:
            raise UserError("--set vocab_size: task books takes it from the shards")
        window = window_tokens(configure(values, "model"))
        books = Books.open(args.train, args.valid, args.objective, shape, recipe.tokens, window)
        return _base(values | {"vocab_size": books.vocab_size}, recipe.seq_len), books
    base = _base(values, recipe.seq_len)
    vocab_size, window = base.vocab_size or 0, window_tokens(base)
    if args.task == "passkey":
        lengths = () if args.test_seq_lens is None else _numbers("--test-seq-lens", args.test_seq_lens)
        return base, Passkey(shape, base.objective, vocab_size, args.digits, window, lengths)
    if args.test_seq_lens is not None:
        raise UserError("--test-seq-lens is for task passkey")
    if args.lead_in is not None and args.task not in ("mqar-spread", "variables"):
        raise UserError("--lead-in is for tasks mqar-spread and variables")
    lead_in = () if args.lead_in is None else (_numbers("--lead-in", args.lead_in), args.lead_in_tokens)
    if args.task == "variables":
        return base, VariableTracking(shape, vocab_size, args.chains, args.hops, window, *lead_in)
    defaults = DEFAULTS[args.task]
    pairs = (defaults.pairs,) if args.pairs is None else _numbers("--pairs", args.pairs)
    spread = defaults.spread if args.spread is None else args.spread
    gap = args.gap if args.gap is not None else defaults.gap
    if gap is None:
        gap = base.num_layers * max(window, base.conv_kernel)
    if args.task == "mqar-spread":
        return base, SpreadRecall(shape, vocab_size, pairs, args.values, spread, gap, window, *lead_in)
    if len(pairs) > 1:
        raise UserError(f"--pairs {args.pairs}: task mqar takes one number, several are for task mqar-spread")
    return base, MultiQueryRecall(shape, vocab_size, pairs[0], gap, window)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Distinct whole numbers, rising."""
    words = listed(option, text)
    if not all(word.isdecimal() for word in words):
        raise UserError(f"{option} {text}: write whole numbers, for example 4,16,64")
    return tuple(sorted({int(word) for word in words}))


def _base(values: Mapping[str, Any], seq_len: int) -> ModelConfig:
    base = configure(values, "model")
    form = form_of(base)
    exact = form.exact_up_to
    if exact is not None and seq_len <= exact:
        raise UserError(
            f"rows of {seq_len} tokens: all attention would be exact, as it is up to {exact} tokens; "
            "raise --seq-len, or --set segment_length or num_landmarks smaller"
        )
    return base


if __name__ == "__main__":
    run(main, "attention_ablation")
