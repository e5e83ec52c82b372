"""What a pod runs, run here: as process 1 of its own numbering, which has its own rules for signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from processes_case import REPOSITORY, leftovers, survivors, wait_until
from training_case import metrics, settings, write_config, write_corpus

from launch.cli import main
from launch.watch import free_port

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def can_unshare() -> bool:
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def start_pod(manifest: Path, config: str) -> subprocess.Popen[str]:
    """The container's command, with what the cluster would put in its place: names, the mounted file, the program."""
    _, job_set = yaml.safe_load_all(manifest.read_text())
    container = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    replaced = {
        "$(LAUNCH_ID)": "one",
        "/etc/nystrom/run.yaml": config,
        "run-node-0-0.run": "127.0.0.1",
        "29500": str(free_port()),
    }
    words = [replaced.get(word, word) for word in container["command"]]
    assert words[0] == "nystrom"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JOB_COMPLETION_INDEX": "0"}
    return subprocess.Popen(
        [*UNSHARE, sys.executable, "-m", "launch.program", *words[1:]],
        cwd=container["workingDir"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )


@pytest.mark.slow
def test_process_1_hears_sigterm_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not can_unshare():
        pytest.skip("a numbering of processes of one's own needs root and unshare")
    write_corpus(tmp_path)
    curriculum = [{"until_tokens": 12_800, "seq_len": 32, "micro_batch": 4}]
    given = write_config(tmp_path / "given.yaml", settings(tmp_path, tmp_path, curriculum=curriculum))
    file = tmp_path / "pod.yaml"
    words = ["kubernetes", "--config", given, "--image", "i", "--pvc", f"data:{tmp_path}", "--out", str(file)]
    assert main([*words, "--dry-run"]) == 0
    file.write_text(capsys.readouterr().out.split("\n# starts it")[0])
    config = tmp_path / "run.yaml"
    config.write_text(next(yaml.safe_load_all(file.read_text()))["data"]["run.yaml"])
    pod = start_pod(file, str(config))
    run = tmp_path / "run"
    wait_until(lambda: (run / "metrics.jsonl").exists() and metrics(run), pod)
    (first,) = psutil.Process(pod.pid).children()
    family = first.children(recursive=True)
    assert len(family) > 1
    first.send_signal(signal.SIGTERM)  # as Kubernetes does: to process 1 alone
    said = pod.communicate(timeout=60)[0]
    assert pod.returncode == 75, said
    assert survivors(family) == []
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"
    assert leftovers(str(config)) == []
