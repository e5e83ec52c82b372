"""``nystrom launch status RUN``: what a run does now, from the files of its folder, wherever it runs.

Nothing is asked of the run itself, so this works for one that hangs, is gone, or runs on another machine. On the
machine of its first process the lock tells whether that process lives. From elsewhere the ages of files tell: the
holder of ``run.lock`` moves its time every five seconds, by the clock of the file server.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from launch.rank_logs import LAST_LINES, first_error, newest_launch, newest_slurm_job, rank_logs
from launch.restarts import METRICS, last_lines
from launch.status_text import table, text
from launch.watch import read_status
from pretrain.checkpoint import commit
from pretrain.checkpoint.commit import Manifest
from pretrain.checkpoint.lock import LOCK, Holder, read_holder
from pretrain.finish import STATUS
from pretrain.telemetry.folder import LOGS, STARTS
from pretrain.telemetry.progress import RATE_STEPS

STALE_LOCK_SECONDS = 60.0
"""A lock on another machine that has not moved for so long is of a process that is gone; it moves every 5 s."""
SILENT_SECONDS = 300.0
"""A living run that has written no number for so long is called silent; it writes one every 10 s, or each step."""
BATCH_FILE = "slurm/train.sbatch"
"""Where `nystrom launch slurm` writes it in the run folder, unless asked otherwise."""
SIGNS = ("config.yaml", STATUS, METRICS, LOCK, "checkpoints", LOGS)
"""What makes a folder a run's: any of them."""


@dataclass
class RunStatus:
    """All that is known; None and empty where a file is missing or torn."""

    run: str
    state: str = "unknown"
    """running, starting, silent, waiting, done, preempted, not_saved, bad_steps, stalled, crashed, killed, unknown."""
    what: str = ""
    """One sentence about the state, for people."""
    next: str = ""
    host: str | None = None
    pid: int | None = None
    since: float | None = None
    launch_id: str | None = None
    slurm_job: str | None = None
    code: int | None = None
    step: int | None = None
    steps: int | None = None
    tokens: int | None = None
    total_tokens: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    silent_seconds: float | None = None
    """Since the last file that tells of progress was written."""
    checkpoint: dict[str, Any] | None = None
    """``step``, ``seconds`` (its age) and ``folder`` of the newest whole one, as far as sizes tell."""
    torn: str | None = None
    """What is wrong with a newer folder of a checkpoint."""
    starts: int = 0
    logs: str | None = None
    ranks: int = 0
    """Log files there."""
    first_error: dict[str, Any] | None = None
    disk_free_gib: float | None = None
    notes: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nystrom launch status``."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders; several make a table")
    parser.add_argument("--json", action="store_true", help="a JSON object for each run, one a line")


def run(args: argparse.Namespace) -> int:
    """Print the status of each run; 0 whatever it is. Raises :class:`UserError` where there is no run."""
    several = len(args.runs) > 1
    folders = [path for path in args.runs if not several or path.is_dir() or not path.exists()]
    for path in folders:
        if not path.is_dir():
            raise UserError(f"there is no run folder {path}")
    found = [path for path in folders if any((path / name).exists() for name in SIGNS)]
    if not found:
        raise UserError(f"{', '.join(map(str, args.runs))}: no run folder; one has a config.yaml or a status.json")
    states = [read_run(path) for path in found]
    if args.json:
        for state in states:
            print(json.dumps(asdict(state)))
    else:
        print(table(states) if several else text(states[0]))
    return 0


