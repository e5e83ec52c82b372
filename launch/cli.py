"""``nystrom launch``: training on one machine or many, evaluation on several processes, preparation as a job array."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from data_pipeline.command_line import Example, Parser
from data_pipeline.console import say_loading
from data_pipeline.units import count
from launch import array, node, status, stop
from launch.doctor import cli as doctor
from launch.places import PLACES
from launch.plan import add_plan_arguments
from pretrain.arguments import EXIT_STATUSES

WAITING = ("local", "hostfile")
"""Places whose command waits for the end of the run."""
Run = Callable[[argparse.Namespace], int]


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments; ``command_run`` of what they parse to is the command."""
    parser = Parser(
        prog="nystrom launch",
        description="Start `nystrom train` or `nystrom eval` on several processes of this machine or of a cluster; "
        "examine machines before a run; look at a run or stop it; write the job array that prepares text.",
        examples=[
            "nystrom launch local --nproc 2 --config configs/demo-clm.yaml",
            "nystrom launch local --nproc 2 -- eval lm --checkpoint runs/demo-clm",
            "nystrom launch status runs/demo-clm",
            "nystrom launch stop runs/demo-clm",
        ],
        exit_status=EXIT_STATUSES,
    )
    commands = parser.add_subparsers(dest="place", required=True, metavar="PLACE")
    for place in PLACES.all().values():
        at = _command(
            commands,
            place.name,
            place.summary,
            place.description,
            _start,
            examples=place.examples,
            epilog=place.epilog,
            exit_status=place.exit_status,
        )
        place.add_arguments(at)
        add_plan_arguments(at)
    stop.add_arguments(
        _command(
            commands,
            "stop",
            "have a run save a checkpoint and end",
            "Have a run save a checkpoint and end, however it was started, and wait for that. The run's lock names its "
            "process; no other run is touched.",
            lambda args: stop.stop(args.run, args.timeout),
            examples=["nystrom launch stop runs/demo-clm"],
            exit_status={0: "the run has saved or was done; else its own"},
        )
    )
    status.add_arguments(
        _command(
            commands,
            "status",
            "what a run does now, wherever it runs",
            "Say what a run does now: whether it runs, where and how far it is, its newest checkpoint, its first "
            "error, and what to do next. All of it is read from the files of the run folder.",
            status.run,
            examples=["nystrom launch status runs/demo-clm", "nystrom launch status runs/* --json"],
            exit_status={0: "whatever the run does", 2: "there is no run"},
        )
    )
    doctor.add_arguments(
        _command(
            commands,
            "doctor",
            "measure and judge this machine or a cluster before a run",
            doctor.DESCRIPTION,
            doctor.run,
            examples=doctor.EXAMPLES,
            exit_status=doctor.STATUSES,
        )
    )
    array.add_arguments(
        _command(
            commands,
            "array",
            "`nystrom data prepare` as a Slurm job array",
            "Write the files of a Slurm job array whose tasks share the work of `nystrom data prepare`, and a script "
            "that submits it.",
            array.run,
            examples=[
                "nystrom launch array --num-shards 16 --out jobs --time 4:00:00 --cpus 16 --mem 32G "
                "--setup 'source venv/bin/activate' -- data prepare --input 'text/*.jsonl' --tokenizer tokenizer "
                "--out shards/train",
                "bash jobs/submit.sh",
            ],
            epilog="The shard folder must be on a file system that all nodes see. Relative paths are relative to the "
            "folder in which this command is given. With --dedup the array is submitted twice, the first time to sign "
            "documents.",
        )
    )
    node.add_arguments(
        _command(
            commands,
            "node",
            "this node's processes of a run on several nodes: what the others start on each",
            "Start the processes of one node of a run, look after them, and answer with what became of the run. "
            "`nystrom launch slurm`, `hostfile` and `kubernetes` start it on each node; so may any other scheduler.",
            node.run,
            examples=[
                (
                    "nystrom launch node --nodes 2 --node-rank 1 --nproc 8 --master-addr n0 --master-port 29500 "
                    "--launch-id first -- --config configs/causal-16k.yaml",
                    "on the second of two nodes",
                )
            ],
            epilog="The run folder must be on a file system that all nodes see. Each rank writes "
            "RUN/logs/ID/rank-N.log.",
            exit_status=EXIT_STATUSES,
        )
    )
    return parser


def _command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    summary: str,
    description: str,
    run: Run,
    *,
    examples: Sequence[Example],
    epilog: str = "",
    exit_status: Mapping[int, str] | None = None,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=description, examples=examples, epilog=epilog, exit_status=exit_status
    )
    parser.set_defaults(command_run=run)
    return parser


def _start(args: argparse.Namespace) -> int:
    place = PLACES.get(args.place)
    plan = place.plan(args)
    rendered = place.render(plan, args)
    if args.dry_run:
        print(rendered.text(), end="")
        return 0
    if args.place == "local":  # the others say what they check, and start, by themselves
        say_loading(f"PyTorch and DeepSpeed in {count(plan.processes, 'process', 'processes')}", elsewhere=True)
    return place.start(plan, args, rendered)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the run's exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["local"] and "--" in words:
        from launch.evaluation import main as evaluate

        split = words.index("--")
        return evaluate(words[1:split], words[split + 1 :])
    args = build_parser().parse_args(words)
    run: Run = args.command_run
    code = run(args)
    if run is _start and not args.dry_run and args.place in WAITING:
        from pretrain.next_commands import say_after_training

        say_after_training(code, ["launch", *words], args.config, args.overrides)
    return code
