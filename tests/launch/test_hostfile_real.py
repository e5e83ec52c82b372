"""``nystrom launch hostfile`` on three hosts, which are network namespaces of this machine with an sshd each."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import psutil
import pytest
from namespace_case import Cluster, hosts
from processes_case import REPOSITORY, wait_until
from ranks import run_ranks, values
from training_case import metrics, numbers, settings, write_config, write_corpus

pytestmark = pytest.mark.slow

STEPS, EVERY = 40, 10
BATCH = 384


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("hostfile")
    with hosts(3, folder / "cluster") as made:
        write_corpus(folder)
        yield made


def config_of(cluster: Cluster, name: str) -> str:
    """A run of :data:`STEPS` steps of 12 rows, which three and two processes share alike."""
    folder = cluster.folder.parent
    curriculum = [{"until_tokens": STEPS * BATCH, "seq_len": 32, "micro_batch": 3}]
    values = settings(
        *(folder, folder),
        name=name,
        zero_stage=2,
        model={"objective": "clm"},
        curriculum=curriculum,
        batch_tokens=BATCH,
        checkpoint={"every_tokens": EVERY * BATCH},
    )
    return write_config(folder / f"{name}.yaml", values)


def start(cluster: Cluster, config: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch", "hostfile", "--hostfile", cluster.hostfile, "--config", config]
    command += ["--ssh-args", cluster.ssh_args, *words]
    # A key and a word with a space, as the environments of people have them.
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "WANDB_API_KEY": "a secret", "NYSTROM_WORD": "50% of $HOME"}
    return cluster.popen(command, env=env, cwd=cluster.folder.parent)


def step_of(run: Path) -> int:
    return max((row["step"] for row in metrics(run)), default=0) if (run / "metrics.jsonl").exists() else 0


def train(config: str) -> int:
    """Runs in forked ranks: the command itself."""
    from data_pipeline.errors import run_cli
    from pretrain.cli import main

    return run_cli(main, "nystrom train", ["--config", config])


@pytest.fixture(scope="module")
def local(cluster: Cluster) -> Path:
    """The same run by three processes of this machine."""
    assert values(run_ranks(train, 3, config=config_of(cluster, "local"))) == [0, 0, 0]
    return cluster.folder.parent / "local"


def gone(cluster: Cluster) -> bool:
    return not any(cluster.processes(name) for name in cluster.names)


def wait_for(condition: Callable[[], object], seconds: float) -> float:
    """Seconds until ``condition`` holds, at most ``seconds`` and a little."""
    began = time.monotonic()
    while not condition() and time.monotonic() - began < seconds:
        time.sleep(0.1)
    return time.monotonic() - began


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_hosts_that_are_not_ready_are_named_and_nothing_is_started(cluster: Cluster) -> None:
    config, folder = config_of(cluster, "refused"), cluster.folder.parent
    other = Path(str(metadata.distribution("torch")._path)) / "METADATA"  # type: ignore[attr-defined]
    old, empty = folder / "METADATA", folder / "empty"
    old.write_text(re.sub(r"(?m)^Version: .*", "Version: 2.4.0", other.read_text()))
    empty.mkdir()
    # The first host again, but without a key that it takes, and without a host key that is known here.
    address, config_file = cluster.address("n0"), cluster.folder / "six_config"
    config_file.write_text(
        f"Host n7\n  HostName {address}\n  HostKeyAlias n0\n  PubkeyAuthentication no\n"
        f"Host n8\n  HostName {address}\n  HostKeyAlias n8\n"
        f"Host *\n  Include {cluster.folder / 'ssh_config'}\n"
    )
    six = cluster.folder / "six"
    six.write_text(Path(cluster.hostfile).read_text() + "n7 slots=1\nn8 slots=1\nn9 slots=1\n")
    cluster.cut("n2")
    try:
        with cluster.covered("n0", folder / "train", empty), cluster.covered("n1", other, old):
            process = start(cluster, config, "--hostfile", str(six), "--ssh-args", f"-F {config_file}")
            said = process.communicate(timeout=120)[0]
    finally:
        cluster.mend("n2")
    assert process.returncode == 2, said
    assert "nothing was started, since 6 of 6 hosts are not ready" in said
    assert f"n0: {folder / 'train'} is not the one that is here" in said
    version = metadata.version("torch")
    assert f"n1: package torch is 2.4.0 instead of {version}: install the same code and packages on all hosts" in said
    assert "n2: it does not answer: is it switched on" in said
    assert "n7: it asks for a password: put your public key there with ssh-copy-id" in said
    assert "n8: its host key is not known here: compare it and add it with ssh-keyscan" in said
    assert "n9: its name is not known here: correct the hostfile" in said
    assert "Traceback" not in said
    assert not (folder / "refused").exists()
    assert gone(cluster)


def test_one_run_over_ssh_without_a_host_over_pdsh_and_by_plain_deepspeed(cluster: Cluster, local: Path) -> None:
    """Each way in resumes where the one before was ended; what three processes did is as on one machine, to the bit."""
    if shutil.which("pdsh") is None:
        pytest.skip("no program pdsh")
    config, folder = config_of(cluster, "shared"), cluster.folder.parent
    run = folder / "shared"

    # Over ssh, until the link of a host is cut.
    process = start(cluster, config, "--elastic", "2:3", "--max-restarts", "1", "--stop-timeout", "15")
    wait_until(lambda: step_of(run) > EVERY, process, 180)
    running = [each for name in cluster.names for each in cluster.processes(name)]
    assert len(running) == 3 * 3  # agent, DeepSpeed's launcher and rank of each
    check_environment(cluster)
    cluster.cut("n2")
    try:
        assert wait_for(lambda: not any(each.is_running() for each in running), 90) < 60
        # Then on the two that answer.
        wait_until(lambda: ranks_of(cluster, "n1") and step_of(run) > EVERY + 4, process, 240)
    finally:
        cluster.mend("n2")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=90)[0]
    assert process.returncode == 75, said
    assert re.search(r"3 processes on n0, n1, n2, which meet at 10\.213\.7\.10, port \d+", said)
    assert "nystrom launch: host n2 is lost: " in said
    assert "the processes of n0, n1 are ended, since none can go on without it" in said
    assert f"from the checkpoint of step {EVERY}" in said
    assert "2 processes on n0, n1, which meet at" in said
    (log,) = (run / "logs").glob("*/node-2.log")
    assert "n2: nothing was heard of the launcher for 30 s" in log.read_text()
    assert gone(cluster)

    # Over pdsh, on three again, until the launcher is killed.
    first = step_of(run)
    assert first < STEPS - 2
    process = start(cluster, config, "--transport", "pdsh")
    wait_until(lambda: step_of(run) > first, process, 180)
    process.kill()
    said = process.communicate(timeout=90)[0]
    wait_for(lambda: gone(cluster), 60)
    assert gone(cluster), said
    assert any("processes from 2 to 3" in path.read_text() for path in (run / "logs").glob("*/rank-0.log"))
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"

    # By DeepSpeed's own launcher, to the end.
    (folder / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nWANDB_MODE=offline\nOMP_NUM_THREADS=1\n")
    plain = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", cluster.hostfile, "--no_ssh_check"]
    plain += ["--master_addr", cluster.address("n0"), "--module", "pretrain", "--config", config]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PDSH_SSH_ARGS_APPEND": cluster.ssh_args}
    assert cluster.run(plain, env=env, cwd=folder, timeout=180)[0] == 0
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert gone(cluster)

    assert numbers(run)[:EVERY] == numbers(local)[:EVERY]
    losses = [row["loss"] for row in metrics(run)]
    assert len(losses) == STEPS
    # Two processes add in another order.
    assert losses == pytest.approx([row["loss"] for row in metrics(local)], rel=1e-4)


def ranks_of(cluster: Cluster, name: str) -> list[dict[str, str]]:
    """The environments of the training processes of a host."""
    found = []
    for process in cluster.processes(name):
        with contextlib.suppress(psutil.Error):
            found.append(process.environ())
    return [each for each in found if "RANK" in each]


def check_environment(cluster: Cluster) -> None:
    """What a rank got, and that no command line shows the secret."""
    (env,) = ranks_of(cluster, "n1")
    assert (env["WANDB_API_KEY"], env["NYSTROM_WORD"]) == ("a secret", "50% of $HOME")
    assert (env["GLOO_SOCKET_IFNAME"], env["NCCL_SOCKET_IFNAME"]) == ("eth0", "=eth0")
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == ("1", "0", "3")
    assert env["MASTER_ADDR"] == cluster.address("n0")
    assert "a secret" not in " ".join(word for each in psutil.process_iter() for word in _words(each))
