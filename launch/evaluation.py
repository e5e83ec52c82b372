"""``nystrom launch local --nproc N -- eval ...``: an evaluation on several processes of this machine.

Evaluation needs nothing of DeepSpeed's launcher: the processes get RANK and the rest in their environment, the first
failure ends all of them, and none outlives this command (if it is itself killed, they notice within a second).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence

import psutil

from data_pipeline.command_line import Parser
from data_pipeline.console import say_loading, say_next
from data_pipeline.errors import UserError
from data_pipeline.processes import available_cores, child_command
from data_pipeline.units import count
from launch.watch import REPOSITORY, StopRequest, become_subreaper, count_gpus, free_port
from pretrain.distributed.signals import LAUNCHER_PID
from pretrain.finish import LAUNCH_ID

POLL_SECONDS = 0.1
LAST_WORDS_SECONDS = 5.0
"""How long the others may take to end by themselves after the first that failed: it may have been told of a mistake
that another one is just printing."""
KILL_SECONDS = 5.0
"""From SIGTERM, which ends a process of an evaluation wherever it is, to SIGKILL."""


def main(argv: Sequence[str], words: Sequence[str]) -> int:
    """``argv``: the options before ``--``; ``words``: the command behind it. Returns the evaluation's exit status."""
    args = build_parser().parse_args(argv)
    nproc = args.nproc if args.nproc is not None else max(1, count_gpus())
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: at least one process is needed")
    from eval import cli as evaluating

    command = check_command(words)
    evaluation = evaluating.build_parser().parse_args(command)
    say_loading(f"PyTorch in {count(nproc, 'process', 'processes')}", elsewhere=True)
    code = launch_evaluation(nproc, command)
    if code == 0 and not evaluation.json:
        say_next(evaluating.next_command(evaluation))
    return code


def build_parser() -> argparse.ArgumentParser:
    """The options before ``--``."""
    parser = Parser(
        prog="nystrom launch local",
        description="Run `nystrom eval ...` on several processes of this machine, which share the parts of its suites.",
        examples=["nystrom launch local --nproc 2 -- eval classify --checkpoint runs/books-clm --train ..."],
        exit_status={0: "the evaluation's own"},
    )
    parser.add_argument("--nproc", type=int, default=None, help="processes (default: one for each GPU, or one)")
    return parser


def check_command(words: Sequence[str]) -> list[str]:
    """The arguments of ``nystrom eval``; raises :class:`UserError` for another command, or one with a mistake."""
    from eval.cli import build_parser, check_arguments

    words = list(words[1:] if words[:1] == ["nystrom"] else words)
    if words[:1] != ["eval"]:
        given = f"'{shlex.join(words[:2])}'" if words else "nothing"
        raise UserError(f"behind `--` stands `eval SUITE ...`, and not {given}; training is started with --config")
    words = words[1:]
    if words[:1] in (["list"], ["compare"]):
        raise UserError(f"`eval {words[0]}` is for one process: leave out `launch local ... --`")
    check_arguments(build_parser().parse_args(words))
    return words


def launch_evaluation(nproc: int, words: Sequence[str]) -> int:
    """Run ``python -m eval *words`` on ``nproc`` processes; returns 0, or the status of the first that failed.

    On SIGTERM, SIGINT or SIGHUP all are ended (128 + the signal's number is returned); parts that are finished stay,
    and the same command resumes with the others. All processes that this call started are gone when it returns.
    """
    become_subreaper()
    launch_id = uuid.uuid4().hex
    request = StopRequest()
    port = str(free_port())
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(nproc):
            env = _environment(rank, nproc, port, launch_id)
            # In sessions of their own: Ctrl-C reaches them through this process only, and once.
            processes.append(subprocess.Popen(command(words), env=env, start_new_session=True))
        failed = _watch(processes, request)
    finally:
        _end_all(launch_id)
        for process in processes:
            process.wait()
        request.restore()
    if request.number is not None:
        with contextlib.suppress(OSError):  # of a terminal that is gone
            print("stopped; finished parts are kept, and the same command resumes", file=sys.stderr)
        return 128 + request.number
    if failed is None:
        return 0
    code = failed.returncode
    if code < 0:
        rank = processes.index(failed)
        print(f"process {rank} was killed by signal {-code}; the evaluation is not finished", file=sys.stderr)
    return code if code > 0 else 128 - code


def command(words: Sequence[str]) -> list[str]:
    """What each process runs."""
    # One process alone has nobody to look after: without this, kill -9 of the launcher left it at work (--nproc 1).
    return child_command("eval", *words, number=signal.SIGTERM)


def _watch(processes: Sequence[subprocess.Popen[bytes]], request: StopRequest) -> subprocess.Popen[bytes] | None:
    """Wait for the end of all, or a request to stop, or a failure; returns the first process that failed."""
    failed: subprocess.Popen[bytes] | None = None
    deadline = float("inf")
    while None in [process.poll() for process in processes]:  # all are asked: one that failed is known by it
        if request.number is not None or time.monotonic() > deadline:
            break
        if failed is None:
            failed = _first_failure(processes)
            deadline = time.monotonic() + LAST_WORDS_SECONDS if failed is not None else deadline
        time.sleep(POLL_SECONDS)
    return failed or _first_failure(processes)


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes] | None:
    """One that a signal killed, before those that merely lost it; else the first that failed; None if none has."""
    failed = [process for process in processes if process.returncode]
    return min(failed, key=lambda process: process.returncode >= 0, default=None)


def _end_all(launch_id: str) -> None:
    """SIGTERM, then SIGKILL, to all of this launch and to what they started."""
    found = _mine(launch_id)
    for process in found:
        _signal(process, signal.SIGTERM)
    psutil.wait_procs(found, timeout=KILL_SECONDS)
    while rest := _mine(launch_id):
        for process in rest:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(rest, timeout=KILL_SECONDS)


def _mine(launch_id: str) -> list[psutil.Process]:
    """Processes of this launch that have not ended, recognised by its id in their environment."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(LAUNCH_ID) == launch_id:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        return


def _environment(rank: int, nproc: int, port: str, launch_id: str) -> dict[str, str]:
    """The environment of one process, as torchrun would set it."""
    env = dict(os.environ)
    env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, LAUNCH_ID: launch_id, LAUNCHER_PID: str(os.getpid())}
    # Not only torch's threads, which are set later: BLAS takes all cores in every process, and they wait for others.
    env.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // nproc)))
    env.pop("LOCAL_SIZE", None)  # DeepSpeed's name for LOCAL_WORLD_SIZE, if this runs within one of its launches
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(REPOSITORY)]))
    return env
