"""How a start of a run ends: its status, which is all that a launcher trusts, and the weights for use."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pretrain.checkpoint import commit
from pretrain.checkpoint.commit import Manifest, TrainState, tag_name
from pretrain.distributed import watchdog
from pretrain.distributed.immediate_exit import ImmediateExit
from pretrain.distributed.signals import (
    EXIT_BAD_STEPS,
    EXIT_DONE,
    EXIT_NOT_SAVED,
    EXIT_PREEMPTED,
    EXIT_STALLED,
    StopFlag,
)
from pretrain.telemetry.lines import print_line, write_or_warn

STATUS = "status.json"
LAUNCH_ID = "NYSTROM_LAUNCH_ID"
"""Environment variable by which a launcher recognises the status that its own start left behind."""
STATES = {
    EXIT_DONE: "done",
    EXIT_NOT_SAVED: "not_saved",
    EXIT_PREEMPTED: "preempted",
    EXIT_BAD_STEPS: "bad_steps",
    EXIT_STALLED: "stalled",
}


def write_status(run_dir: Path, code: int | None, state: TrainState, unfinished: str = "running") -> None:
    """Write ``status.json``: how this start ended, or with code None that it is ``unfinished``: running, or crashed.

    A launcher trusts no other code, and puts its own in the place of none.
    """
    body = {
        "state": unfinished if code is None else STATES[code],
        "code": code,
        "step": state.step,
        "tokens": state.tokens,
        "launch_id": os.environ.get(LAUNCH_ID),
        "pid": os.getpid(),
        "time": time.time(),
    }
    write_or_warn(run_dir / STATUS, (json.dumps(body, indent=2) + "\n").encode())


def is_finished(run_dir: Path, manifest: Manifest, total_tokens: int) -> bool:
    """Whether this checkpoint is the run's last one, and its weights are exported."""
    from pretrain.checkpoint.load import read_info  # imports what a launcher needs nothing of

    infos = [read_info(run_dir / name) for name in _exports(manifest)]
    return manifest.state.tokens >= total_tokens and all(
        info is not None and info["step"] == manifest.state.step for info in infos
    )


def _exports(manifest: Manifest) -> dict[str, str]:
    """Folders that a run leaves behind, and the state of the checkpoint that each one holds."""
    # As the checkpoint was written, which may be with another configuration than now.
    averaged = manifest.identity["config"]["optimizer"].get("ema_decay") is not None
    return {"export": "fp32", "export-ema": "ema"} if averaged else {"export": "fp32"}


def _set_stale_average_aside(run_dir: Path, exports: Iterable[str]) -> str | None:
    """Rename an ``export-ema/`` of an earlier step, if the run keeps no average any more; returns a line about it."""
    from pretrain.checkpoint.load import read_info

    stale = run_dir / "export-ema"
    info = read_info(stale)
    if stale.name in exports or info is None:
        return None
    aside = run_dir / f"{stale.name}.{tag_name(info['step'])}"
    if aside.exists():
        return f"{stale} is of step {info['step']}: the run keeps no average of its weights any more."
    stale.rename(aside)
    return f"The run keeps no average of its weights any more: the one of step {info['step']} is now {aside}."


def report_preempted(run_dir: Path, state: TrainState, when: str) -> None:
    """The last words of a process that was asked to stop where there is nothing to save."""
    print_line(f"stopped while {when}; the same command resumes")
    write_status(run_dir, EXIT_PREEMPTED, state)


def export_weights(
    checkpoints: Path,
    run_dir: Path,
    world: Any,
    telemetry: Any,
    stop: StopFlag,
    state: TrainState,
    before_exit: Callable[[], None] = lambda: None,
) -> int:
    """Write ``export/`` (and ``export-ema/``) from the last checkpoint; the first process does, the others wait.

    Returns an exit status. The checkpoint is there whatever happens, so a request to stop ends the export at once,
    after ``before_exit()``: the same command makes it.
    """
    watchdog.at("exporting the weights")

    def report() -> None:
        report_preempted(run_dir, state, "exporting the weights")
        before_exit()

    code = EXIT_DONE
    if world.sum([float(stop())])[0]:
        code = EXIT_PREEMPTED
        telemetry.say("stopped before the export; the same command resumes")
    elif world.is_first:
        try:
            with ImmediateExit(stop, report):
                found = commit.newest(checkpoints)
                assert found is not None  # the trainer saved it
                from pretrain.checkpoint.export import export

                for name, kind in _exports(found[1]).items():
                    digest = export(found[0], run_dir / name, kind)
                    what = "Weights for use" if kind == "fp32" else "Their running average"
                    telemetry.say(f"Done. {what}: {run_dir / name} (hash {digest[:12]}).")
                telemetry.say(_set_stale_average_aside(run_dir, _exports(found[1])))
        except OSError as error:
            code = EXIT_NOT_SAVED
            telemetry.say(
                f"the run is finished and its last checkpoint saved, but the export is NOT written: {error}. Free "
                "space, then run the same command: it only exports."
            )
    return world.broadcast(code)