def read_run(run_dir: Path, now: float | None = None) -> RunStatus:
    """Read a run's folder; ``now`` in seconds since 1970. No file is needed, and none is believed to be whole."""
    now = time.time() if now is None else now
    status, holder = read_status(run_dir), _holder(run_dir)
    found = RunStatus(str(run_dir), code=_number(status.get("code")))
    _read_position(found, run_dir, status)
    _read_checkpoint(found, run_dir, now)
    _read_logs(found, run_dir, status)
    progress = [age for name in (METRICS, STATUS) if (age := _age(run_dir / name, now)) is not None]
    found.silent_seconds = min(progress, default=None)
    if any(age is not None and age < -5 for age in (_age(run_dir / name, now) for name in (LOCK, METRICS, STATUS))):
        found.notes.append("files are from the future: the clocks of this machine and of the file server differ")
    if holder is not None and not _is_gone(found, holder, run_dir, now):
        _judge_living(found, holder, status, now)
    else:
        _judge_ended(found, holder, status, run_dir, now)
    if found.state not in ("running", "silent"):
        found.tokens_per_second = found.seconds_left = None
    if found.state in ("crashed", "killed", "stalled"):
        _read_first_error(found, run_dir)
    return found


# --- the state --------------------------------------------------------------------------------------------------------


def _is_gone(found: RunStatus, holder: Holder, run_dir: Path, now: float) -> bool:
    """Whether the holder of the lock is; sets who it is."""
    found.host, found.pid, found.since = holder.host, holder.pid, holder.since
    ended = holder.has_ended()
    if ended is not None:
        return ended
    age = _age(run_dir / LOCK, now)
    if age is None:
        return True
    found.notes.append(
        f"judged from {socket.gethostname()} by the ages of files: process {holder.pid} is on {holder.host} and cannot "
        f"be looked at from here. Its lock moved {max(0.0, age):.0f} s ago"
    )
    return age > STALE_LOCK_SECONDS


def _judge_living(found: RunStatus, holder: Holder, status: dict[str, Any], now: float) -> None:
    at = f"on {holder.host}, process {holder.pid}"
    written = _real(status.get("time")) or 0.0
    name = status.get("launch_id")
    folder = Path(found.run) / LOGS / str(name)
    if written >= holder.since - 1 and isinstance(name, str) and folder.is_dir():
        # A second job that was submitted meanwhile has a newer folder.
        found.launch_id, found.logs, found.ranks = name, str(folder), len(rank_logs(folder))
    job = re.match(r"slurm-(\d+)-", found.launch_id or "")
    if job:
        at += f", Slurm job {job[1]}"
        if found.slurm_job not in (None, job[1]) and _in_queue(str(found.slurm_job)):
            other = f"Slurm job {found.slurm_job} is of this run too"
            found.notes.append(f"{other}, and cannot train while job {job[1]} does")
        found.slurm_job = job[1]
    # `launch stop` works on the process's machine alone.
    how = f"scancel --batch --signal=TERM {job[1]}" if job else f"nystrom launch stop {found.run}"
    found.next = f"to save and stop: {how}"
    if written < holder.since - 1:
        found.state, found.what = "starting", f"{at}: it is building the model or reading a checkpoint"
        found.code = None
        quiet = now - holder.since
    else:
        found.state, found.what = "running", at
        quiet = found.silent_seconds or 0.0
    if quiet > SILENT_SECONDS:
        found.state = "silent"
        found.what = f"{at}; it has written nothing for {quiet / 60:.0f} min"
        found.next = "look at its logs and its machine; a run that hangs ends by itself after stall_seconds"


def _judge_ended(found: RunStatus, holder: Holder | None, status: dict[str, Any], run_dir: Path, now: float) -> None:
    state = status.get("state")
    again = _again(found, run_dir)
    starting = _newer_launch(found, status, run_dir, now)
    if found.slurm_job and (queued := _in_queue(found.slurm_job)) is not None:
        if queued.startswith("PENDING|"):
            _judge_waiting(found, queued.partition("|")[2])
            return
        if not queued and starting is not None and starting[0] == "starting" and _is_of(found.slurm_job, found):
            starting = "killed", f"Slurm job {found.slurm_job} ended before the run began: see {_slurm_log(found)}"
    said = found.code is not None and (holder is None or (_real(status.get("time")) or 0.0) >= holder.since - 1)
    if holder is not None and not said:
        found.state = "killed"
        found.what = f"process {holder.pid} on {holder.host} is gone without a word; its lock is stale"
        found.next = f"the lock needs no care; {again}"
    elif starting is not None:
        found.state, found.what = starting
        found.code = None  # of the start before
        first = {"crashed": "mend the first error; ", "killed": "look at its log; "}.get(found.state, "")
        found.next = "" if found.state == "starting" else f"{first}{again}"
    elif state == "done":
        found.state, found.what = "done", "its weights are exported"
        found.next = f"nystrom eval validity lm --checkpoint {found.run}"
    elif state in _NEXT:
        found.state = str(state)
        found.what, first = _NEXT[found.state]
        found.next = f"{first}{again}"
    elif state == "running":
        found.state, found.what = "killed", "it says that it runs, but holds no lock: it ended without a word"
        found.next = again
    elif isinstance(state, str):
        found.state = state
        found.next = again
    else:
        found.what = f"no {STATUS} that can be read"
    if found.code is not None and found.state in _NEXT:
        found.what += f" (exit status {found.code})"


