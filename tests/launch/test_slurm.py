"""`nystrom launch slurm` without Slurm: the text of its files, what they do with stand-ins, and what is refused."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_case import settings, write_config, write_corpus

from data_pipeline.errors import run_cli
from launch.cli import main

EXPECTED = Path(__file__).parent / "slurm_files.txt"
"""What --dry-run shows. After a change that is meant: copy the text that the test prints."""

# Ends with the next status of $STATUSES at once; with "wait" it waits for SIGUSR1 and ends with 75 then.
SRUN = """
import os, signal, sys
from pathlib import Path
folder = Path(os.environ["STAND_IN"])
with open(folder / "calls", "a") as f:
    print(*sys.argv, file=f)
statuses = folder / "statuses"
first, *rest = statuses.read_text().split()
statuses.write_text(" ".join(rest))
if os.environ.get("CHECKPOINT"):
    (Path(os.environ["CHECKPOINT"]) / "latest").write_text(first + str(len(rest)))
if first == "wait":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    (folder / "ready").write_text("")
    signal.sigwait([signal.SIGUSR1])
    os._exit(75)
os._exit(int(first))
"""
SCONTROL = """
import os, sys
from pathlib import Path
folder = Path(os.environ["STAND_IN"])
with open(folder / "calls", "a") as f:
    print("scontrol", *sys.argv[1:], file=f)
if sys.argv[1:3] == ["show", "hostnames"]:
    print("n0\\nn1")
if sys.argv[1:3] == ["show", "job"]:
    print((folder / "job").read_text())
if sys.argv[1:3] == ["show", "node"]:
    lines = os.environ["NODES"].splitlines()
    print("\\n".join(lines[:1] if sys.argv[3] == "n0" else lines))
"""
SBATCH = """
import json, os, sys
from pathlib import Path
record = Path(os.environ["STAND_IN"]) / "calls"
test = "--test-only" in sys.argv
text = sys.stdin.read() if test else Path(sys.argv[-1]).read_text()
refused = os.environ.get("REFUSED")
with open(record, "a") as f:
    print("sbatch", *sys.argv[1:], file=f)
if refused and refused in (text if test else sys.argv[-1]):
    sys.exit("sbatch: error: Batch job submission failed: no such thing")
