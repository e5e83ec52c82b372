"""``nystrom launch node``: the part of a launch that runs on each node, whatever started it there.

It starts this node's processes through DeepSpeed's launcher for one node, which sets RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT; it passes signals on, keeps one log for each rank, and answers with the run's own status.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from launch.life_line import KINDS, LifeLine
from launch.network import choose_interface
from launch.plan import STOP_SECONDS
from launch.rank_logs import LOGS, Followers, make_folder, print_first_error
from launch.watch import (
    StopRequest,
    become_subreaper,
    environment,
    exit_status,
    look_after,
    remove_shared_memory,
    visible_devices,
)
from pretrain.distributed.signals import EXIT_DONE, EXIT_PREEMPTED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nystrom launch node``."""
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the run")
    parser.add_argument(
        "--node-rank",
        required=True,
        metavar="R",
        help="which of them this is, from 0; or the environment variable that says so, such as SLURM_NODEID",
    )
    parser.add_argument("--nproc", type=int, required=True, metavar="P", help="processes of each node")
    parser.add_argument("--master-addr", required=True, metavar="HOST", help="the first node, as all others reach it")
    parser.add_argument("--master-port", type=int, required=True, metavar="PORT", help="a port that is free there")
    parser.add_argument(
        "--launch-id", required=True, metavar="ID", help="one word for this start of the run, the same on all nodes"
    )
    parser.add_argument(
        "--stop-timeout",
        type=float,
        default=STOP_SECONDS,
        metavar="SECONDS",
        help=f"from SIGTERM to SIGKILL (default: {STOP_SECONDS:g})",
    )
    parser.add_argument(
        "--interface",
        metavar="IF",
        help="network interface for gloo and NCCL; auto: the one towards the first node (default: what they choose)",
    )
    parser.add_argument(
        "--life-line",
        choices=KINDS,
        help="save and end when the launcher is gone: it speaks on standard input, or is behind the parent process",
    )
    parser.add_argument("command", nargs="+", metavar="WORD", help="the arguments of `nystrom train`, behind --")


def run(args: argparse.Namespace) -> int:
    """Check the arguments and run this node's processes; returns the run's exit status."""
    from pretrain.cli import build_parser
    from pretrain.config import load_config

    if args.nodes < 1 or args.nproc < 1:
        raise UserError(f"--nodes {args.nodes} --nproc {args.nproc}: at least one of each")
    if not args.launch_id or not all(c.isalnum() or c in "-_." for c in args.launch_id) or args.launch_id[0] == ".":
        raise UserError(f"--launch-id {args.launch_id!r}: letters, digits, '-', '_' and '.' only")
    rank = node_rank(args.node_rank, args.nodes)
    train = build_parser().parse_args(args.command)
    config = load_config(train.config, train.overrides)
    if args.interface is not None:
        choose_interface(args.interface, args.master_addr)
    request = StopRequest()
    logs = config.run_dir / LOGS / args.launch_id
    line = contextlib.nullcontext() if args.life_line is None else LifeLine(args.life_line, request, logs, rank)
    with line:
        return run_node(
            args.nodes,
            rank,
            args.nproc,
            args.master_addr,
            args.master_port,
            args.command,
            config.run_dir,
            launch_id=args.launch_id,
            stop_timeout=args.stop_timeout,
            verbose=train.verbose,
            request=request,
        )


def node_rank(word: str, nodes: int) -> int:
    """The number of this node; ``word`` is a number or the name of the variable that has it."""
    value = word if word.isdigit() else os.environ.get(word)
    if value is None:
        raise UserError(f"--node-rank {word}: the environment variable {word} is not set on {socket.gethostname()}")
    if not value.isdigit() or int(value) >= nodes:
        raise UserError(f"--node-rank {word}: {value!r} is not a number from 0 to {nodes - 1} (--nodes {nodes})")
    return int(value)


def run_node(
    nodes: int,
    rank: int,
    nproc: int,
    master_addr: str,
    master_port: int,
    words: Sequence[str],
    run_dir: Path,
    *,
    launch_id: str,
    stop_timeout: float,
    verbose: bool = False,
    request: StopRequest | None = None,
    each_poll: Callable[[], None] = lambda: None,
) -> int:
    """Run ranks ``rank * nproc`` to ``(rank + 1) * nproc - 1`` of ``nodes * nproc``; returns the run's exit status.

    On SIGTERM, SIGINT, SIGHUP or SIGUSR1 each gets SIGTERM once and ``stop_timeout`` seconds to save; then all are
    killed. No process that it started outlives it. ``each_poll`` is called several times a second.
    """
    become_subreaper()
    request = StopRequest() if request is None else request
    logs = run_dir / LOGS / launch_id
    make_folder(logs)
    followers = Followers(logs, range(rank * nproc, (rank + 1) * nproc))

    def poll() -> None:
        followers.copy()
        each_poll()

    try:
        command = node_command(nodes, rank, nproc, master_addr, master_port, logs, words, verbose)
        runner = subprocess.Popen(command, env=environment(launch_id), start_new_session=True)
        ended = look_after(runner, launch_id, request, stop_timeout, poll)
        followers.finish()
        code = _status(ended, rank, run_dir, launch_id, request)
    finally:
        request.restore()
        remove_shared_memory(master_port)
    if rank == 0 and code not in (EXIT_DONE, EXIT_PREEMPTED):
        print_first_error(logs)
    return code


def node_command(
    nodes: int,
    rank: int,
    nproc: int,
    master_addr: str,
    master_port: int,
    logs: Path,
    words: Sequence[str],
    verbose: bool = False,
) -> list[str]:
    """DeepSpeed's launcher for one node of several."""
    # The names mean nothing to it: only their order does, and how many devices each has.
    world: dict[str, list[int | str]] = {f"node-{node}": list(range(nproc)) for node in range(nodes)}
    world[f"node-{rank}"] = _devices(nproc)
    return [
        *[sys.executable, "-m", "deepspeed.launcher.launch"],
        f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
        *[f"--node_rank={rank}", f"--master_addr={master_addr}", f"--master_port={master_port}"],
        *[f"--enable_each_rank_log={logs}", "--log_level", "info" if verbose else "critical"],
        *["--module", "pretrain", *words],
    ]


def _devices(nproc: int) -> list[int | str]:
    """The accelerators of this node's processes: those of CUDA_VISIBLE_DEVICES where a scheduler has set it."""
    named = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if visible_devices() is None and not named[0].startswith(("GPU-", "MIG-")):
        return list(range(nproc))
    if len(named) < nproc:
        raise UserError(
            f"{nproc} processes on {socket.gethostname()}, but CUDA_VISIBLE_DEVICES names {len(named)} GPU(s): "
            f"{','.join(named)}"
        )
    return [int(part) if part.isdigit() else part for part in named[:nproc]]


def _status(ended: int, rank: int, run_dir: Path, launch_id: str, request: StopRequest) -> int:
    """The run's status; node 0 writes it down where the run could not."""
    asked = request.number is not None
    if rank == 0:
        return exit_status(ended, run_dir, launch_id, asked)
    # Another node's file may come late over a network file system: what this node's own processes say counts first.
    if 0 < ended <= 128:
        return ended
    return exit_status(ended, run_dir, launch_id, asked, corrects=False) if ended else EXIT_DONE
