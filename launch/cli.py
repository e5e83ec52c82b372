"""``nystrom launch``: training and evaluation on several processes, preparation as a job array."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_pipeline.errors import UserError
from launch import array, stop


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    from pretrain.cli import add_run_arguments

    parser = argparse.ArgumentParser(
        prog="nystrom launch",
        description="Start `nystrom train` or `nystrom eval` on several processes of this machine, stop a run, or "
        "write the job array that prepares text on a Slurm cluster.",
    )
    places = parser.add_subparsers(dest="place", required=True, metavar="PLACE")
    local = places.add_parser(
        "local",
        help="processes of this machine, through DeepSpeed's launcher",
        description="Start `nystrom train` on several processes of this machine through DeepSpeed's launcher, look "
        "after them, and answer with what became of the run.",
        epilog="example: nystrom launch local --nproc 2 --config configs/demo-clm.yaml --set optimizer.lr=1e-3\n\n"
        "SIGTERM, Ctrl-C or SIGHUP lets the processes save a checkpoint and end (exit status 75: the same command\n"
        "resumes); those still there after --stop-timeout are killed. A process that hangs for stall_seconds ends the\n"
        "run with status 77 and is named. No process outlives this command; if it is itself killed, they save and end\n"
        "at the next step, or after 300 s at the latest.\n\n"
        "`nystrom launch local --nproc 2 -- eval SUITE ...` runs an evaluation on several processes, which share its\n"
        "work; SIGTERM, Ctrl-C or SIGHUP ends them at once, and the same command resumes with the rest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    local.add_argument("--nproc", type=int, default=None, help="processes (default: one for each GPU, or one)")
    add_run_arguments(local)
    local.add_argument(
        "--stop-timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long processes may take to save after SIGTERM before they are killed (default: 120)",
    )
    local.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="after a crash or a stall, start again from the last whole checkpoint, at most N times, and only while "
        "that gets the run further (default: 0)",
    )
    end = places.add_parser(
        "stop",
        help="have a run save a checkpoint and end",
        description="Have a run save a checkpoint and end, however it was started, and wait for that. The run's lock "
        "names its process; no other run is touched.",
        epilog="example: nystrom launch stop runs/demo-clm\n\n"
        "exit status: 0 if the run has saved or was done, else its own",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stop.add_arguments(end)
    prepare = places.add_parser(
        "array",
        help="`nystrom data prepare` as a Slurm job array",
        description="Write the files of a Slurm job array whose tasks share the work of `nystrom data prepare`, and a "
        "script that submits it.",
        epilog="example:\n  nystrom launch array --num-shards 16 --out jobs --time 4:00:00 --cpus 16 --mem 32G \\\n"
        "    --setup 'source venv/bin/activate' \\\n"
        "    -- data prepare --input 'text/*.jsonl' --tokenizer tokenizer --out shards/train\n"
        "  bash jobs/submit.sh\n\n"
        "The shard folder must be on a file system that all nodes see. Relative paths are relative to the folder in\n"
        "which this command is given. With --dedup the array is submitted twice, the first time to sign documents.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    array.add_arguments(prepare)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the run's exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["local"] and "--" in words:
        from launch.evaluation import main as evaluate

        split = words.index("--")
        return evaluate(words[1:split], words[split + 1 :])
    args = build_parser().parse_args(words)
    if args.place == "array":
        return array.run(args)
    if args.place == "stop":
        return stop.stop(args.run, args.timeout)
    from launch.local import count_gpus, launch_local
    from pretrain.config import load_config

    nproc = args.nproc if args.nproc is not None else max(1, count_gpus())
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: at least one process is needed")
    if args.stop_timeout <= 0:
        raise UserError(f"--stop-timeout {args.stop_timeout}: must be above 0 seconds")
    if args.max_restarts < 0:
        raise UserError(f"--max-restarts {args.max_restarts}: must be 0 or more")
    config = load_config(args.config, args.overrides)  # mistakes are told here, before anything is started
    words = ["--config", args.config, "--resume", args.resume]
    words += ["--set", *args.overrides] if args.overrides else []
    words += ["--verbose"] if args.verbose else []
    return launch_local(
        nproc,
        words,
        config.run_dir,
        stop_timeout=args.stop_timeout,
        verbose=args.verbose,
        max_restarts=args.max_restarts,
    )
