"""What is to be started, wherever it is: one :class:`LaunchPlan`, which every place renders in its own way."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import UserError
from pretrain.arguments import add_run_arguments

CROSSING = ("WANDB_", "HF_", "NCCL_", "GLOO_", "UCX_", "TORCH_", "OMP_", "MKL_", "NYSTROM_", "TOKENIZERS_", "TRITON_")
"""Beginnings of environment variables that every process of a run gets from the one that was launched from."""
ALSO_CROSSING = ("PYTHONPATH", "DS_ACCELERATOR", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "TMPDIR")
NOT_CROSSING = ("NYSTROM_LAUNCH_ID", "NYSTROM_LAUNCHER_PID")
SECRETS = re.compile(r"KEY|TOKEN(?!IZER)|SECRET|PASSWORD", re.IGNORECASE)
"""Names of variables whose values are not shown."""
STOP_SECONDS = 120.0


@dataclass(frozen=True)
class LaunchPlan:
    """A run as it is to be started: the same for every place, before any of them adds its own."""

    name: str
    """The run's name, from its configuration."""
    words: tuple[str, ...]
    """The arguments of ``python -m pretrain``."""
    run_dir: Path
    directory: Path
    """Where every process runs: relative paths of the configuration are relative to it."""
    nodes: int
    processes: int
    """Of each node."""
    max_nodes: int
    """More than ``nodes`` for an elastic run."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What every process gets besides the five variables."""
    stop_timeout: float = STOP_SECONDS
    """Seconds from SIGTERM to SIGKILL: for a save."""
    max_restarts: int = 0
    program: tuple[str, ...] = (sys.executable, "-m", "launch")
    """How ``nystrom launch`` is called on a node."""

    def node_command(
        self, nodes: str, node_rank: str, master_addr: str, port: str, launch_id: str, *, more: Sequence[str] = ()
    ) -> list[str]:
        """The command of one node: ``nystrom launch node ...``, with words that may be shell variables."""
        return [
            *[*self.program, "node", "--nodes", nodes, "--node-rank", node_rank, "--nproc", str(self.processes)],
            *["--master-addr", master_addr, "--master-port", port, "--launch-id", launch_id],
            *["--stop-timeout", f"{self.stop_timeout:g}", *more, "--", *self.words],
        ]


@dataclass(frozen=True)
class Rendered:
    """What a place will write and run for a plan; ``--dry-run`` shows it and does nothing."""

    files: Mapping[Path, str] = field(default_factory=dict)
    commands: Sequence[tuple[Sequence[str], str]] = ()
    """Each with what it does."""
    exports: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that the commands get."""

    def text(self) -> str:
        """All of it as text for people; values of secrets are not shown."""
        parts = []
        for path, text in self.files.items():
            parts.append(f"# file {path}\n{text.rstrip()}\n")
        if self.exports:
            lines = [f"export {name}={shlex.quote(shown(name, value))}" for name, value in self.exports.items()]
            parts.append("# environment\n" + "\n".join(lines) + "\n")
        for words, comment in self.commands:
            parts.append(f"# {comment}\n{shlex.join(words)}\n")
        return "\n".join(parts)


def shown(name: str, value: str) -> str:
    """``value`` as it may be printed."""
    return "(not shown)" if SECRETS.search(name) else value


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every place takes: which run, and how it is looked after."""
    add_run_arguments(parser)
    parser.add_argument(
        "--stop-timeout",
        type=float,
        default=STOP_SECONDS,
        metavar="SECONDS",
        help=f"how long processes may take to save after SIGTERM before they are killed (default: {STOP_SECONDS:g})",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="after a crash or a stall, start again from the last whole checkpoint, at most N times, and only while "
        "that gets the run further (default: 0)",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="environment variable for all processes, with this value or the present one; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="print every file, variable and command, and do nothing")


def make_plan(
    args: argparse.Namespace,
    *,
    nodes: int,
    processes: int,
    max_nodes: int | None = None,
    program: Sequence[str] | None = None,
) -> LaunchPlan:
    """The plan of parsed arguments; raises :class:`UserError` for mistakes in them and in the configuration."""
    from pretrain.config import load_config

    if nodes < 1:
        raise UserError(f"--nodes {nodes}: at least one node is needed")
    if processes < 1:
        raise UserError(f"--nproc {processes}: at least one process is needed")
    if args.stop_timeout <= 0:
        raise UserError(f"--stop-timeout {args.stop_timeout}: must be above 0 seconds")
    if args.max_restarts < 0:
        raise UserError(f"--max-restarts {args.max_restarts}: must be 0 or more")
    environment = crossing_environment(args.env)
    config = load_config(args.config, args.overrides)  # mistakes are told here, before anything is started
    words = ["--config", args.config, "--resume", args.resume]
    words += ["--set", *args.overrides] if args.overrides else []
    words += ["--verbose"] if args.verbose else []
    return LaunchPlan(
        name=config.name,
        words=tuple(words),
        run_dir=config.run_dir,
        directory=Path.cwd(),
        nodes=nodes,
        max_nodes=nodes if max_nodes is None else max_nodes,
        processes=processes,
        environment=environment,
        stop_timeout=args.stop_timeout,
        max_restarts=args.max_restarts,
        program=LaunchPlan.program if program is None else tuple(program),
    )


def crossing_environment(asked: Sequence[str]) -> dict[str, str]:
    """The variables that cross to other machines: those of :data:`CROSSING`, then ``--env NAME[=VALUE]``.

    Raises :class:`UserError` for a name that cannot be one, or that has no value.
    """
    found = {
        name: value
        for name, value in sorted(os.environ.items())
        if (name.startswith(CROSSING) or name in ALSO_CROSSING) and name not in NOT_CROSSING
    }
    for each in asked:
        name, equals, value = each.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"--env {each}: {name!r} cannot be the name of an environment variable")
        if not equals:
            if name not in os.environ:
                raise UserError(f"--env {name}: it is not set here; give a value with --env {name}=VALUE")
            value = os.environ[name]
        if "\n" in value:
            raise UserError(f"--env {name}: a value of several lines cannot cross")
        found[name] = value
    return found
