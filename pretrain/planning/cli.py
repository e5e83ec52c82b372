"""``nystrom plan``: what a run will need, before it is submitted."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_pipeline.command_line import Parser
from data_pipeline.console import add_json, print_json, say_loading, say_next
from data_pipeline.errors import UserError
from pretrain.arguments import add_config_arguments
from pretrain.machine import PEAK_FLOPS

if TYPE_CHECKING:
    from pretrain.config import RunConfig

DEFAULT_MFU = 0.3

EXAMPLES = (
    "nystrom plan --config configs/causal-small.yaml --gpus 8 --gpu-memory 80 --gpu H100 --price-per-gpu-hour 2.50",
)
EPILOG = """Needs no GPU and no shards; without shards the size of the vocabulary comes from the file or from
--vocab-size. Memory is the most that PyTorch allocates at once, found by running the model's code on tensors without
values. CUDA, NCCL and fragmentation come on top: --margin. With --cpu the host's memory is what a process takes
altogether."""
STATUSES = {
    0: "the run fits, or --gpu-memory was not given",
    1: "it does not fit",
    2: "a mistake in the file or the options",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = Parser(
        prog="nystrom plan",
        description="Parameters, arithmetic, memory, time, cost and disk of a run, from its configuration alone.",
        examples=EXAMPLES,
        epilog=EPILOG,
        exit_status=STATUSES,
    )
    add_config_arguments(parser)
    parser.add_argument("--vocab-size", type=int, metavar="N", help="tokens, where there are no shards yet")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes of the run (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="for the host's memory (default: 8 at most)")
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="of one GPU, with --cpu of one process: also say whether the run fits",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.1,
        metavar="X",
        help="share of it to leave free for what PyTorch does not allocate and for fragmentation (default: 0.1)",
    )
    parser.add_argument("--gpu", metavar="NAME", help="a GPU whose peak is known, for example H100: also say how long")
    parser.add_argument("--peak-flops", type=float, metavar="X", help="FLOP/s of one GPU (default: telemetry's, --gpu)")
    parser.add_argument(
        "--mfu",
        type=float,
        default=DEFAULT_MFU,
        metavar="X",
        help=f"share of the peak to count on, an assumption (default: {DEFAULT_MFU}); a run reports its own",
    )
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="in any currency: also say the cost")
    parser.add_argument("--cpu", action="store_true", help="of a run on CPUs, one process for each --gpus")
    parser.add_argument(
        "--no-search", action="store_true", help="leave out the largest micro-batches and the changes that would fit"
    )
    add_json(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 if the run fits or that was not asked, else 1."""
    args = build_parser().parse_args(argv)
    _check(args)
    from pretrain.config import load_config

    config = load_config(args.config, args.overrides)
    peak = _peak_flops(args, config)
    config = _with_vocabulary(config, args.vocab_size)
    say_loading()
    from pretrain.planning.estimate import Question, estimate
    from pretrain.planning.page import as_dict, page

    found = estimate(
        config,
        Question(
            gpus=args.gpus,
            gpu_memory=args.gpu_memory,
            margin=args.margin,
            mfu=args.mfu,
            peak_flops=peak,
            price=args.price_per_gpu_hour,
            processes_per_node=args.gpus_per_node or min(8, args.gpus),
            on_gpu=not args.cpu,
            search=not args.no_search,
        ),
    )
    if args.json:
        print_json(as_dict(found))
    else:
        print(page(found))
        if found.fits is not False:
            say_next(_starting(args))
    return 1 if found.fits is False else 0


def _starting(args: argparse.Namespace) -> list[str]:
    """The run that was planned, on this machine; empty for one that needs several nodes."""
    if args.gpus > (args.gpus_per_node or 8) and not args.cpu:
        return []
    changes = ["--set", *args.overrides] if args.overrides else []
    return ["launch", "local", "--nproc", str(args.gpus), "--config", args.config, *changes]


def _check(args: argparse.Namespace) -> None:
    for name in ("gpus", "gpus_per_node", "vocab_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("gpu_memory", "peak_flops", "price_per_gpu_hour"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a positive number")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu}: must be above 0 and at most 1")
    if not 0 <= args.margin < 1:
        raise UserError(f"--margin {args.margin}: must be at least 0 and below 1")


def _peak_flops(args: argparse.Namespace, config: RunConfig) -> float | None:
    if args.peak_flops is not None:
        return args.peak_flops
    if args.gpu is None:
        return config.telemetry.peak_flops
    known = {name.lower(): value for name, value in PEAK_FLOPS.items()}
    if args.gpu.lower() not in known:
        raise UserError(
            f"--gpu {args.gpu}: its peak is not known; give --peak-flops, or one of {', '.join(PEAK_FLOPS)}"
        )
    return known[args.gpu.lower()]


def _with_vocabulary(config: RunConfig, given: int | None) -> RunConfig:
    """The configuration with ``model.vocab_size`` set: as the run would find it, or as given."""
    size = config.model.vocab_size
    if size is None:
        size = _vocabulary_of_shards(config)
    elif given is not None and given != size:
        raise UserError(f"--vocab-size {given}: the configuration says {size} (model.vocab_size)")
    if size is not None and given is not None and given != size:
        raise UserError(f"--vocab-size {given}: the shards of data.train have {size} tokens; leave it out")
    size = size or given
    if size is None:
        paths = ", ".join(source.path for source in config.data.sources)
        raise UserError(
            f"one number is missing, the size of the vocabulary: there are no shards in {paths} yet, and "
            "model.vocab_size is not set. Give the number that the tokenizer will have, for example --vocab-size 8192"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def _vocabulary_of_shards(config: RunConfig) -> int | None:
    from data_pipeline.shards.shardset import ShardSet

    try:
        return ShardSet.open(config.data.sources[0].path).vocab_size
    except UserError:
        return None
