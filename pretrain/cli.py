"""``nystrom train``: pretrain, as a single process or as one of a launcher's."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence

from data_pipeline.command_line import Parser
from data_pipeline.console import say_loading
from data_pipeline.errors import UserError
from pretrain.arguments import EXIT_STATUSES, add_run_arguments
from pretrain.distributed.signals import EXIT_STALLED

ERROR_WAIT_SECONDS = 10.0
"""How long the other processes wait for the first one to print the error that they share with it."""
LOST_PEER_WAIT_SECONDS = 3.0
"""How long a process that lost another one stays, so that the launcher sees the lost one's end first.

DeepSpeed's launcher looks once a second and reports any one of the processes that it finds ended. Without the wait that
may be a survivor with status 1, and not the one that signal 9 killed.
"""

EXAMPLES = (
    ("nystrom train --config configs/demo-clm.yaml --set optimizer.lr=1e-3 zero_stage=1", "one process"),
    ("nystrom launch local --nproc 2 --config configs/demo-clm.yaml", "several"),
    ("deepspeed --num_accelerators 2 --module pretrain --config configs/demo-clm.yaml", "several, by plain DeepSpeed"),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = Parser(
        prog="nystrom train",
        description="Pretrain a Nyströmformer on prepared shards, by one YAML file. Run again, the same command "
        "resumes from the last checkpoint.",
        examples=EXAMPLES,
        exit_status=EXIT_STATUSES,
    )
    add_run_arguments(parser)
    # What DeepSpeed's launcher and torchrun add to the command of each process.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. A :class:`UserError` comes from one process only."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    from pretrain.distributed.immediate_exit import exit_on_signals
    from pretrain.next_commands import say_after_training

    restore = exit_on_signals()
    try:
        code = _main(args)
    finally:
        restore()
    say_after_training(code, ["train", *words], args.config, args.overrides)
    return code


def _main(args: argparse.Namespace) -> int:
    from pretrain.config import load_config
    from pretrain.distributed.world import Rank, quiet_libraries, read_rank
    from pretrain.telemetry.lines import flush_output

    if not args.verbose:
        quiet_libraries()
    rank = Rank()
    try:
        rank = read_rank(args.local_rank)
        config = load_config(args.config, args.overrides)
        say_loading("PyTorch and DeepSpeed")
        from pretrain.run import train

        return train(config, rank, resume=args.resume, verbose=args.verbose)
    except UserError:
        if not rank.is_first:
            # The first process has the same error nearly always, and launchers end the rest as soon as one exits; so
            # leaving at once could cost the user the message.
            time.sleep(ERROR_WAIT_SECONDS)
        raise
    except Exception as error:
        return _report_crash(error, rank.rank)
    finally:
        flush_output()


LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Connection was likely closed",
)
"""How the libraries say that another process is gone."""
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
"""Where an error comes from that no own code made: a collective operation, or the connection it needs."""


def _report_crash(error: Exception, rank: int) -> int:
    """Print a traceback that says whose it is; for a process that merely lost a peer, one line."""
    text = str(error)
    if isinstance(error, RuntimeError) and "Timed out waiting" in text:
        print(
            f"process {rank}: the others did not answer in a collective operation: {text}", file=sys.stderr, flush=True
        )
        return EXIT_STALLED
    if isinstance(error, RuntimeError) and any(sign in text for sign in LOST_PEER):
        print(f"process {rank}: another process of this run went away; ending", file=sys.stderr, flush=True)
        time.sleep(LOST_PEER_WAIT_SECONDS)
    elif isinstance(error, RuntimeError) and _is_of_collective(error):
        first_line = (text.splitlines() or [""])[0]
        print(
            f"process {rank}: a collective operation failed, most likely since another process of this run went away; "
            f"ending ({first_line})",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(LOST_PEER_WAIT_SECONDS)
    else:
        print(f"process {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    return 1


def _is_of_collective(error: Exception) -> bool:
    """Whether the innermost frame is in the library's own code for collective operations."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(part in frames[-1].filename.replace("\\", "/") for part in COLLECTIVES)
