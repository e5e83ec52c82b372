"""What all benchmarks share: options, checks of them, turns, provenance, tables, the file of results."""

from __future__ import annotations

import argparse
import json
import platform
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from data_pipeline.command_line import Example, Parser
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_atomic
from pretrain.heap import use_huge_pages

if TYPE_CHECKING:
    import torch


def build_parser(
    name: str,
    description: str,
    examples: Sequence[Example],
    *,
    epilog: str = "",
    check: str | None = "exit status 1 if a measured goal is not met",
    out: str = "all numbers as JSON",
    out_default: Path | None = None,
) -> argparse.ArgumentParser:
    """A parser for ``python -m benchmarks.NAME`` with ``--out`` and, unless ``check`` is None, ``--check``."""
    met = {} if check is None else {1: "with --check, a measured goal is not met"}
    parser = Parser(
        prog=f"python -m benchmarks.{name}", description=description, examples=examples, epilog=epilog, exit_status=met
    )
    parser.add_argument("--out", type=Path, default=out_default, metavar="FILE", help=out)
    if check is not None:
        parser.add_argument("--check", action="store_true", help=check)
    return parser


def run(main: Callable[[Sequence[str] | None], int], name: str) -> NoReturn:
    """What each ``__main__`` ends with: run the benchmark, under the heap of a run, and exit with its status."""
    use_huge_pages()
    sys.exit(run_cli(main, f"benchmarks.{name}"))


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise :class:`UserError` for a whole number below 1, and any other number that is not positive and finite."""
    for name in names:
        value = getattr(args, name)
        option = f"--{name.replace('_', '-')} {value}"
        if isinstance(value, int) and value < 1:
            raise UserError(f"{option}: must be at least 1")
        if isinstance(value, float) and not 0 < value < float("inf"):
            raise UserError(f"{option}: must be a positive number")


def check_file(option: str, path: Path | None) -> None:
    """Raise :class:`UserError` unless a file can be written there."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"{option} {path}: must be a file in a folder that is there")


def listed(option: str, text: str) -> list[str]:
    """The distinct words of ``text``, which commas separate. Raises :class:`UserError` if there are none."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise UserError(f"{option} '{text}': names nothing")
    return found


def chosen(option: str, text: str, known: Iterable[str]) -> list[str]:
    """The names in ``text``, each one of ``known``. Raises :class:`UserError` that lists them for another."""
    names, known = listed(option, text), list(known)
    for name in names:
        if name not in known:
            raise UserError(f"{option}: no '{name}'; there are {', '.join(known)}")
    return names


def in_turns(names: Sequence[str], rounds: int, *, warm_up: bool) -> Iterator[tuple[int, str]]:
    """(round, name), each name once in a round, in an order drawn anew: a slow spell of the machine falls on all.

    Rounds are numbered from 1. With ``warm_up`` there is a round 0, which is not to be counted.
    """
    for number in range(0 if warm_up else 1, rounds + 1):
        for name in random.sample(list(names), len(names)):
            yield number, name
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)


def provenance(name: str, arguments: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Command (``python -m benchmarks.NAME``), versions, machine, date."""
    import torch

    from pretrain.machine import cpu_name

    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *arguments]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _commit() -> str | None:
    """The checked-out commit, with ``+`` if files under version control were changed; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def settings_of(args: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """The options as JSON values, without ``--out``, ``--check`` and those ``left_out``."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "check", *left_out)}


def write_json(path: Path | None, content: Mapping[str, Any], *, tell: bool = True) -> None:
    """Write ``content`` atomically, unless ``path`` is None, and say where the numbers are."""
    if path is not None:
        write_atomic(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
        if tell:
            print(f"\nnumbers in {path}")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def goal_lines(goals: Sequence[Mapping[str, Any]]) -> list[str]:
    """A list item for each goal: {goal, value, met}."""
    return [f"- {goal['goal']}: {goal['value']:.3f}, {'met' if goal['met'] else 'missed'}" for goal in goals]
