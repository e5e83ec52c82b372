"""``nystrom launch local``: processes of this machine, through DeepSpeed's launcher."""

from __future__ import annotations

import argparse
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from launch.places import PLACES, Place
from launch.plan import LaunchPlan, Rendered, make_plan
from launch.rank_logs import LOGS, Followers, make_folder, print_first_error
from launch.restarts import Restarts, resumed, starts_anew
from launch.watch import (
    StopRequest,
    become_subreaper,
    count_gpus,
    environment,
    exit_status,
    free_port,
    look_after,
    read_status,
    remove_shared_memory,
    visible_devices,
)
from pretrain.distributed.signals import EXIT_DONE, EXIT_PREEMPTED


@PLACES.register
class Local(Place):
    """Several processes of this machine."""

    name = "local"
    summary = "processes of this machine, through DeepSpeed's launcher"
    description = (
        "Start `nystrom train` on several processes of this machine through DeepSpeed's launcher, look after them, and "
        "answer with what became of the run."
    )
    examples = (
        "nystrom launch local --nproc 2 --config configs/demo-clm.yaml --set optimizer.lr=1e-3",
        ("nystrom launch local --nproc 2 -- eval lm --checkpoint runs/demo-clm", "an evaluation"),
    )
    epilog = (
        "SIGTERM, Ctrl-C or SIGHUP lets the processes save a checkpoint and end (exit status 75: the same command "
        "resumes); those still there after --stop-timeout are killed. A process that hangs for stall_seconds ends the "
        "run with status 77 and is named. No process outlives this command; if it is itself killed, they save and end "
        "at the next step, or after 300 s at the latest.\n\n"
        "`nystrom launch local --nproc 2 -- eval SUITE ...` runs an evaluation on several processes, which share its "
        "work; SIGTERM, Ctrl-C or SIGHUP ends them at once, and the same command resumes with the rest."
    )

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """The number of processes, and logs for each."""
        parser.add_argument("--nproc", type=int, default=None, help="processes (default: one for each GPU, or one)")
        parser.add_argument(
            "--rank-logs",
            action="store_true",
            help="a log for each process, RUN/logs/ID/rank-N.log, besides the output here; starts on several nodes "
            "always write them",
        )

    @staticmethod
    def plan(args: argparse.Namespace) -> LaunchPlan:
        """One node; see :func:`make_plan`."""
        return make_plan(args, nodes=1, processes=args.nproc if args.nproc is not None else max(1, count_gpus()))

    @staticmethod
    def render(plan: LaunchPlan, args: argparse.Namespace) -> Rendered:
        """DeepSpeed's command; the port is another at each start."""
        logs = plan.run_dir / LOGS / "ID" if args.rank_logs else None
        command = runner_command(plan.processes, plan.words, free_port(), args.verbose, logs)
        return Rendered(commands=[(command, "in a session of its own")], exports=plan.environment)

    @staticmethod
    def start(plan: LaunchPlan, args: argparse.Namespace, rendered: Rendered) -> int:
        """Start it, wait, and return the run's own status."""
        return launch_local(
            plan.processes,
            plan.words,
            plan.run_dir,
            stop_timeout=plan.stop_timeout,
            verbose=args.verbose,
            max_restarts=plan.max_restarts,
            variables=plan.environment,
            rank_logs=args.rank_logs,
        )


def launch_local(
    nproc: int,
    words: Sequence[str],
    run_dir: Path,
    *,
    stop_timeout: float,
    verbose: bool = False,
    max_restarts: int = 0,
    variables: Mapping[str, str] = {},
    rank_logs: bool = False,
) -> int:
    """Run ``python -m pretrain *words`` on ``nproc`` processes of this machine; returns the run's own exit status.

    On SIGTERM, SIGINT or SIGHUP the workers get SIGTERM and ``stop_timeout`` seconds to save; then all is killed. All
    processes that this call started are gone when it returns. After a crash it starts again, ``max_restarts`` times.
    """
    become_subreaper()
    request = StopRequest()
    restarts = Restarts(run_dir, max_restarts, anew=starts_anew(words))
    try:
        while True:
            launch_id = uuid.uuid4().hex
            logs = run_dir / LOGS / launch_id if rank_logs else None
            code = _attempt(nproc, words, run_dir, launch_id, request, stop_timeout, verbose, variables, logs)
            if request.number is not None or not restarts.wanted(code):
                return code
            if restarts.pause(lambda: request.number is not None):
                return EXIT_PREEMPTED
            if read_status(run_dir).get("launch_id") == launch_id:
                words = resumed(words)
    finally:
        request.restore()


def _attempt(
    nproc: int,
    words: Sequence[str],
    run_dir: Path,
    launch_id: str,
    request: StopRequest,
    stop_timeout: float,
    verbose: bool,
    variables: Mapping[str, str],
    logs: Path | None,
) -> int:
    port = free_port()
    followers = None
    if logs is not None:
        make_folder(logs)
        followers = Followers(logs, range(nproc))
    try:
        command = runner_command(nproc, words, port, verbose, logs)
        runner = subprocess.Popen(command, env={**environment(launch_id), **variables}, start_new_session=True)
        ended = look_after(runner, launch_id, request, stop_timeout, followers.copy if followers else lambda: None)
        code = exit_status(ended, run_dir, launch_id, asked=request.number is not None)
    finally:
        remove_shared_memory(port)
    if followers is not None and logs is not None:
        followers.finish()
        if code not in (EXIT_DONE, EXIT_PREEMPTED):
            print_first_error(logs)
    return code


def runner_command(nproc: int, words: Sequence[str], port: int, verbose: bool, logs: Path | None = None) -> list[str]:
    """DeepSpeed's launcher for this machine; an empty host file name keeps it from finding a cluster's."""
    return [
        *[sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "", *_placement(nproc)],
        *["--master_port", str(port), "--log_level", "info" if verbose else "critical"],
        *(["--enable_each_rank_log", str(logs)] if logs is not None else []),
        *["--module", "pretrain", *words],
    ]


def _placement(nproc: int) -> list[str]:
    visible = visible_devices()
    if visible is None:
        return ["--num_accelerators", str(nproc)]
    if len(visible) < nproc:
        raise UserError(f"--nproc {nproc}, but CUDA_VISIBLE_DEVICES names {len(visible)} GPU(s): {','.join(visible)}")
    return ["--include", "localhost:" + ",".join(visible[:nproc])]
