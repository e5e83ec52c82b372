"""``nystrom launch array``: `nystrom data prepare` as a Slurm job array.

The jobs share the shard folder on a common file system: the units of work go round its tasks. When the array has
ended, well or not, one more job runs the plain command, which does what is missing and writes the manifest. Dropping
duplicates takes two passes over the text, so the array runs twice: all documents are signed before the first is
dropped. The bytes are those of a single machine.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from launch.batch_file import Resources, batch_file, change_directory, job_name

ARRAY, FINISH, SUBMIT = "array.sbatch", "finish.sbatch", "submit.sh"
COMMAND = ["nystrom", "data", "prepare"]


def write_array(
    folder: Path,
    words: Sequence[str],
    num_shards: int,
    *,
    resources: Resources,
    log_dir: Path,
    setup: Sequence[str] = (),
    max_running: int | None = None,
    directory: Path | None = None,
) -> Path:
    """Write ``array.sbatch``, ``finish.sbatch`` and ``submit.sh`` into ``folder``; returns the path of the last.

    ``words`` is the command, "data prepare ..."; relative paths in it are relative to ``directory`` (default: the
    present one), where the jobs run after the ``setup`` lines. Raises :class:`UserError` for another command, for one
    that is only a part already, reads standard input or uses Ray, and for values that cannot stand in an sbatch file.
    """
    directory = Path.cwd() if directory is None else directory.absolute()
    if num_shards < 1:
        raise UserError(f"--num-shards {num_shards}: at least one")
    if max_running is not None and max_running < 1:
        raise UserError(f"--max-running {max_running}: at least one")
    if resources.cpus is not None and resources.cpus < 1:
        raise UserError(f"--cpus {resources.cpus}: at least one")
    arguments, twice = check_command(words, resources.cpus)
    name = job_name(folder.absolute().name)
    logs = directory / log_dir
    throttle = "" if max_running is None else f"%{max_running}"
    shared = resources.as_options()
    run = shlex.join([*COMMAND, *arguments])
    array = _script(
        [f"--job-name={name}", f"--array=0-{num_shards - 1}{throttle}", f"--output={logs}/%x-%A-%a.log", *shared],
        directory,
        setup,
        f'{run} --shard-index "$SLURM_ARRAY_TASK_ID" --num-shards {num_shards}',
    )
    finish = _script(
        [f"--job-name={name}-finish", f"--output={logs}/%x-%j.log", *shared],
        directory,
        setup,
        run,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in ((ARRAY, array), (FINISH, finish), (SUBMIT, _submit(logs, twice))):
            (folder / file).write_text(text, encoding="utf-8")
        (folder / SUBMIT).chmod(0o755)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
    return folder / SUBMIT


def check_command(words: Sequence[str], cpus: int | None) -> tuple[list[str], bool]:
    """The arguments of ``data prepare``, and whether they drop duplicates; raises :class:`UserError`.

    The command is parsed as the jobs will parse it, so that its mistakes are told here and not by a job that waited a
    night in the queue. Unless it names a number of ``--workers``, it gets one for each of ``cpus``: not every cluster
    shows a job only the cores that it was given.
    """
    from data_pipeline.cli import build_parser

    words = list(words)
    if words[:1] == ["nystrom"]:
        words = words[1:]
    if words[:2] != ["data", "prepare"]:
        given = f"'{shlex.join(words[:2])}'" if words else "nothing"
        raise UserError(f"an array is for `data prepare ...`, given behind `--`, and not for {given}")
    args = build_parser().parse_args(words[1:])
    if getattr(args, "shard_index", None) is not None or getattr(args, "num_shards", None) is not None:
        raise UserError("--shard-index and --num-shards behind `--` are the array's own: leave them out there")
    if "-" in (args.input or []):
        raise UserError("--input -: the jobs of an array have no common standard input; name files")
    if getattr(args, "ray", None) is not None:
        raise UserError("--ray and an array are two ways to spread the same work: choose one")
    if args.overwrite:
        raise UserError(
            "--overwrite: each job would clear away what the others did; remove the folder, or name another"
        )
    arguments = words[2:]
    if cpus is not None and getattr(args, "workers", cpus) is None:
        arguments += ["--workers", str(cpus)]
    return arguments, getattr(args, "dedup", None) is not None


def idle_tasks(words: Sequence[str], num_shards: int, directory: Path) -> list[int] | None:
    """The tasks of an array that will have nothing to do; None where that cannot be told from here.

    ``words`` is a command that :func:`check_command` took. Files are looked at as planning does, by their sizes; those
    that this machine does not see, and datasets of the hub, are left to the jobs.
    """
    from data_pipeline.cli import build_parser
    from data_pipeline.cli.common import reading_of
    from data_pipeline.prepare.folder import Deal
    from data_pipeline.prepare.plan import plan_units
    from data_pipeline.sources.corpus import open_corpus

    args = build_parser().parse_args(list(words)[2 if words[0] == "nystrom" else 1 :])
    if args.dataset or not args.input:
        return None
    try:
        units = plan_units(open_corpus([directory / each for each in args.input]), reading_of(args))
    except UserError:
        return None
    return Deal.of(units, num_shards).idle()


def _script(options: Sequence[str], directory: Path, setup: Sequence[str], command: str) -> str:
    # Without -u: activation scripts of environments often read variables that are not set.
    return batch_file(options, ["set -eo pipefail", change_directory(directory), *setup, f"exec {command}"])


def _submit(logs: Path, twice: bool) -> str:
    lines = [
        "#!/bin/bash",
        "# Submits the array and the job that finishes the folder. If something failed, run this again: what is done",
        "# is not done again.",
        "set -euo pipefail",
        'cd "$(dirname "${BASH_SOURCE[0]}")"',
        f"mkdir -p {shlex.quote(str(logs))}",
        "",
        # --parsable prints "ID" or "ID;cluster".
        f"array=$(sbatch --parsable {ARRAY})",
        'array="${array%%;*}"',
    ]
    if twice:
        lines += [
            'echo "signing documents: job array $array"',
            f'array=$(sbatch --parsable --dependency="afterany:$array" {ARRAY})',
            'array="${array%%;*}"',
        ]
    lines += [
        'echo "tokenizing: job array $array"',
        # afterany: one failed task would keep a job that waits for success in the queue for ever.
        f'finish=$(sbatch --parsable --dependency="afterany:$array" {FINISH})',
        'echo "finishing: job ${finish%%;*}"',
    ]
    return "\n".join(lines) + "\n"


def _listed(tasks: Sequence[int]) -> str:
    shown = ", ".join(map(str, tasks[:8]))
    return shown + (", ..." if len(tasks) > 8 else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``nystrom launch array``."""
    parser.add_argument("--num-shards", type=int, required=True, metavar="N", help="tasks of the array")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the three files")
    parser.add_argument("--time", metavar="T", help="time limit of each job, for example 4:00:00")
    parser.add_argument("--cpus", type=int, metavar="N", help="cores of each task")
    parser.add_argument("--mem", metavar="SIZE", help="memory of each task, for example 32G")
    parser.add_argument("--partition", metavar="NAME", help="partition")
    parser.add_argument("--account", metavar="NAME", help="account")
    parser.add_argument("--max-running", type=int, metavar="N", help="tasks that run at a time (default: no limit)")
    parser.add_argument(
        "--log-dir", type=Path, default=Path("logs"), metavar="DIR", help="folder for the jobs' output (default: logs)"
    )
    parser.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="line of shell before the command, such as 'source venv/bin/activate'; may be repeated",
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="further option, as in --sbatch=--qos=long"
    )
    parser.add_argument("command", nargs="+", metavar="WORD", help="data prepare with its options, behind --")


def run(args: argparse.Namespace) -> int:
    """Write the files and say how to submit them."""
    resources = Resources(args.time, args.cpus, args.mem, args.partition, args.account, tuple(args.sbatch))
    submit = write_array(
        args.out,
        args.command,
        args.num_shards,
        resources=resources,
        log_dir=args.log_dir,
        setup=args.setup,
        max_running=args.max_running,
    )
    print(f"{args.out}: {ARRAY} ({args.num_shards} tasks) and {FINISH}, which completes the shard folder")
    idle = idle_tasks(args.command, args.num_shards, Path.cwd())
    if idle:
        enough = args.num_shards - len(idle)
        print(
            f"{len(idle)} of the {args.num_shards} tasks will have nothing to do ({_listed(idle)}): the inputs are "
            f"work for {enough}, so --num-shards {enough} is enough"
        )
    print(f"submit both with: bash {shlex.quote(str(submit))}")
    return 0
