"""What all commands print alike: an answer as JSON, the command that comes next, and that a slow start has begun."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

INNER = "NYSTROM_INNER"
"""Set for processes whose output a program of ours prints: they name no next command, for it would not be theirs."""
_LAUNCH_ID, _RANK = "NYSTROM_LAUNCH_ID", "RANK"


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option ``--json``, the same in every command that has it."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object on standard output, and all else on standard error (docs/scripting.md)",
    )


class Answer:
    """What a command found, as JSON has it: dictionaries, lists, text, numbers; paths too. None: nothing to print."""

    value: Any = None


@contextlib.contextmanager
def answering(as_json: bool) -> Iterator[Answer]:
    """A block of a command whose standard output, with ``as_json``, is its answer alone.

    What is printed in the block goes to standard error meanwhile, also by a task or a library. The answer is printed at
    the end, and left out where the block has raised before it had one.
    """
    answer = Answer()
    if not as_json:
        yield answer
        return
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield answer
    finally:
        if answer.value is not None:
            print_json(answer.value)


def print_json(value: Any) -> None:
    """Print a value as JSON; numbers that are not finite become null.

    Characters that the output's encoding lacks are written as JSON escapes them.
    """
    utf8 = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(_plain(value), indent=1, ensure_ascii=not utf8, allow_nan=False), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def say_next(*commands: Sequence[object]) -> None:
    """Name the likely next command, and what comes after it, on standard error: a line each, to be pasted.

    A command is its words behind ``nystrom``. Nothing is said in the processes of `nystrom launch`, which says it
    itself, in all but the first of torchrun's and DeepSpeed's, and where :data:`INNER` is set.
    """
    if INNER in os.environ or not _speaks():
        return
    sys.stdout.flush()  # raises where whoever read it went away, as printing does
    with contextlib.suppress(OSError):  # of a terminal that is gone
        for place, words in enumerate(filter(None, commands)):
            command = shlex.join(["nystrom", *map(str, words)])
            print(f"{'then' if place else 'next'}: {command}", file=sys.stderr, flush=True)


def say_loading(what: str = "PyTorch", *, elsewhere: bool = False) -> None:
    """Say on standard error that ``what`` is being loaded, before that import, which takes seconds.

    Nothing is said where this process has PyTorch already, unless it is processes ``elsewhere`` that load it.
    """
    if _speaks() and (elsewhere or "torch" not in sys.modules):
        with contextlib.suppress(OSError):
            print(f"loading {what} ...", file=sys.stderr, flush=True)


def _speaks() -> bool:
    """Whether this process speaks for all that do the same."""
    return _LAUNCH_ID not in os.environ and os.environ.get(_RANK, "0") == "0"
