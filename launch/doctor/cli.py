"""``nystrom launch doctor``: measures and judges a machine or a cluster before a run is started on it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from launch.doctor.ranks import HOSTS, RAW, REPORT_MARK, adopt_allocation, own_name, read_own_rank
from launch.doctor.report import render
from pretrain.arguments import add_config_arguments
from pretrain.distributed.signals import stop_signals

if TYPE_CHECKING:
    from launch.doctor.session import Options
    from pretrain.config import RunConfig
    from pretrain.distributed.world import Rank

SIZES = "4K,256K,16M"
DESCRIPTION = (
    "Measure and judge this machine, or a cluster, before a run is started on it: software, devices, limits, folders, "
    "clocks, and the network between hosts. Findings come first, with what to do. Nothing is left behind."
)
EXAMPLES = (
    ("nystrom launch doctor --config configs/demo-clm.yaml", "this machine, and what the run needs"),
    ("nystrom launch doctor --hostfile hosts --quick", "all hosts of a hostfile, over ssh"),
    ("srun --ntasks-per-node=1 nystrom launch doctor --in-allocation", "the nodes of a Slurm allocation"),
    ("torchrun --nnodes 2 ... -m launch doctor", "any launcher that sets RANK and its like"),
)
STATUSES = {0: "a run may start (warnings do not matter)", 1: "a problem", 2: "a mistake in the command"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nystrom launch doctor``."""
    add_config_arguments(parser, required=False, what="also check what it needs (shards, disk, precision)")
    parser.add_argument("--processes", type=int, metavar="N", help="of the run (default: those that examine)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=Path, metavar="FILE", help="all hosts of a DeepSpeed hostfile, over ssh")
    where.add_argument("--in-allocation", action="store_true", help="this is one of the tasks that srun started")
    parser.add_argument("--include", default="", metavar="HOST@HOST", help="of the hostfile, these hosts only")
    parser.add_argument("--exclude", default="", metavar="HOST@HOST", help="of the hostfile, all but these")
    parser.add_argument("--ssh-args", default="", metavar="WORDS", help="more arguments of ssh, such as '-p 2222'")
    parser.add_argument(
        "--master-addr", metavar="ADDRESS", help="of the first host, for the others (default: as ssh reached it)"
    )
    parser.add_argument("--master-port", type=int, default=29_511, metavar="PORT", help="with --hostfile (29511)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="as of launch hostfile")
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="folder to write to (default: the run's, or the working directory)"
    )
    parser.add_argument("--quick", action="store_true", help="short measurements: they tell 3 from 1, not 1.2 from 1")
    parser.add_argument("--sizes", default=SIZES, metavar="N,N", help=f"bytes of the all-reduces (default: {SIZES})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured and found")
    parser.add_argument(
        "--patience", type=float, default=60.0, metavar="SECONDS", help="how long hosts may take to come (default: 60)"
    )
    parser.add_argument(
        "--timeout", type=float, default=240.0, metavar="SECONDS", help="limit of the measurements (default: 240)"
    )


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """SIGTERM and SIGHUP are as Ctrl-C in it, so that files and processes of ours do not stay."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns 0 if a run may start, 1 for a problem."""
    with ends_at_once():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    sizes = read_sizes(args.sizes)
    for name in ("patience", "timeout"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0 seconds")
    if args.processes is not None and args.processes < 1:
        raise UserError(f"--processes {args.processes}: must be at least 1")
    if args.overrides and args.config is None:
        raise UserError("--set overrides keys of a run's file: give --config too")
    if args.hostfile is None and (args.include or args.exclude or args.ssh_args or args.master_addr or args.env):
        raise UserError("--include, --exclude, --ssh-args, --master-addr and --env belong to --hostfile")
    config = None
    if args.config is not None:
        from pretrain.config import load_config

        config = load_config(args.config, args.overrides)
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.absolute().parent}")
    if args.hostfile is not None:
        from launch.doctor.over_ssh import examine_hosts

        return _tell(examine_hosts(args), args.json)
    return _as_rank(args, config, sizes)


def _as_rank(args: argparse.Namespace, config: RunConfig | None, sizes: list[int]) -> int:
    from pretrain.distributed.world import quiet_libraries

    quiet_libraries()
    names = (
        adopt_allocation() if args.in_allocation else [name for name in os.environ.get(HOSTS, "").split(",") if name]
    )
    rank = read_own_rank(args.in_allocation)
    from launch.doctor.session import Options

    options = Options(
        host=own_name(),
        config=config,
        run_dir=args.run_dir,
        quick=args.quick,
        sizes=sizes,
        timeout=args.timeout,
        processes=args.processes,
        names=names,
    )
    from data_pipeline.processes import immediate_exit

    if rank.world_size > 1:
        # Whatever hangs in C code, this process ends: after the last of the limits, and some seconds for the answer.
        last = threading.Timer(args.patience + args.timeout + 15.0, os._exit, (1,))
        last.daemon = True
        last.start()
    try:
        report = _meet(rank, options, args.patience)
        status = report if isinstance(report, int) else _tell(report, args.json)
    except KeyboardInterrupt:
        print("nystrom launch doctor: interrupted", file=sys.stderr)
        immediate_exit(130)  # a measurement is still at work on its thread
    except UserError as error:
        if rank.world_size == 1:
            raise
        print(f"nystrom launch doctor: error: {error}", file=sys.stderr)
        status = 2
    return status if rank.world_size == 1 else immediate_exit(status)


def _meet(rank: Rank, options: Options, patience: float) -> dict[str, Any] | int:
    """The report on the first process, the exit status on the others."""
    from launch.doctor.meeting import Meeting
    from launch.doctor.session import Local, examine

    meeting = Meeting(rank, patience, options.host)
    master = os.environ.get("MASTER_ADDR") if rank.world_size > 1 else None
    local = Local(options, rank, meeting, master)
    deadline = time.monotonic() + options.timeout
    if not rank.is_first:
        return meeting.serve(local.works(), deadline + patience + 10.0)
    report = examine(meeting, local, deadline)
    meeting.end(report["status"])
    return report


def _tell(report: dict[str, Any], file: Path | None) -> int:
    if os.environ.get(RAW):
        print("\n" + REPORT_MARK + json.dumps(report), flush=True)
        return int(report["status"])
    print(render(report), flush=True)
    if file is not None:
        try:
            file.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {file} cannot be written: {error.strerror}") from None
    return int(report["status"])


def read_sizes(text: str) -> list[int]:
    """``4K,16M`` as bytes; raises :class:`UserError`."""
    found = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)([KMG]?)", word.strip().upper())
        number = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] if match else 0
        if not 4 <= number <= 4 << 30:
            raise UserError(f"--sizes {text}: {word!r} is no size from 4 bytes to 4G, such as 256K")
        found.append(number)
    return sorted(set(found))
