"""The text of the batch files that ``nystrom launch slurm`` submits: training, and the evaluation after it.

What Slurm does was tried on 22.05 (`tests/launch/test_slurm_real.py` holds most of it):

- SIGTERM to ``srun`` kills the processes at once ("forcing job termination"); SIGUSR1 is passed on to them.
- ``scontrol requeue`` from within also revives a job that was cancelled. While Slurm ends a job by itself, the job's
  state is COMPLETING and not RUNNING.
- Preemption with a partition's GraceTime sends SIGTERM to the steps and nothing to the script.
- ``--kill-on-bad-exit`` kills the other nodes' processes as soon as one node's has ended, in the middle of a save.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.batch_file import batch_file, change_directory
from launch.plan import SECRETS, LaunchPlan

if TYPE_CHECKING:
    from launch.cluster import ContainerConfig

FIRST_PORT, PORTS = 20_000, 10_000
"""The processes meet at port 20000 + job id modulo 10000: below the ports that Linux gives out by itself (32768)."""
MARGIN_SECONDS = 30
"""Between the last moment at which processes are killed that do not save in time, and the end of the job."""
EARLY_SECONDS = 60
"""How much earlier than asked for Slurm may send the signal of ``--signal``, by its documentation."""
PAUSE_SECONDS = 5
ATTEMPTS_WITHOUT_PROGRESS = 2
WIDTH = 110
VARIABLES = ("$SLURM_NNODES", "$master", "$port", "$launch")


def grace_seconds(stop_timeout: float) -> int:
    """How long before a job's end its script is signalled."""
    return math.ceil(stop_timeout) + MARGIN_SECONDS


@dataclass(frozen=True)
class Script:
    """What both files have in common."""

    directory: Path
    environment: Mapping[str, str]
    setup: Sequence[str]
    container: ContainerConfig
    mounts: Sequence[str]
    gpus: bool
    cpus_per_task: int | None

    def head(self) -> list[str]:
        """The lines before anything runs; secrets are not written down."""
        lines = [
            "ulimit -S -c 0  # core dumps of all ranks would fill a shared disk",
            "set -e",
            change_directory(self.directory),
        ]
        for name, value in self.environment.items():
            lines.append(
                f"# {name} comes from the environment of whoever submits this file."
                if SECRETS.search(name)
                else f"export {name}={shlex.quote(value)}"
            )
        return [*lines, *self.setup, "set +e"]

    def srun(self, options: Sequence[str]) -> tuple[list[str], list[str]]:
        """The words of srun, and of what starts the container behind it."""
        words = ["srun", *options, "--ntasks-per-node=1", "--export=ALL", "--cpu-bind=none"]
        # Since 22.05 a step does not take over the job's --cpus-per-task: it would get one core.
        words += [] if self.cpus_per_task is None else [f"--cpus-per-task={self.cpus_per_task}"]
        image = self.container.image
        if image is None:
            return words, []
        if self.container.runtime == "apptainer":
            binds = [word for mount in self.mounts for word in ("--bind", mount)]
            nv = ["--nv"] if self.gpus else []
            return words, ["apptainer", "exec", *nv, *binds, "--pwd", str(self.directory), image]
        mounts = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in self.mounts)
        words += [f"--container-image={image}", f"--container-mounts={mounts}"]
        return [*words, f"--container-workdir={self.directory}"], []


TRAIN = """\
# Submit this file again at any time: the run resumes from its newest checkpoint. Exit status, as sacct shows it:
# 0 done, 2 a mistake, 74 could not save, 75 saved and stopped, 76 bad steps, 77 a process hung or was lost.
@HEAD@

run=@RUN@
file=@FILE@
requeue=@REQUEUE@
max_restarts=@MAX_RESTARTS@
say() { echo "nystrom launch: $*" >&2; }
newest() { cat "$run/checkpoints/latest" 2> /dev/null; }
field() { scontrol show job "$SLURM_JOB_ID" --oneliner | tr ' ' '\\n' | sed -n "s/^$1=//p" | sed -n 1p; }
addresses() { scontrol show node "$1" --oneliner | tr ' ' '\\n' | sed -n 's/^NodeAddr=//p' | sort -u; }
@PROGRAM@
# The processes meet at the first node of the allocation. If its name means nothing here, Slurm knows its address.
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
getent hosts "$master" > /dev/null || master=$(addresses "$master" | sed -n 1p)
case "$master" in
    "") say "Slurm did not tell the first node of $SLURM_JOB_NODELIST"; exit 2 ;;
    localhost | 127.* | ::1)
        if [ "$SLURM_NNODES" -gt 1 ] && [ "$(addresses "$SLURM_JOB_NODELIST" | wc -l)" -gt 1 ]; then
            say "the first node's address is $master, where the others cannot reach it: its NodeAddr must be real"
            exit 2
        fi ;;
esac
port=$((@FIRST_PORT@ + SLURM_JOB_ID % @PORTS@))

# Slurm signals this script @GRACE@ s before the time limit, or up to @EARLY@ s earlier. So does
# `scancel --batch --signal=TERM JOB`. It is passed on once, as SIGUSR1: SIGTERM would have srun kill the processes.
stopping=0 step=
stop() {
    trap : TERM USR1
    stopping=1
    [ -z "$step" ] || kill -USR1 "$step"
}
trap stop TERM USR1

at_start=$(newest) attempt=0 idle=0
while :; do
    before=$(newest)
    launch=slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$attempt
    say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, meeting at $master:$port; logs of each rank in $run/logs/$launch"
@SRUN@ &
    step=$!
    [ $stopping = 0 ] || kill -USR1 "$step" # it came while the step was started
    while kill -0 "$step" 2> /dev/null; do wait "$step"; done
    wait "$step"
    code=$? step=
    # Killed by the signal before they listened: nothing was trained that is not saved.
    if [ $stopping = 1 ]; then case $code in 138 | 143) code=75 ;; esac; fi
    case $code in 0 | 2 | 74 | 75 | 76) break ;; esac
    if [ $stopping = 1 ] || [ $attempt -ge $max_restarts ]; then break; fi
    if [ "$(newest)" = "$before" ]; then idle=$((idle + 1)); else idle=0; fi
    if [ $idle -ge @IDLE@ ]; then
        say "status $code; @IDLE@ attempts in a row made no checkpoint, so there is no other"
        break
    fi
    attempt=$((attempt + 1))
    say "status $code; restart $attempt of $max_restarts in @PAUSE@ s, from checkpoint '$(newest)'"
    sleep @PAUSE@ &
    wait $!
    if [ $stopping = 1 ]; then code=75; break; fi
done
trap : TERM USR1

if [ $code = 75 ] && [ $requeue = 0 ]; then
    say "saved; to resume: sbatch $file (with --requeue Slurm would do that)"
elif [ $code = 75 ]; then
    preempted=$(field PreemptTime)
    left=$(($(date -d "$(field EndTime)" +%s 2> /dev/null || echo 9999999999) - $(date +%s)))
    why=
    if [ "$(field JobState)" != RUNNING ]; then
        # Requeueing now would revive a job that its user cancelled.
        say "Slurm ends this job itself: it requeues a preempted job, or one that lost a node, and no cancelled one"
    elif [ -n "$preempted" ] && [ "$preempted" != None ]; then
        why="it is preempted"
    elif [ $stopping = 0 ] || [ $left -gt @NEAR_END@ ]; then
        say "stopped because somebody asked for it, so it is not requeued; to resume: sbatch $file"
    elif [ "$(newest)" = "$at_start" ]; then
        say "the time limit is over before a checkpoint was made: not requeued, for the next time would be the same"
    else
        why="its time is over"
    fi
    if [ -n "$why" ]; then
        say "saved; $why, so the job is requeued"
        scontrol requeue "$SLURM_JOB_ID" || say "Slurm refused to requeue; to resume: sbatch $file"
    fi
fi
exit $code
"""

