"""``nystrom eval``: suites on a checkpoint, behind the validity gate."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.command_line import Parser
from data_pipeline.console import Answer, add_json, answering, print_json, say_loading, say_next
from data_pipeline.errors import UserError
from eval.suites.load import Suite, available, find, load_suites
from eval.suites.options import add_options, overrides_of
from eval.task import tasks
from eval.team import SharedError, Team, join
from pretrain.distributed.world import read_rank

if TYPE_CHECKING:
    from eval.results.schema import Result

EXAMPLES = (
    "nystrom eval validity lm generate --checkpoint runs/books-clm",
    "nystrom eval classify --checkpoint runs/books-clm --train reviews-train.csv --test reviews-test.csv "
    "--max-length 512",
    ("nystrom eval list", "the suites there are"),
    ("nystrom eval list lm", "one of them with its settings"),
    ("nystrom eval compare runs/a runs/b", "what differs between two models, and whether more than by chance"),
    ("nystrom launch local --nproc 4 -- eval classify --checkpoint runs/books-clm ...", "on four processes"),
)
EPILOG = """Results are written to RUN/eval/SUITE.json; `nystrom report RUN` makes a page of them. A result that is
there already for the same weights, settings and data is not computed again, and an interrupted suite resumes where it
was. A suite that cannot be run does not keep the others from running."""


def build_parser(shown: Collection[str] = ()) -> argparse.ArgumentParser:
    """The options of ``nystrom eval``: those of the command, and one for each setting of each task.

    ``shown``: the tasks whose settings the help explains.
    """
    parser = Parser(
        prog="nystrom eval",
        usage="nystrom eval SUITE [SUITE ...] [--checkpoint RUN] [options and settings]",
        allow_abbrev=False,  # a setting of a later version would make them ambiguous
        description="Evaluate a checkpoint. A suite is a task with settings: a name of `nystrom eval list`, or a YAML "
        "file. validity runs before any other and blocks them when it fails. Every setting is an option too: "
        "`nystrom eval SUITE --help` explains those of a suite.",
        examples=EXAMPLES,
        epilog=EPILOG,
        exit_status={1: "validity was the only suite asked for, and it failed"},
    )
    parser.add_argument("suites", nargs="+", metavar="SUITE", help=f"tasks: {', '.join(tasks())}; or suites")
    parser.add_argument("--checkpoint", metavar="RUN", help="run folder, checkpoint folder or export folder")
    parser.add_argument(
        "--data", metavar="SHARDS", help="held-out shards (default: data.valid of the run's configuration)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: RUN/eval)")
    parser.add_argument(
        "--suite-path", action="append", metavar="DIR", help="folder with suites of your own, repeatable"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", metavar="[SUITE.]KEY=VALUE", help="settings, of one suite or of all"
    )
    parser.add_argument("--name", metavar="NAME", help="write results as SUITE-NAME.json, to keep several")
    parser.add_argument("--force", action="store_true", help="score the model even though the validity gate fails")
    parser.add_argument("--rerun", action="store_true", help="compute again what is already there")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument(
        "--wandb",
        choices=["off", "offline", "online"],
        default="off",
        help="log fresh results to Weights & Biases too, its files in the results folder (default: off)",
    )
    add_json(parser)
    add_options(parser, shown)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suites; returns 0, or 1 if the validity suite was asked for and failed.

    Raises :class:`UserError`, where several processes evaluate from the first of them only.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["compare"]:
        from eval.compare import main as compare

        return compare(words[1:])
    rank = read_rank()
    try:
        # What is wrong in the command itself, every process finds alike: one says it.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(sys.stderr if rank.is_first else nowhere):
            args = build_parser(named_tasks(words) if {"-h", "--help"} & set(words) else ()).parse_args(words)
        if args.suites[0] == "list":
            return _list(args) if rank.is_first else 0
        try:
            suites = check_arguments(args)
        except UserError as error:
            raise SharedError(str(error)) from None
        say_loading()
        with join(rank) as team, team.alike(), answering(args.json and rank.is_first) as answer:
            code = _evaluate(args, suites, team, answer)
        if code == 0 and not args.json:
            say_next(next_command(args))
        return code
    except SharedError:
        if rank.is_first:
            raise
        return 2


def named_tasks(words: Sequence[str]) -> set[str]:
    """The tasks of the suites among ``words``, whose settings help and completion tell."""
    named = [word for word in words if word in tasks() or word in {path.stem for path in available()}]
    return {suite.task.name for suite in load_suites(named)}


def check_arguments(args: argparse.Namespace) -> list[Suite]:
    """The suites of a command; raises :class:`UserError` for what can be told without loading anything."""
    suites = load_suites(args.suites, args.suite_path or (), overrides_of(args))
    if args.name and not all(c.isalnum() or c in "-_." for c in args.name):
        raise UserError(f"--name {args.name}: letters, digits, '-', '_' and '.' only, it becomes part of a file name")
    check_data(args.data, suites)
    needing = [suite.name for suite in suites if suite.task.needs_checkpoint]
    if needing and not args.checkpoint:
        raise UserError(f"suite {needing[0]} evaluates a model: say which with --checkpoint RUN")
    if not needing and not (args.out or args.checkpoint):
        raise UserError(f"suite {suites[0].name} needs no checkpoint: say where its results go with --out DIR")
    return suites


def check_data(shards: str | None, suites: Sequence[Suite]) -> None:
    """Raises :class:`UserError` for held-out shards that no suite reads, since text was named in their place."""
    elsewhere = [suite for suite in suites if suite.settings.own_text]
    if shards and elsewhere and all(suite in elsewhere or not suite.task.held_out for suite in suites):
        raise UserError(
            f"no suite reads --data {shards}: {elsewhere[0].name} scores the text of {elsewhere[0].settings.own_text} "
            "in its place. Leave one of them out, or ask for validity too, which reads the shards"
        )


def _evaluate(args: argparse.Namespace, suites: list[Suite], team: Team, answer: Answer) -> int:
    from eval.console import as_answer, few_items, print_table
    from eval.results.records import results_folder
    from eval.runner import Runner, outdated
    from eval.subject import load_subject
    from eval.tracking import Tracking

    with team.alike():
        subject = load_subject(args.checkpoint, args.data, args.device) if args.checkpoint else None
    if subject is not None:
        info = subject.info()
        folder = args.out or results_folder(Path(args.checkpoint), subject.loaded.run_dir)
        print(
            f"{info.run}: {info.objective}, {info.attention} attention, {info.parameters:,} parameters, "
            f"{info.tokens:,} tokens seen, weights {info.weights_hash[:12]}",
            flush=True,
        )
    else:
        folder = args.out
    runner = Runner(subject, folder, force=args.force, rerun=args.rerun, team=team)
    runner.expect(suites)
    tracking = Tracking(folder, args.wandb if team.is_first else "off", subject)
    results: list[tuple[str, Result, bool]] = []
    failures: dict[str, list[str]] = {}
    for number, suite in enumerate(sorted(suites, key=lambda suite: not suite.task.is_gate), 1):
        if args.device != "auto" and "device" in type(suite.settings).model_fields:
            suite = replace(suite, settings=suite.settings.model_copy(update={"device": args.device}))
        name = f"{suite.name}-{args.name}" if args.name and not suite.task.is_gate else suite.name
        if team.is_first:
            print(f"{name}: suite {number} of {len(suites)} ...", file=sys.stderr, flush=True)
        try:
            result, fresh = runner.run(suite, name)
        except UserError as error:
            failures.setdefault(str(error), []).append(name)
            continue
        if not fresh:
            print(f"{name}: already there for these weights, settings and data (--rerun computes it again)", flush=True)
        if result.gate == "forced":
            print(f"{name}: the validity gate FAILED for these weights; scored because of --force", flush=True)
        results.append((name, result, fresh))
        if fresh:
            tracking.log(name, result)
    tracking.close()
    if results:
        print_table(results, folder)
        for line in few_items(results):
            print(line)
        print(f"\nresults in {folder}", flush=True)
    if subject is not None:
        for line in outdated(folder, info, {name for name, _, _ in results}):
            print(line, flush=True)
    if team.is_first:
        answer.value = as_answer(info if subject is not None else None, folder, results, failures)
    team.gather(None)  # the launcher ends all soon after the first that failed: the first process has spoken by then
    if failures:
        raise _of_all(failures, len(suites))
    only_gate = all(suite.task.is_gate for suite in suites)
    return 1 if only_gate and runner.verdict is not None and not runner.verdict.passed else 0


def _of_all(failures: dict[str, list[str]], suites: int) -> UserError:
    """One error for all suites that could not be run, on every process alike."""
    if suites == 1:
        return SharedError(next(iter(failures)))
    failed = sum(map(len, failures.values()))
    lines = [f"{', '.join(names)}: {message}" for message, names in failures.items()]
    return SharedError(f"{failed} of {suites} suites could not be run\n" + "\n".join(lines))


def next_command(args: argparse.Namespace) -> list[str]:
    """The page of what was evaluated: of the run, or of the folder with the results."""
    if args.out or not args.checkpoint:
        return ["report", str(args.out)]
    from eval.results.records import results_folder

    place = Path(args.checkpoint)
    around = (place, place.parent, place.parent.parent)
    run = next((folder for folder in around if (folder / "checkpoints").is_dir()), None)
    folder = results_folder(place, run)
    return ["report", str(run if run is not None and folder == run / "eval" else folder)]


def _list(args: argparse.Namespace) -> int:
    """``nystrom eval list``: tasks and suites, a line each; with names, their settings."""
    from eval.console import aligned, terminal_width

    width = terminal_width()
    names = args.suites[1:]
    if names:
        suites = load_suites(names, args.suite_path or (), overrides_of(args))
        if args.json:
            print_json({"suites": [_described(suite) for suite in suites]})
            return 0
        for suite in suites:
            print(f"{suite.name}: task {suite.task.name}" + (f", {suite.origin}" if suite.origin else ""))
            print(f"  {suite.description or suite.task.summary}")
            fields = type(suite.settings).model_fields
            rows = [(key, str(getattr(suite.settings, key)), fields[key].description or "") for key in fields]
            table = aligned([("setting", "value", "what it is"), *rows], None if width is None else width - 2)
            print("\n".join(f"  {line}" for line in table.split("\n")))
        return 0
    rows = [(task.name, "task", task.summary) for task in tasks().values()]
    for path in available(args.suite_path or ()):
        found = find(path.stem, args.suite_path or ())
        assert found is not None
        members = load_suites([str(found)], args.suite_path or ())
        what = members[0].task.name if len(members) == 1 else f"{len(members)} suites"
        rows.append(
            (path.stem, what, members[0].description if len(members) == 1 else ", ".join(s.name for s in members))
        )
    if args.json:
        print_json({"suites": [dict(zip(("name", "is", "summary"), row, strict=True)) for row in rows]})
    else:
        print(aligned([("suite", "is", "what it measures"), *rows], width))
    return 0


def _described(suite: Suite) -> dict[str, Any]:
    fields = type(suite.settings).model_fields
    values = {key: getattr(suite.settings, key) for key in fields} | suite.settings.model_dump(mode="json")
    return {
        "name": suite.name,
        "task": suite.task.name,
        "file": str(suite.origin) if suite.origin else None,
        "summary": suite.description or suite.task.summary,
        "settings": [{"key": key, "value": values[key], "meaning": fields[key].description} for key in fields],
    }