_NEXT = {
    "preempted": ("saved and stopped", ""),
    "not_saved": ("the last checkpoint or the export could not be written", "free space; "),
    "bad_steps": (
        "too many steps in a row were not finite",
        "lower optimizer.lr, or look at the batches in bad_steps/ with nystrom replay; ",
    ),
    "stalled": ("a process hung or was lost", "look at the machine that the message names; "),
    "crashed": ("it ended with an error", "mend the first error; "),
    "killed": ("it was killed", ""),
}
"""What a state means, and what to do before the run is resumed."""


def _again(found: RunStatus, run_dir: Path) -> str:
    """How to resume."""
    at = f"from the checkpoint of step {found.checkpoint['step']:,}" if found.checkpoint else "from the beginning"
    script = run_dir / BATCH_FILE
    if (found.launch_id or "").startswith("slurm-") and script.is_file():
        return f"sbatch {script} resumes {at}"
    words = _last_start(run_dir).get("command")
    words = words[1:] if isinstance(words, list) else []
    words = [word for word in map(str, words) if not word.startswith(("--local_rank", "--local-rank"))]
    shown = f" (the one with {' '.join(words)})" if words else ""
    return f"the command that started it{shown} resumes {at}"


def _newer_launch(found: RunStatus, status: dict[str, Any], run_dir: Path, now: float) -> tuple[str, str] | None:
    """The state of a launch whose processes have written logs but not come to ``status.json`` yet, and about it."""
    folder = newest_launch(run_dir)
    if folder is None or folder.name == status.get("launch_id"):
        return None
    ages = [age for path in rank_logs(folder).values() if (age := _age(path, now)) is not None]
    age = min(ages, default=_age(folder, now) or 0.0)
    if age > now - (_real(status.get("time")) or 0.0):
        return None
    if first_error(folder) is not None:
        return "crashed", f"launch {folder.name} failed before it began to train"
    if age > SILENT_SECONDS:
        return "killed", f"launch {folder.name} ended before it began to train, or hangs: its logs are silent"
    return "starting", f"launch {folder.name}: its processes are meeting"