EVAL = """\
# Runs after the training job has ended with status 0.
@HEAD@

say() { echo "nystrom launch: $*" >&2; }
@PROGRAM@
status=0
@COMMANDS@
exit $status
"""


def train_file(options: Sequence[str], plan: LaunchPlan, script: Script, requeue: bool, path: Path) -> str:
    """The batch file of a training run, to be written to ``path``; ``options`` are those of its ``#SBATCH`` lines."""
    grace = grace_seconds(plan.stop_timeout)
    # Each node's part ends by itself, also when another one is lost. The first node's ends last: it writes the export.
    step = ["--nodes=$SLURM_NNODES", "--ntasks=$SLURM_NNODES", "--kill-on-bad-exit=0", "--wait=0"]
    srun, container = script.srun(step)
    node = plan.node_command("$SLURM_NNODES", "SLURM_NODEID", "$master", "$port", "$launch")
    split = node.index("--")
    words = [*map(_quoted, [*srun, *container, *node[:split]]), *map(shlex.quote, node[split:])]
    return _filled(
        TRAIN,
        options,
        script,
        plan,
        RUN=shlex.quote(str(plan.run_dir)),
        FILE=shlex.quote(str(path)),  # Slurm runs a copy of it
        REQUEUE=str(int(requeue)),
        MAX_RESTARTS=str(plan.max_restarts),
        FIRST_PORT=str(FIRST_PORT),
        PORTS=str(PORTS),
        GRACE=str(grace),
        EARLY=str(EARLY_SECONDS),
        NEAR_END=str(grace + EARLY_SECONDS),
        SRUN=_wrapped(words, "    "),
        IDLE=str(ATTEMPTS_WITHOUT_PROGRESS),
        PAUSE=str(PAUSE_SECONDS),
    )


def eval_file(options: Sequence[str], plan: LaunchPlan, script: Script, commands: Sequence[Sequence[str]]) -> str:
    """The batch file of an evaluation on one node; ``commands`` are the arguments of ``nystrom eval``."""
    srun, container = script.srun(["--nodes=1", "--ntasks=1"])
    start = [*srun, *container, *plan.program, "local", "--nproc", str(plan.processes), "--", "eval"]
    lines = [
        _wrapped(
            [
                shlex.quote(word)
                for word in [
                    *start,
                    *words,
                ]
            ]
        )
        + " || status=$?"
        for words in commands
    ]
    return _filled(EVAL, options, script, plan, COMMANDS="\n".join(lines))


def _filled(template: str, options: Sequence[str], script: Script, plan: LaunchPlan, **values: str) -> str:
    program = plan.program[0]
    check = (
        f"if ! command -v {shlex.quote(program)} > /dev/null; then\n"
        f"    say {shlex.quote(program + ' is not found on this node: see the setup lines of this file')}\n"
        "    exit 2\nfi"
    )
    values |= {"HEAD": "\n".join(script.head()), "PROGRAM": check if script.container.image is None else ""}
    text = re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], template)
    return batch_file(options, text.rstrip("\n").split("\n"))


def _quoted(word: str) -> str:
    """A word for the shell, with our own variables left to it."""
    ours = word.endswith(VARIABLES) and word.startswith(("$", "--n"))
    return f'"{word}"' if ours else shlex.quote(word)


def _wrapped(words: Sequence[str], indent: str = "") -> str:
    """A command over several lines."""
    lines = [indent + words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) > WIDTH:
            lines.append(f"{indent}    {word}")
        else:
            lines[-1] += f" {word}"
    return " \\\n".join(lines)
