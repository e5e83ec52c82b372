"""Submitting the files of ``nystrom launch slurm``: all checks first, then all jobs or none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from data_pipeline.errors import UserError
from launch.plan import LaunchPlan, Rendered
from launch.rank_logs import LOGS, SLURM_JOB, newest_slurm_job

JOB = "JOB"
DEPENDENCY = (f"--dependency=afterok:{JOB}", "--kill-on-invalid-dep=yes")
"""afterok also waits for a job that is requeued. Without the second an evaluation of a failed run waits for ever."""
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm", "/run")
LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "f2fs"}
REASON_SECONDS = 5.0
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
"""Variables of Slurm that sbatch may have. Those of a job from within which this is called would change the new one."""
BLOCKED = re.compile(
    r"Partition\w+|BadConstraints|JobHeld\w+|Invalid(Account|QOS)|(Account|QOS)NotAllowed|DependencyNeverSatisfied"
    r"|(QOS|Assoc)Max\w*PerJob\w*|ReqNodeNotAvail.*|NodeDown"
)
"""Reasons to wait that waiting does not end, unless an administrator or the user changes something."""


def submit(
    plan: LaunchPlan,
    rendered: Rendered,
    config: str,
    overrides: Sequence[str],
    shared: Sequence[str],
    skip_test: bool,
) -> int:
    """Submit all jobs of ``rendered``, or none; returns 0.

    Raises :class:`UserError` where Slurm's commands are missing, a folder is this machine's alone, or Slurm refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not found: give this command where Slurm is installed, or print the file: --dry-run")
    waits = any("\n#SBATCH --dependency=" in text for text in rendered.files.values())
    for warning in check_folders(plan, config, overrides, shared, waits):
        print(f"nystrom launch: warning: {warning}", file=sys.stderr)
    env = slurm_environment(rendered.exports)
    logs = plan.directory / plan.run_dir / LOGS
    earlier = None if waits else _earlier_job(logs.parent, env)
    if earlier is not None:
        print(
            f"nystrom launch: warning: job {earlier} of this run is in Slurm's queue. One job trains at a time, and a "
            "second one that starts meanwhile ends with status 2. To have it wait: --sbatch=--dependency=singleton",
            file=sys.stderr,
        )
    for path, text in rendered.files.items():
        refusal = None if skip_test else would_be_refused(text, env)
        if refusal is not None:
            raise UserError(f"Slurm refuses {path.name}: {refusal}. Nothing was submitted{_hint(refusal)}")
    try:
        logs.mkdir(parents=True, exist_ok=True)  # where it is missing, a job fails without a word
        for path, text in rendered.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    jobs: list[str] = []
    for words, _ in rendered.commands:
        done = _call([word.replace(JOB, jobs[0]) if jobs and JOB in word else word for word in words], env)
        if done.returncode:
            if jobs:
                _call(["scancel", *jobs], env)
            raise UserError(
                f"Slurm refuses {Path(words[-1]).name}: {_message(done)}. "
                + ("The run's job was cancelled again" if jobs else "Nothing was submitted")
            )
        jobs.append(done.stdout.strip().split(";")[0])
    (logs / SLURM_JOB).write_text(f"{jobs[0]}\n", encoding="utf-8")
    _tell(plan, rendered, jobs, logs, env)
    return 0


def _earlier_job(run_dir: Path, env: Mapping[str, str]) -> str | None:
    """The newest job of this run, if it has not ended."""
    job = newest_slurm_job(run_dir)
    if job is None:
        return None
    done = _call(["squeue", "--noheader", f"--job={job}", "--states=PENDING,RUNNING,SUSPENDED", "--format=%T"], env)
    return job if done.returncode == 0 and done.stdout.strip() else None


def check_folders(
    plan: LaunchPlan, config: str, overrides: Sequence[str], shared: Sequence[str], waits: bool = False
) -> list[str]:
    """Warnings about folders that other nodes may not see.

    Raises :class:`UserError` for shards that are not there, and for folders that are certainly local. ``shared`` names
    folders that all nodes see. ``waits``: the run waits for another job, which may be about to make the shards.
    """
    from data_pipeline.shards.manifest import read_manifest
    from pretrain.config import load_config

    data = load_config(config, overrides).data
    shards = [Path(source.path) for source in data.sources] + ([Path(data.valid)] if data.valid else [])
    for folder in [] if waits else shards:
        read_manifest(folder)
    known = [Path(each).resolve() for each in shared]
    local = []
    for name, folder in [("the run folder", plan.run_dir), *(("the shard folder", each) for each in shards)]:
        place = (plan.directory / folder).resolve()
        if any(place.is_relative_to(each) for each in known):
            continue
        if any(place.is_relative_to(each) for each in TEMPORARY):
            raise UserError(
                f"{name} {place} is in a folder that each node has for itself: put it on a file system that all nodes "
                "see. If they do see it, name it in cluster.yaml (shared: [FOLDER])"
            )
        kind = file_system(place)
        if kind in LOCAL_FILE_SYSTEMS:
            local.append(f"{name} {place} is on a disk of this machine ({kind}): do all nodes see it? (shared: [...])")
    return local