print("7;cluster")
"""
SQUEUE = "print('PENDING PartitionTimeLimit')"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run, and stand-ins for Slurm's commands on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    sources = {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCONTROL}
    for name, source in sources.items():
        (programs / name).write_text(f"#!{sys.executable} -S\n{source}".replace('"scontrol"', f'"{name}"'))
    for name in ("getent", "sleep", "nystrom"):
        (programs / name).write_text("#!/bin/sh\nexit 0\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "NCCL_", "GLOO_", "OMP_", "HF_", "WANDB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.setattr("launch.plan.CROSSING", ("WANDB_", "NCCL_", "GLOO_"))
    directory = tmp_path / "work"
    directory.mkdir()
    write_config(directory / "run.yaml", settings(directory, Path("runs"), data={"train": "train"}))
    monkeypatch.chdir(directory)
    return directory


def launch(*words: str) -> int:
    return run_cli(main, "nystrom launch", ["slurm", "--config", "run.yaml", *words])


def calls(place: Path) -> list[str]:
    record = place.parent / "calls"
    return record.read_text().splitlines() if record.exists() else []


CLUSTER = """\
partition: gpu
account: lab
time: "24:00:00"
gpus_per_node: 8
cpus_per_task: 96
exclusive: true
sbatch: [--qos=long]
setup: [module load cuda, source venv/bin/activate]
env: {NCCL_DEBUG: WARN, WANDB_API_KEY: do-not-write-me}
interface: ib0
"""


def test_the_files_are_these(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "cluster.yaml").write_text(CLUSTER)
    words = ["--cluster", "cluster.yaml", "--nodes", "2-4", "--time", "12:00:00", "--requeue", "--max-restarts", "3"]
    words += ["--set", "seed=5", "--eval", "lm", "validity", "classify --train a.csv --test b.csv", "--dry-run"]
    assert launch(*words) == 0
    shown = capsys.readouterr().out.replace(str(place), "/shared/me")
    assert shown == EXPECTED.read_text(), shown
    assert not (place / "runs").exists()
    assert calls(place) == []


def test_containers_are_started_by_pyxis_or_apptainer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpus-per-node", "a100:2", "--container", "image.sqsh", "--mount", "/data:/data:ro", "--dry-run"]
    assert launch(*words) == 0
    shown = capsys.readouterr().out.replace("\\\n        ", "")
    assert f"--container-image=image.sqsh --container-mounts={place}:{place},/data:/data:ro" in shown
    assert f"--container-workdir={place} nystrom launch node" in shown
    assert "#SBATCH --gpus-per-node=a100:2" in shown
    assert "--nproc 2" in shown
    assert launch(*words, "--container-runtime", "apptainer") == 0
    shown = capsys.readouterr().out.replace("\\\n        ", "")
    assert f"apptainer exec --nv --bind {place} --bind /data:/data:ro --pwd {place} image.sqsh nystrom launch" in shown
    assert "--container" not in shown


@pytest.fixture
def job(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, list[str]]]:
    """Runs the batch file as a job would; returns its status, what it said, and the calls of Slurm's commands."""

    def run(
        statuses: str,
        *words: str,
        requeue: bool = True,
        state: str = "RUNNING",
        preempted: str = "None",
        left: int = 3600,
        signalled: bool = False,
        checkpoint: bool = True,
        **env: str,
    ) -> tuple[int, str, list[str]]:
        assert launch("--nodes", "2", "--setup", ":", *(["--requeue"] if requeue else []), *words, "--dry-run") == 0
        text = capsys.readouterr().out
        end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + left))
        (place.parent / "job").write_text(f"JobId=7 JobState={state} EndTime={end} PreemptTime={preempted}")
        (place.parent / "statuses").write_text(statuses)
        # Each batch file ends with an exit: the shell does not come to the commands behind it.
        checkpoints = place / "runs" / "run" / "checkpoints"
        checkpoints.mkdir(parents=True)
        variables = {"SLURM_JOB_ID": "40007", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[0-1]", **env}
        process = subprocess.Popen(
            ["bash", "-c", text],
            env={**os.environ, "CHECKPOINT": str(checkpoints) if checkpoint else "", **variables},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        if signalled:
            while not (place.parent / "ready").exists() and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[1]
        assert "Traceback" not in said, said
        return process.returncode, said, calls(place)

    return run


Job = Callable[..., tuple[int, str, list[str]]]
REQUEUED = "scontrol requeue 40007"


def test_each_node_gets_one_task_that_meets_the_others_at_the_first(job: Job) -> None:
    code, said, called = job("0", "--nproc", "3")
    assert code == 0
    assert "job 40007 on n[0-1], meeting at n0:20007; logs of each rank in runs/run/logs/slurm-40007-0-0" in said
    (srun,) = [call for call in called if "srun" in call]
    assert "--nodes=2 --ntasks=2 --kill-on-bad-exit=0" in srun
    assert "nystrom launch node --nodes 2 --node-rank SLURM_NODEID --nproc 3 --master-addr n0" in srun
    assert srun.endswith("--launch-id slurm-40007-0-0 --stop-timeout 120 -- --config run.yaml --resume auto")
    assert REQUEUED not in called


@pytest.mark.parametrize(
    ("what", "requeued", "words"),
    [
        ({"left": 200, "signalled": True}, True, "its time is over"),
        ({"preempted": "2026-01-01T00:00:00"}, True, "it is preempted"),
        ({"left": 9000, "signalled": True}, False, "somebody asked for it"),
        ({"left": 100}, False, "somebody asked for it"),
        ({"state": "COMPLETING", "preempted": "2026-01-01T00:00:00"}, False, "Slurm ends this job itself"),
        ({"left": 200, "signalled": True, "checkpoint": False}, False, "before a checkpoint was made"),
        ({"left": 200, "signalled": True, "requeue": False}, False, "saved; to resume: sbatch "),
    ],
)
def test_it_requeues_itself_where_slurm_stopped_it(job: Job, what: dict[str, Any], requeued: bool, words: str) -> None:
    code, said, called = job("wait" if what.get("signalled") else "75", **what)
    assert code == 75
    assert (REQUEUED in called) is requeued
    assert words in said


@pytest.mark.parametrize("status", [0, 2, 74, 76])
def test_an_end_is_an_end(job: Job, status: int) -> None:
    code, _, called = job(f"{status} 0", "--max-restarts", "3")
    assert code == status
    assert len([call for call in called if "srun" in call]) == 1
    assert REQUEUED not in called


def test_a_crash_is_started_again_while_it_gets_on(job: Job) -> None:
    code, said, called = job("77 1 0", "--max-restarts", "2")
    assert code == 0
    starts = [call.split("--launch-id ")[1].split()[0] for call in called if "srun" in call]
    assert starts == ["slurm-40007-0-0", "slurm-40007-0-1", "slurm-40007-0-2"]
    assert "status 77; restart 1 of 2" in said


def test_restarts_end(job: Job) -> None:
    code, _, called = job("1 1 0", "--max-restarts", "1")
    assert (code, len([call for call in called if "srun" in call])) == (1, 2)


def test_a_crash_that_gets_no_further_is_left(job: Job) -> None:
    code, said, called = job("1 1 1 0", "--max-restarts", "5", checkpoint=False)
    assert (code, len([call for call in called if "srun" in call])) == (1, 2)
    assert "2 attempts in a row made no checkpoint" in said


def test_the_first_node_is_not_silently_localhost(place: Path, job: Job) -> None:
    (place.parent / "bin" / "getent").write_text("#!/bin/sh\nexit 2\n")
    code, said, called = job("0", NODES="NodeAddr=127.0.0.1 x\nNodeAddr=10.0.0.2 x")
    assert "meeting at" not in said
    assert not [call for call in called if "srun" in call]
    assert code == 2
    assert "the first node's address is 127.0.0.1" in said


def test_setup_that_fails_ends_the_job(job: Job) -> None:
    code, _, called = job("0", "--setup", "false")
    assert (code, called) == (1, [])


def test_a_program_that_is_not_there_is_named(place: Path, job: Job) -> None:
    (place.parent / "bin" / "nystrom").unlink()
    hidden = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nystrom").exists())
    code, said, _ = job("0", PATH=hidden)
    assert code == 2
    assert "nystrom is not found on this node" in said


@pytest.fixture
def shared(place: Path) -> list[str]:
    """Shards, and the words that say that their place is shared."""
    write_corpus(place)
    (place / "cluster.yaml").write_text(f"shared: [{place}]\n")
    return ["--cluster", "cluster.yaml", "--time", "1:00:00"]


def test_jobs_are_submitted_and_told(place: Path, shared: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(*shared, "--eval", "validity") == 0
    folder = place / "runs" / "run" / "slurm"
    assert calls(place) == [
        "sbatch --test-only",
        "sbatch --test-only",
        f"sbatch --parsable {folder}/train.sbatch",
        f"sbatch --parsable --dependency=afterok:7 --kill-on-invalid-dep=yes {folder}/eval.sbatch",
    ]
    assert (place / "runs" / "run" / "logs").is_dir()
    told = capsys.readouterr()
    assert "submitted job 7: run" in told.out
    assert f"{place}/runs/run/logs/slurm-7.log" in told.out
    assert "waits:  PartitionTimeLimit" in told.out
    assert "job 7 does not start by waiting: Slurm says PartitionTimeLimit" in told.err


def test_a_second_job_of_the_run_is_warned_of(
    place: Path, shared: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warning = "job 7 of this run is in Slurm's queue"
    assert launch(*shared) == 0
    assert warning not in capsys.readouterr().err
    assert launch(*shared) == 0
    assert warning in capsys.readouterr().err
    assert launch(*shared, "--sbatch=--dependency=singleton") == 0
    assert warning not in capsys.readouterr().err
    (place.parent / "bin" / "squeue").write_text("#!/bin/sh\n")  # it has ended
    assert launch(*shared) == 0
    assert warning not in capsys.readouterr().err


def test_nothing_is_submitted_half(
    place: Path, shared: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REFUSED", "eval.sbatch")
    assert launch(*shared, "--eval", "validity") == 2
    assert calls(place)[-1] == "scancel 7"
    assert "Slurm refuses eval.sbatch: Batch job submission failed: no such thing" in capsys.readouterr().err


def test_what_slurm_refuses_is_not_written(
    place: Path, shared: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REFUSED", "#SBATCH --partition=nope")
    assert launch(*shared, "--partition", "nope") == 2
    assert (
        "Slurm refuses train.sbatch: Batch job submission failed: no such thing. Nothing was" in capsys.readouterr().err
    )
    assert not (place / "runs").exists()
    assert launch(*shared, "--partition", "nope", "--skip-test") == 0


def test_folders_of_one_node_are_refused(
    place: Path, shared: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.places._slurm_submit.TEMPORARY", (str(place),))
    assert launch("--time", "1:00:00") == 2
    assert f"the run folder {place}/runs/run is in a folder that each node has for itself" in capsys.readouterr().err
    monkeypatch.setattr("launch.places._slurm_submit.TEMPORARY", ())
    monkeypatch.setattr("launch.places._slurm_submit.file_system", lambda _: "ext4")
    assert launch() == 0
    assert "is on a disk of this machine (ext4): do all nodes see it?" in capsys.readouterr().err


def test_shards_that_are_not_there_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch() == 2
    assert "shard folder train does not exist" in capsys.readouterr().err
    assert calls(place) == []
    # Unless the run waits for the job that makes them.
    (place / "cluster.yaml").write_text(f"shared: [{place}]\n")
    assert launch("--cluster", "cluster.yaml", "--sbatch=--dependency=afterok:6") == 0


def test_without_slurm_it_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch() == 2
    assert "sbatch is not found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "--nodes 0: at least one node"),
        (["--nodes", "4-2"], "the larger number last"),
        (["--nodes", "n[0-1]"], "a number such as 4, or a range"),
        (["--gpus-per-node", "many"], "--gpus-per-node many: a number such as 8"),
        (["--nproc", "0"], "at least one process"),
        (["--cpus-per-task", "0"], "--cpus-per-task 0: at least one"),
        (["--time", "a day"], "--time a day: write it as"),
        (["--time", "3"], "told to save up to 210 s before the end"),
        (["--sbatch=--signal=USR1@60"], "relies on its own --signal"),
        (["--sbatch=--comment=a b"], "cannot stand in an sbatch file"),
        (["--partition", "a\n#SBATCH --x"], "cannot stand in an sbatch file"),
        (["--out", "a b"], "NOTHING"),
        (["--resume", "never"], "a requeued job would start over"),
        (["--eval", "ml"], "ml"),
        (["--eval", "classify --no-such-option"], "no-such-option"),
        (["--eval", "lm 'x"], "No closing quotation"),
        (["--mount", "a,b"], "without white space and commas"),
        (["--set", "modle.x=1"], "modle"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if message == "NOTHING":  # the files' own place may have a space: Slurm gets it as one word
        assert launch(*words, "--dry-run") == 0
        assert "'" + str(place / "a b" / "train.sbatch") + "'" in capsys.readouterr().out
        return
    try:
        code = launch(*words)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
    assert (sorted(path.name for path in place.iterdir()), calls(place)) == (["run.yaml"], [])


def test_the_page_s_commands_and_its_cluster_file_are_taken(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = Path(__file__).resolve().parents[2]
    page = (repository / "docs" / "slurm.md").read_text()
    (place / "cluster.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    (place / "configs").symlink_to(repository / "configs")
    found = [line for line in page.replace("\\\n", "").splitlines() if line.startswith("    nystrom launch slurm ")]
    assert len(found) == 5
    for line in found:
        assert run_cli(main, "nystrom launch", [*shlex.split(line)[2:], "--dry-run"]) == 0
        assert "\n#SBATCH --nodes=" in capsys.readouterr().out
