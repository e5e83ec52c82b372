"""``nystrom launch slurm``: one readable batch file, submitted."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError
from launch.batch_file import Resources, job_name, seconds_of
from launch.places import PLACES, Place
from launch.places._slurm_script import EARLY_SECONDS, Script, eval_file, grace_seconds, train_file
from launch.places._slurm_submit import DEPENDENCY, submit
from launch.plan import SECRETS, LaunchPlan, Rendered, make_plan
from launch.rank_logs import LOGS
from launch.restarts import starts_anew

if TYPE_CHECKING:
    from launch.cluster import ClusterConfig, ContainerConfig

TRAIN_FILE, EVAL_FILE = "train.sbatch", "eval.sbatch"
OURS = (
    *("--signal", "--open-mode", "--output", "--array", "--nodes", "--ntasks", "--ntasks-per-node", "--requeue"),
    *("--no-requeue", "--chdir", "-o", "-a", "-N", "-n", "-D"),
)
"""Options of sbatch that the batch file relies on."""
NODE_BOUND = ("TMPDIR",)
"""Variables of the machine that submits which a job has of its own."""
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


@PLACES.register
class Slurm(Place):
    """Nodes that Slurm allocates."""

    name = "slurm"
    summary = "a batch file for Slurm, submitted: nodes, preemption, time limits, an evaluation after it"
    description = (
        "Write one readable batch file for Slurm and submit it. Slurm starts one task on each node, which starts the "
        "processes there. Before the time limit the run saves and ends with status 75; with --requeue Slurm starts it "
        "again, also after a preemption, and it resumes."
    )
    examples = (
        "nystrom launch slurm --config configs/causal-16k.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 "
        "--partition gpu --account lab --requeue --eval lm",
    )
    exit_status: Mapping[int, str] = {0: "the files are written, and the run is submitted; a dry run: nothing is done"}
    epilog = (
        "Run folder, shards and code must be on a file system that all nodes see. The job's exit status is the run's "
        "own: 0, 2, 74, 75, 76 or 77. docs/slurm.md has the rest, and what a site's administrator must know."
    )

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """What is asked of Slurm; most of it may stand in a ``cluster.yaml`` instead."""
        add = parser.add_argument
        add("--cluster", type=Path, metavar="FILE", help="YAML file with a site's habits; the command line wins")
        add("--nodes", default="1", metavar="N[-M]", help="nodes; with a range as many as can be had (default: 1)")
        add("--gpus-per-node", metavar="[TYPE:]N", help="GPUs of each node (default: none)")
        add("--nproc", type=int, metavar="P", help="processes of each node (default: one for each GPU, or one)")
        add("--time", metavar="T", help="time limit, such as 24:00:00 (default: the partition's)")
        add("--partition", metavar="NAME", help="partition")
        add("--account", metavar="NAME", help="account")
        add("--qos", metavar="NAME", help="quality of service")
        add("--constraint", metavar="FEATURES", help="features that the nodes must have")
        add("--cpus-per-task", type=int, metavar="N", help="cores of each node, for all its processes")
        add("--mem", metavar="SIZE", help="memory of each node, such as 500G")
        add("--exclusive", action="store_true", default=None, help="whole nodes")
        add(
            "--requeue",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="have the job requeued when it is preempted, hits its time limit or loses a node (default: no)",
        )
        add("--interface", metavar="NAME", help="network interface of NCCL and gloo, such as ib0")
        add("--sbatch", action="append", default=[], metavar="OPTION", help="further option: --sbatch=--reservation=r")
        add(
            "--setup",
            action="append",
            default=[],
            metavar="LINE",
            help="line of shell before the run, such as 'module load cuda'; may be repeated. `nystrom` must be found "
            "after these lines; without them the job uses the Python of this command",
        )
        add("--container", metavar="IMAGE", help="image with nystrom installed that the processes run in")
        add("--container-runtime", choices=["pyxis", "apptainer"], default=None, help="how (default: pyxis)")
        add("--mount", action="append", default=[], metavar="FOLDER[:PLACE]", help="folder for the container to see")
        add(
            "--eval",
            nargs="+",
            action="extend",
            default=[],
            metavar="SUITE",
            help="suites of `nystrom eval` for a second job, which runs when training has ended well; with options in "
            "quotes: 'classify --train a.csv --test b.csv'",
        )
        add("--out", type=Path, metavar="FOLDER", help="folder of the batch files (default: RUN/slurm)")
        add(
            "--skip-test",
            action="store_true",
            help="submit although `sbatch --test-only` finds that the job cannot start, for example while nodes are in "
            "maintenance",
        )

    @staticmethod
    def plan(args: argparse.Namespace) -> LaunchPlan:
        """The plan of these arguments and of the ``cluster.yaml``."""
        site = settings(args)
        least, most = node_range(args.nodes)
        processes = args.nproc if args.nproc is not None else site.processes_per_node
        if processes is None:
            processes = gpus(site.gpus_per_node) or 1
        # In the order of their weight: make_plan takes the last.
        env = [f"{name}={site.interface}" for name in INTERFACES if site.interface and name not in os.environ]
        env += [f"{name}={value}" for name, value in site.env.items()]
        asked = [*env, *args.env]
        program = ("nystrom", "launch") if site.setup or site.container.image else None
        with_env = argparse.Namespace(**{**vars(args), "env": asked})
        plan = make_plan(with_env, nodes=least, max_nodes=most, processes=processes, program=program)
        if starts_anew(plan.words):
            raise UserError(
                f"--resume never: a requeued job would start over each time. Move {plan.run_dir} aside yourself, or "
                "give the run another name (--set name=...)"
            )
        left_out = {*NODE_BOUND, *(("PYTHONPATH",) if site.container.image else ())}
        left_out -= {each.partition("=")[0] for each in asked}
        return replace(plan, environment={k: v for k, v in plan.environment.items() if k not in left_out})

    @staticmethod
    def render(plan: LaunchPlan, args: argparse.Namespace) -> Rendered:
        """The batch files and the commands that submit them."""
        site = settings(args)
        for option in (*site.sbatch, *args.sbatch):
            if option.partition("=")[0] in OURS:
                raise UserError(f"--sbatch={option}: the batch file relies on its own {option.partition('=')[0]}")
        _check_time(site.time, plan.stop_timeout)
        folder = plan.directory / (args.out if args.out is not None else plan.run_dir / "slurm")
        script = Script(
            directory=plan.directory,
            environment=plan.environment,
            setup=site.setup,
            container=site.container,
            mounts=_mounts(plan, site.container),
            gpus=gpus(site.gpus_per_node) > 0,
            cpus_per_task=site.cpus_per_task,
        )
        least, most = str(plan.nodes), str(plan.max_nodes)
        options = [
            *_header(plan, site, args.sbatch, "", least if least == most else f"{least}-{most}"),
            f"--signal=B:TERM@{grace_seconds(plan.stop_timeout)}",
            "--requeue" if site.requeue else "--no-requeue",
        ]
        train = folder / TRAIN_FILE
        files = {train: train_file(options, plan, script, site.requeue, train)}
        commands = [(["sbatch", "--parsable", str(folder / TRAIN_FILE)], "submits the run")]
        if args.eval:
            words = eval_commands(args.eval, plan.run_dir)
            options = _header(plan, site, args.sbatch, "-eval", "1")
            files[folder / EVAL_FILE] = eval_file(options, plan, script, words)
            commands.append(
                (["sbatch", "--parsable", *DEPENDENCY, str(folder / EVAL_FILE)], "submits its evaluation; JOB: the run")
            )
        secrets = {name: value for name, value in plan.environment.items() if SECRETS.search(name)}
        return Rendered(files, commands, secrets)

    @staticmethod
    def start(plan: LaunchPlan, args: argparse.Namespace, rendered: Rendered) -> int:
        """Check, write the files and submit; see :func:`submit`."""
        return submit(plan, rendered, args.config, args.overrides, settings(args).shared, args.skip_test)


def settings(args: argparse.Namespace) -> ClusterConfig:
    """The ``cluster.yaml``, or none, with what the command line says put over it."""
    from launch.cluster import ClusterConfig, ContainerConfig, load_cluster

    site = load_cluster(args.cluster) if args.cluster is not None else ClusterConfig()
    names = ("partition", "account", "qos", "constraint", "time", "gpus_per_node", "cpus_per_task", "mem", "interface")
    said = {name: getattr(args, name) for name in (*names, "exclusive", "requeue")}
    if args.cpus_per_task is not None and args.cpus_per_task < 1:
        raise UserError(f"--cpus-per-task {args.cpus_per_task}: at least one")
    box = site.container
    container = ContainerConfig(
        image=args.container or box.image,
        runtime=args.container_runtime or box.runtime,
        mounts=(*box.mounts, *args.mount),
    )
    given = {name: value for name, value in said.items() if value is not None}
    return site.model_copy(update={**given, "container": container, "setup": (*site.setup, *args.setup)})


def node_range(text: str) -> tuple[int, int]:
    """The least and the most nodes of "4" or "2-4"."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not found:
        raise UserError(f"--nodes {text}: a number such as 4, or a range such as 2-4")
    least, most = int(found[1]), int(found[2] or found[1])
    if least < 1 or most < least:
        raise UserError(f"--nodes {text}: at least one node, and the larger number last")
    return least, most


