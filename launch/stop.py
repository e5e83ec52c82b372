"""``nystrom launch stop RUN``: have a run save and end, found by its lock and not by the words of its command."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.checkpoint.lock import LOCK, Holder, read_holder
from pretrain.distributed.signals import EXIT_PREEMPTED
from pretrain.finish import STATUS

POLL_SECONDS = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nystrom launch stop``."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/books-clm")
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long to wait for the run to save and end (default: 300); 0 does not wait",
    )


def stop(run_dir: Path, timeout: float) -> int:
    """Send SIGTERM to the first process of the run and wait; returns 0 if it has saved or was done.

    That process tells the others at the next step's edge, and all save together. Whatever launched them sees status
    75. Returns the run's own status if it ended otherwise. Raises :class:`UserError` where nothing can be stopped from
    here, or the run is still there after ``timeout`` seconds.
    """
    if not run_dir.is_dir():
        raise UserError(f"there is no run folder {run_dir}")
    holder = read_holder(run_dir / LOCK)
    if holder is None or holder.has_ended():
        raise UserError(
            f"nothing is training in {run_dir}. A start takes the folder when its processes have met, some seconds "
            "after the command; before that, Ctrl-C or SIGTERM to the command ends it"
        )
    if holder.has_ended() is None:
        job = re.match(r"slurm-(\d+)-", str(_status(run_dir).get("launch_id")))
        raise UserError(
            f"the run is {holder}, which is another machine or container than this: "
            + (f"scancel --batch --signal=TERM {job[1]} has Slurm stop it; or " if job else "")
            + f"give the command there, or kill -TERM {holder.pid}"
        )
    try:
        os.kill(holder.pid, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it ended just now
    except PermissionError:
        raise UserError(f"the run is {holder}, which belongs to another user") from None
    print(f"asked {holder} to save and end", flush=True)
    if not timeout:
        return 0
    deadline = time.monotonic() + timeout
    while _is_there(run_dir, holder):
        if time.monotonic() > deadline:
            raise UserError(f"{holder} is still there after {timeout:g} s: look at its log")
        time.sleep(POLL_SECONDS)
    return _outcome(run_dir)


def _is_there(run_dir: Path, holder: Holder) -> bool:
    """Whether it still has the folder; it gives it back when all is written."""
    return read_holder(run_dir / LOCK) == holder and not holder.has_ended()


def _status(run_dir: Path) -> dict[str, Any]:
    """What ``status.json`` says; nothing where it is missing or torn."""
    with contextlib.suppress(OSError, ValueError):
        status = json.loads((run_dir / STATUS).read_text())
        return status if isinstance(status, dict) else {}
    return {}


def _outcome(run_dir: Path) -> int:
    status = _status(run_dir)
    code, state, step = status.get("code"), status.get("state"), status.get("step")
    if code in (0, EXIT_PREEMPTED):
        what = "is done" if code == 0 else f"has stopped at step {step} with all it trained saved"
        print(f"{run_dir} {what}" + ("" if code == 0 else "; the command that started it resumes"))
        return 0
    print(f"{run_dir} has ended, but not as asked: {STATUS} says {state!r}; its log says more")
    return code if isinstance(code, int) else 1