def file_system(path: Path) -> str:
    """The type of the file system that ``path`` is on, as the kernel calls it; "" if that cannot be told."""
    mounts = [each for each in psutil.disk_partitions(all=True) if path.is_relative_to(each.mountpoint)]
    return max(mounts, key=lambda each: len(each.mountpoint)).fstype if mounts else ""


def slurm_environment(exports: Mapping[str, str]) -> dict[str, str]:
    """The environment of sbatch: ours without the variables of a job that this may run in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in KEPT}
    return {**kept, **exports}


def would_be_refused(text: str, env: Mapping[str, str]) -> str | None:
    """What ``sbatch --test-only`` says against a batch file; None if it could start at some time."""
    done = _call(["sbatch", "--test-only"], env, text)
    return _message(done) if done.returncode else None


def _hint(refusal: str) -> str:
    if "generic resource" in refusal:
        return ": --gpus-per-node asks for GPUs that no node has (sinfo --format '%P %N %G' shows what they have)"
    if "node configuration" in refusal or "not available" in refusal:
        return (
            ": there are not so many nodes with these cores, GPUs and memory (sinfo --format '%P %D %c %G %m'), or "
            "they are down or drained (sinfo -R says why). To queue it until they are back: --skip-test"
        )
    return ""


def _tell(plan: LaunchPlan, rendered: Rendered, jobs: Sequence[str], logs: Path, env: Mapping[str, str]) -> None:
    job = jobs[0]
    nodes = str(plan.nodes) if plan.nodes == plan.max_nodes else f"{plan.nodes} to {plan.max_nodes}"
    print(f"submitted job {job}: {plan.name}, nodes: {nodes}, processes of each: {plan.processes}")
    for path in rendered.files:
        print(f"  file:   {path}")
    print(f"  log:    {logs}/slurm-{job}.log, and one for each rank below {logs}")
    print(f"  watch:  nystrom launch status {plan.run_dir}; squeue --job {job}")
    print(f"  stop:   scancel --batch --signal=TERM {job} (saves; scancel {job} leaves KillWait seconds for that)")
    if len(jobs) > 1:
        print(f"  then:   job {jobs[1]} evaluates it, if it ends with status 0")
    state, reason = state_of(job, env)
    if state == "PENDING":
        print(f"  waits:  {reason or 'no reason yet'}; when it may start: squeue --start --job {job}")
        if BLOCKED.fullmatch(reason):
            print(
                f"nystrom launch: warning: job {job} does not start by waiting: Slurm says {reason}. Look at the "
                f"limits of the partition (scontrol show partition), and cancel it with: scancel {' '.join(jobs)}",
                file=sys.stderr,
            )


def state_of(job: str, env: Mapping[str, str]) -> tuple[str, str]:
    """State and reason of a job, as squeue has them; waits some seconds for Slurm to look at it."""
    deadline = time.monotonic() + REASON_SECONDS
    while True:
        done = _call(["squeue", "--noheader", f"--job={job}", "--format=%T %r"], env)
        state, _, reason = done.stdout.strip().partition(" ")
        if done.returncode or state != "PENDING" or reason not in ("", "None") or time.monotonic() > deadline:
            return state, "" if reason == "None" else reason
        time.sleep(0.2)


def _call(words: Sequence[str], env: Mapping[str, str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, env=dict(env), input=text, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"{words[0]} cannot be run: {error.strerror}") from None


def _message(done: subprocess.CompletedProcess[str]) -> str:
    """What a command of Slurm complained about, on one line."""
    lines = [re.sub(r"^(sbatch: )?(error: )?", "", line) for line in done.stderr.strip().splitlines()]
    return "; ".join(line.rstrip(".") for line in lines if line) or f"sbatch ended with status {done.returncode}"
