"""`nystrom launch slurm` and `array` on a real Slurm of two nodes: preempted, out of time, cancelled, refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes_case import REPOSITORY, leftovers
from ranks import run_ranks, values
from slurm_case import Cluster, slurm
from training_case import events, metrics, numbers, settings, write_config, write_corpus

SLOW = """
import time
from pathlib import Path
from pretrain.callbacks import Callback

class Slow(Callback):
    def on_step(self, event):
        if Path("slow").exists():
            time.sleep(0.5)
"""
"""Keeps a run from ending before it is interrupted, as long as there is a file ``slow``."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    with slurm(folder) as running:
        write_corpus(folder)
        (folder / "slowly.py").write_text(SLOW)
        (folder / "cluster.yaml").write_text(f"shared: [{folder}]\npartition: low\nexclusive: true\ntime: '10:00'\n")
        running.env |= {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{running.env['PATH']}",
        }
        yield running


def config(cluster: Cluster, name: str, **changes: Any) -> str:
    curriculum = [
        {"until_tokens": 16_384, "seq_len": 32, "micro_batch": 4},
        {"until_tokens": 32_768, "seq_len": 64, "micro_batch": 2},
    ]
    more: dict[str, Any] = {"model": {"objective": "clm", "dropout": 0.1}, "callbacks": ["slowly:Slow"], **changes}
    run = settings(cluster.folder, Path("."), name=name, zero_stage=2, curriculum=curriculum, **more)
    return write_config(cluster.folder / f"{name}.yaml", run)