def _in_queue(job: str) -> str | None:
    """STATE|REASON of a job as Slurm has it, "" for one that has ended; None where Slurm is not there or busy."""
    try:
        words = ["squeue", "--noheader", "--jobs", job, "--format", "%T|%r"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return done.stdout.strip()


def _judge_waiting(found: RunStatus, reason: str) -> None:
    """A job that was requeued waits under the same number."""
    meaning = {"BeginTime": " (Slurm waits up to two minutes before it starts a requeued job)"}.get(reason, "")
    found.state, found.what = "waiting", f"in the queue as Slurm job {found.slurm_job}: {reason}{meaning}"
    found.next = f"it starts by itself; to give it up: scancel {found.slurm_job}"


def _is_of(job: str, found: RunStatus) -> bool:
    """Whether the newest launch is of this job."""
    return (found.launch_id or "").startswith(f"slurm-{job}-")


def _slurm_log(found: RunStatus) -> Path:
    return Path(found.run) / LOGS / f"slurm-{found.slurm_job}.log"


# --- the numbers ------------------------------------------------------------------------------------------------------


def _read_position(found: RunStatus, run_dir: Path, status: dict[str, Any]) -> None:
    rows = last_lines(run_dir)
    last = rows[-1] if rows else {}
    here = [body for body in (last, status) if _number(body.get("step")) is not None]
    if here:
        farthest = max(here, key=lambda body: int(body["step"]))
        found.step, found.tokens = _number(farthest["step"]), _number(farthest.get("tokens"))
    found.loss, found.tokens_per_second = _real(last.get("loss")), _real(last.get("tokens_per_second"))
    try:
        from pretrain.config import load_config
        from pretrain.curriculum.plan import build_plan

        plan = build_plan(load_config(str(run_dir / "config.yaml"), []))
        found.steps, found.total_tokens = plan.num_batches, plan.total_tokens
    except (UserError, OSError, ValueError):
        return
    rate = _pace(rows) or found.tokens_per_second
    if rate and found.tokens is not None and found.tokens < found.total_tokens:
        found.seconds_left = (found.total_tokens - found.tokens) / rate


def _pace(rows: Sequence[dict[str, Any]]) -> float | None:
    """Tokens per second by the clock on the wall, validations and checkpoints included, of the last start's steps."""
    points: list[tuple[float, float, int]] = []  # the clock, seconds in the training loop, tokens; the newest first
    for row in reversed(rows):
        at, seconds, tokens = _real(row.get("time")), _real(row.get("seconds")), _number(row.get("tokens"))
        if at is None or seconds is None or tokens is None or rows[-1]["step"] - row["step"] > RATE_STEPS:
            break
        # Between two starts time passes that is not the loop's.
        if points and (points[-1][0] - at) - (points[-1][1] - seconds) > 1:
            break
        points.append((at, seconds, tokens))
    if len(points) < 2 or points[0][0] <= points[-1][0]:
        return None
    return (points[0][2] - points[-1][2]) / (points[0][0] - points[-1][0])


def _read_checkpoint(found: RunStatus, run_dir: Path, now: float) -> None:
    try:
        for folder, manifest in commit.candidates(run_dir / "checkpoints"):
            if isinstance(manifest, Manifest):
                age = max(0.0, now - manifest.created)
                found.checkpoint = {"step": manifest.state.step, "seconds": age, "folder": str(folder)}
                return
            found.torn = found.torn or f"{folder.name}: {manifest}"
    except OSError as error:
        found.notes.append(f"the checkpoints cannot be read: {error.strerror or error}")


def _read_logs(found: RunStatus, run_dir: Path, status: dict[str, Any]) -> None:
    folder = newest_launch(run_dir)
    name = status.get("launch_id")
    found.launch_id = folder.name if folder is not None else name if isinstance(name, str) else None
    if folder is not None:
        found.logs, found.ranks = str(folder), len(rank_logs(folder))
    found.slurm_job = newest_slurm_job(run_dir, found.launch_id)
    try:
        with open(run_dir / STARTS, "rb") as stream:
            found.starts = sum(1 for _ in stream)
    except OSError:
        pass
    try:
        found.disk_free_gib = round(shutil.disk_usage(run_dir).free / 2**30, 1)
    except OSError as error:
        found.notes.append(f"the file system does not say how much is free: {error.strerror or error}")


def _read_first_error(found: RunStatus, run_dir: Path) -> None:
    folder = newest_launch(run_dir)
    error = first_error(folder) if folder is not None else None
    if error is not None:
        found.first_error = {"rank": error.rank, "file": str(error.path), "lines": error.lines[:LAST_LINES]}


def _last_start(run_dir: Path) -> dict[str, Any]:
    try:
        lines = (run_dir / STARTS).read_bytes().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            return row
    return {}


def _holder(run_dir: Path) -> Holder | None:
    try:
        return read_holder(run_dir / LOCK)
    except OSError:
        return None


def _age(path: Path, now: float) -> float | None:
    """Seconds since a file was written; below 0 where the file server's clock is ahead."""
    try:
        return now - path.stat().st_mtime
    except OSError:
        return None


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _real(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