def gpus(text: str | None) -> int:
    """The number in "8" or "a100:8"; 0 for None."""
    if text is None:
        return 0
    found = re.fullmatch(r"(?:[\w.-]+:)?(\d+)", text)
    if not found:
        raise UserError(f"--gpus-per-node {text}: a number such as 8, or a type and a number such as a100:8")
    return int(found[1])


def eval_commands(suites: Sequence[str], run_dir: Path) -> list[list[str]]:
    """The arguments of ``nystrom eval`` for ``--eval``: one command for all suites without options, one for each other.

    Raises :class:`UserError` for a suite that there is not, or with an option at fault.
    """
    from launch.evaluation import check_command

    try:
        given = [shlex.split(suite) for suite in suites]
    except ValueError as error:
        raise UserError(f"--eval {shlex.join(suites)}: {error}") from None
    plain = [words[0] for words in given if len(words) == 1]
    commands = [*([plain] if plain else []), *(words for words in given if len(words) != 1)]
    return [check_command(["eval", *words, "--checkpoint", str(run_dir)]) for words in commands]


def _header(plan: LaunchPlan, site: ClusterConfig, more: Sequence[str], suffix: str, nodes: str) -> list[str]:
    logs = str(plan.directory / plan.run_dir / LOGS).replace("%", "%%")
    asked = Resources(
        time=site.time, cpus=site.cpus_per_task, mem=site.mem, partition=site.partition, account=site.account
    )
    named = {"--gpus-per-node": site.gpus_per_node, "--qos": site.qos, "--constraint": site.constraint}
    return [
        f"--job-name={job_name(plan.name)}{suffix}",
        f"--output={logs}/slurm-%j.log",
        "--open-mode=append",
        f"--nodes={nodes}",
        # With a range it would make Slurm (22.05) give the least number of nodes always.
        *([] if "-" in nodes else ["--ntasks-per-node=1"]),
        *site.sbatch,
        *asked.as_options(),
        *(f"{name}={value}" for name, value in named.items() if value is not None),
        *(["--exclusive"] if site.exclusive else []),
        *more,
    ]


def _check_time(time: str | None, stop_timeout: float) -> None:
    """Raises :class:`UserError` where the warning would come at the job's start."""
    limit = None if time is None else seconds_of(time)
    least = grace_seconds(stop_timeout) + EARLY_SECONDS
    if limit is not None and limit <= least:
        raise UserError(
            f"--time {time}: the run is told to save up to {least} s before the end (--stop-timeout {stop_timeout:g}), "
            "which leaves no time to train. Ask for more time, or lower --stop-timeout"
        )


def _mounts(plan: LaunchPlan, container: ContainerConfig) -> list[str]:
    """The working directory, the run folder's parent if it is elsewhere, and what was asked for."""
    parent = (plan.directory / plan.run_dir).parent
    own = [str(plan.directory), *([] if parent.is_relative_to(plan.directory) else [str(parent)])]
    for mount in container.mounts:
        if any(character in mount for character in ", \n"):
            raise UserError(f"--mount {mount}: FOLDER or FOLDER:PLACE, without white space and commas")
    return [*own, *container.mounts]