def launch(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    """``nystrom launch``, in the cluster's folder."""
    command = [sys.executable, "-m", "launch", *words]
    return subprocess.run(command, env=cluster.env, cwd=cluster.folder, capture_output=True, text=True, check=False)


def submit(cluster: Cluster, *words: str) -> str:
    """``nystrom launch slurm``; returns the job's number."""
    done = launch(cluster, "slurm", "--cluster", "cluster.yaml", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.removeprefix("submitted job ").split(":")[0]


def wait_for_step(cluster: Cluster, name: str, step: int, job: str) -> None:
    run = cluster.folder / name
    cluster.until(
        lambda: (run / "metrics.jsonl").exists() and any(row["step"] >= step for row in metrics(run)),
        f"step {step} of {name}",
        job=job,
    )


def train(config: str) -> int:
    """Runs in forked ranks: the command itself."""
    from data_pipeline.errors import run_cli
    from pretrain.cli import main

    return run_cli(main, "nystrom train", ["--config", config])


def status(cluster: Cluster, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cluster.folder / name / "status.json").read_text())
    return found


@pytest.mark.slow
def test_preempted_and_out_of_time_it_ends_as_if_nothing_had_been(cluster: Cluster) -> None:
    slow = cluster.folder / "slow"
    slow.write_text("")
    words = ["--config", config(cluster, "run"), "--requeue", "--stop-timeout", "20", "--eval", "validity"]
    job = submit(cluster, "--nodes", "2", *words)
    evaluation = str(int(job) + 1)
    wait_for_step(cluster, "run", 2, job)
    assert cluster.state(evaluation) == "PENDING"

    # A job of the higher partition wants both nodes.
    high = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    other = cluster.run("sbatch", "--parsable", *high).strip()
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1", "a preemption", job=job)
    assert cluster.wait(other)["JobState"] == "COMPLETED"
    stopped = status(cluster, "run")
    assert stopped["state"] == "preempted"

    # Its second start is told that its time is over.
    wait_for_step(cluster, "run", stopped["step"] + 1, job)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    cluster.until(lambda: cluster.job(job)["Restarts"] == "2", "the time limit", job=job)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    slow.unlink()
    ended = cluster.wait(job)
    log = Path(ended["StdOut"]).read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert "saved; its time is over, so the job is requeued" in log
    assert log.count("Resumes from") == 2
    assert events(cluster.folder / "run").count("preempted") == 2
    assert cluster.wait(evaluation)["ExitCode"] == "0:0", Path(cluster.job(evaluation)["StdOut"]).read_text()
    assert (cluster.folder / "run" / "eval" / "validity.json").is_file()

    # The forked ranks run in another folder, and without the callback that it has.
    changes = {"name": "whole", "output_dir": str(cluster.folder), "callbacks": []}
    whole = write_config(cluster.folder / "whole.yaml", settings_of(cluster, "run.yaml", **changes))
    assert values(run_ranks(train, 2, config=whole)) == [0, 0]
    assert numbers(cluster.folder / "run") == numbers(cluster.folder / "whole")
    assert leftovers(str(cluster.folder / "run.yaml")) == []


def settings_of(cluster: Cluster, file: str, **changes: Any) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load((cluster.folder / file).read_text())
    return found | changes


@pytest.mark.slow
def test_a_cancelled_run_is_saved_not_revived_and_resumes_on_fewer_nodes(cluster: Cluster) -> None:
    (cluster.folder / "slow").write_text("")
    words = ["--config", config(cluster, "cancelled"), "--nodes", "1-2", "--requeue"]
    job = cancelled = submit(cluster, *words)
    wait_for_step(cluster, "cancelled", 2, job)
    cluster.run("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    log = Path(cluster.job(job)["StdOut"])
    cluster.until(lambda: "Slurm ends this job itself" in log.read_text(), "the script's end")
    cluster.until(lambda: leftovers(str(cluster.folder / "cancelled.yaml")) == [], "the end of all processes")
    stopped = status(cluster, "cancelled")
    assert (stopped["state"], stopped["code"]) == ("preempted", 75)
    assert stopped["step"] >= 2
    assert (cluster.folder / "cancelled" / "checkpoints" / "latest").is_file()

    # A run that is asked to stop has all the time that a save takes, and its status reaches Slurm. It resumes on the
    # one node that there is now.
    assert "on n[0-1], meeting" in log.read_text()
    cluster.run("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=test")
    try:
        job = submit(cluster, *words)
        wait_for_step(cluster, "cancelled", stopped["step"] + 1, job)
        cluster.run("scancel", "--batch", "--signal=TERM", job)
        ended = cluster.wait(job)
    finally:
        cluster.run("scontrol", "update", "NodeName=n1", "State=RESUME")
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0")
    said = Path(ended["StdOut"]).read_text()
    assert "on n0, meeting" in said
    assert "On 1 CPU process(es)" in said
    assert "somebody asked for it" in said
    earlier = cluster.job(cancelled)
    assert (earlier["JobState"], earlier["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.slow
def test_what_slurm_cannot_give_is_refused(cluster: Cluster) -> None:
    words = ["slurm", "--cluster", "cluster.yaml", "--config", config(cluster, "refused"), "--eval", "validity"]
    jobs = cluster.run("squeue", "--noheader", "--states=all")
    cluster.run("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=test")
    try:
        for wrong, message in [
            (["--sbatch=--nodelist=n7"], "Invalid node name specified"),
            (["--sbatch=--nodelist=n1"], "they are down or drained"),
            (["--nodes", "3"], "Requested node configuration is not available"),
            (["--partition", "nope"], "invalid partition specified: nope"),
            (["--constraint", "h100"], "Invalid feature specification"),
        ]:
            done = launch(cluster, *words, *wrong)
            assert done.returncode == 2
            assert message in done.stderr
            assert "Nothing was submitted" in done.stderr
    finally:
        cluster.run("scontrol", "update", "NodeName=n1", "State=RESUME")
    assert cluster.run("squeue", "--noheader", "--states=all") == jobs
    assert not (cluster.folder / "refused").exists()
    # Slurm takes this one, and would let it wait for ever.
    done = launch(cluster, *words, "--time", "5:00:00")
    assert done.returncode == 0, done.stderr
    assert "does not start by waiting: Slurm says Partition" in done.stderr
    job = done.stdout.removeprefix("submitted job ").split(":")[0]
    cluster.run("scancel", job)
    # Its evaluation goes with it.
    assert cluster.wait(str(int(job) + 1))["JobState"] == "CANCELLED"


@pytest.mark.slow
def test_the_array_prepares_and_is_finished(cluster: Cluster) -> None:
    prepare = ["data", "prepare", "--input", "train.jsonl", "--tokenizer", "train", "--shard-tokens", "4096"]
    done = launch(
        cluster,
        *["array", "--num-shards", "2", "--out", "jobs", "--cpus", "1", "--partition", "low", "--"],
        *[*prepare, "--out", "parts"],
    )
    assert done.returncode == 0, done.stderr
    said = subprocess.run(
        ["bash", cluster.folder / "jobs" / "submit.sh"], env=cluster.env, capture_output=True, text=True, check=True
    ).stdout
    finish = said.split("finishing: job ")[1].strip()
    # A run may wait for the shards that the array makes.
    words = ["--config", config(cluster, "after", data={"train": "parts"}), f"--sbatch=--dependency=afterok:{finish}"]
    after = submit(cluster, *words)
    assert cluster.job(after)["JobState"] in ("PENDING", "RUNNING")
    cluster.run("scancel", after)
    ended = cluster.wait(finish)
    assert ended["ExitCode"] == "0:0", Path(ended["StdOut"]).read_text()
    alone = [sys.executable, "-m", "launch.program", *prepare, "--out", "alone"]
    subprocess.run(alone, env=cluster.env, cwd=cluster.folder, check=True, capture_output=True)
    files = {path.name: path.read_bytes() for path in (cluster.folder / "alone").iterdir() if path.is_file()}
    assert {p.name: p.read_bytes() for p in (cluster.folder / "parts").iterdir() if p.is_file()} == files
    assert len(list((cluster.folder / "logs").glob("jobs-*.log"))) == 3
