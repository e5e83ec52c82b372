"""The Slurm job array: its files are run with a stand-in for sbatch."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.cli import main as data
from data_pipeline.errors import UserError
from launch.array import Resources, check_command, write_array
from launch.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]

# Writes down what it was given; runs an array task by task, as the cluster would, and a single job once.
SBATCH = """
import json, os, re, subprocess, sys
with open(os.environ["RECORD"], "a") as f:
    print(json.dumps(["sbatch", *sys.argv[1:]]), file=f)
with open(sys.argv[-1]) as f:
    tasks = re.search(r"^#SBATCH --array=0-(\\d+)(%\\d+)?$", f.read(), flags=re.MULTILINE)
for task in range(int(tasks[1]) + 1) if tasks else [None]:
    env = os.environ if task is None else {**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}
    subprocess.run(["bash", os.path.abspath(sys.argv[-1])], env=env, check=True, cwd="/")
with open(os.environ["RECORD"]) as f:
    print(100 + sum(line.startswith('["sbatch"') for line in f), end=";cluster\\n")
"""
NYSTROM = """
import json, os, sys
with open(os.environ["RECORD"], "a") as f:
    print(json.dumps(["nystrom", *sys.argv[1:], os.getcwd(), os.environ.get("SETUP", "")]), file=f)
"""
PREPARE = ["data", "prepare", "--input", "te xt/*.jsonl", "it's.txt", "--tokenizer", "tok", "--out", "shards/a b"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place whose path has a space, with the stand-ins on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, source in (("sbatch", SBATCH), ("nystrom", NYSTROM)):
        (programs / name).write_text(f"#!{sys.executable}\n{source}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    place = tmp_path / "my place"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def write(cluster: Path, *more: str, words: list[str] = PREPARE) -> Path:
    out = cluster / "jobs"
    logs = ["--log-dir", str(cluster.parent / "logs")]
    assert main(["array", "--num-shards", "3", "--out", str(out), *logs, *more, "--", *words]) == 0
    return out


def submit(out: Path) -> tuple[list[list[str]], str]:
    """Run submit.sh; what the stand-ins were called with, and what it said."""
    record = Path(os.environ["RECORD"])
    done = subprocess.run(["bash", out / "submit.sh"], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in record.read_text().splitlines()], done.stdout


def header(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.startswith("#SBATCH ")]


def test_every_part_runs_and_then_the_plain_command(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = write(cluster, "--setup", "export SETUP='it ran'")
    assert f"submit both with: bash {shlex.quote(str(out / 'submit.sh'))}" in capsys.readouterr().out
    calls, said = submit(out)
    part = ["--shard-index", "{}", "--num-shards", "3"]
    end = [str(cluster), "it ran"]
    assert calls == [
        ["sbatch", "--parsable", "array.sbatch"],
        *(["nystrom", *PREPARE, *(word.format(i) for word in part), *end] for i in range(3)),
        ["sbatch", "--parsable", "--dependency=afterany:101", "finish.sbatch"],
        ["nystrom", *PREPARE, *end],
    ]
    assert said == "tokenizing: job array 101\nfinishing: job 102\n"
    assert (cluster.parent / "logs").is_dir()


def test_all_files_are_shell(cluster: Path) -> None:
    out = write(cluster)
    assert sorted(path.name for path in out.iterdir()) == ["array.sbatch", "finish.sbatch", "submit.sh"]
    for path in out.iterdir():
        assert path.read_text().startswith("#!/bin/bash\n")
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    assert os.access(out / "submit.sh", os.X_OK)


def test_resources_stand_in_the_header(cluster: Path) -> None:
    options = ["--time", "4:00:00", "--cpus", "16", "--mem", "32G", "--partition", "cpu", "--account", "lab"]
    out = write(cluster, *options, "--max-running", "2", "--sbatch=--qos=long", "--sbatch=--constraint=a&b")
    logs = cluster.parent / "logs"
    shared = ["time=4:00:00", "cpus-per-task=16", "mem=32G", "partition=cpu", "account=lab", "qos=long"]
    common = [f"#SBATCH --{option}" for option in [*shared, "constraint=a&b"]]
    begin = ["#SBATCH --job-name=jobs", "#SBATCH --array=0-2%2", f"#SBATCH --output={logs}/%x-%A-%a.log"]
    assert header(out / "array.sbatch") == [*begin, *common]
    begin = ["#SBATCH --job-name=jobs-finish", f"#SBATCH --output={logs}/%x-%j.log"]
    assert header(out / "finish.sbatch") == [*begin, *common]
    assert header(write(cluster) / "finish.sbatch") == begin  # nothing is asked for that was not said


def test_duplicates_take_two_passes(cluster: Path) -> None:
    out = write(cluster, words=[*PREPARE, "--dedup", "exact"])
    calls, said = submit(out)
    assert [call[1:] for call in calls if call[0] == "sbatch"] == [
        ["--parsable", "array.sbatch"],
        ["--parsable", "--dependency=afterany:101", "array.sbatch"],
        ["--parsable", "--dependency=afterany:102", "finish.sbatch"],
    ]
    assert sum(call[0] == "nystrom" for call in calls) == 2 * 3 + 1
    assert said == "signing documents: job array 101\ntokenizing: job array 102\nfinishing: job 103\n"


def test_a_job_that_fails_says_so(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(cluster, "--setup", "cat no/such/file")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    done = subprocess.run(["bash", out / "array.sbatch"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no/such/file" in done.stderr
    assert not Path(os.environ["RECORD"]).exists()


def test_each_task_gets_the_cores_that_were_asked_for() -> None:
    assert check_command(["nystrom", *PREPARE], 16) == ([*PREPARE[2:], "--workers", "16"], False)
    assert check_command([*PREPARE, "--workers", "4"], 16) == ([*PREPARE[2:], "--workers", "4"], False)
    assert check_command(PREPARE, None) == (PREPARE[2:], False)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--dedup", "exact"]])
def test_the_array_gives_the_bytes_of_one_machine(more: list[str], cluster: Path) -> None:
    program = f"cd {shlex.quote(str(REPOSITORY))} && exec {sys.executable} -m launch.program"
    (cluster.parent / "bin" / "nystrom").write_text(f'#!/bin/bash\n{program} "$@"\n')
    texts = [f"text {i % 90} of all the texts " * (i % 7 + 1) for i in range(200)]
    source = cluster / "a b.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = str(cluster / "tokenizer")
    assert not data(["tokenizer", "--input", str(source), "--vocab-size", "300", "--out", tokenizer])
    words = ["prepare", "--input", str(source), "--tokenizer", tokenizer, "--shard-tokens", "1000", *more, "--out"]
    assert not data([*words, str(cluster / "one")])
    out = write(cluster, "--cpus", "1", words=["data", *words, str(cluster / "many")])
    submit(out)
    files = {path.name: path.read_bytes() for path in (cluster / "one").iterdir()}
    assert len(files) > 4
    assert {path.name: path.read_bytes() for path in (cluster / "many").iterdir()} == files


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "c.yaml"], "an array is for `data prepare ...`, given behind `--`, and not for 'train"),
        (["data", "tokenizer", "--input", "a"], "and not for 'data tokenizer'"),
        ([*PREPARE, "--shard-index", "1", "--num-shards", "2"], "are the array's own"),
        ([*PREPARE, "--shard-i=1"], "are the array's own"),
        ([*PREPARE, "--num-shards", "2"], "are the array's own"),
        ([*PREPARE, "--overwrite"], "each job would clear away what the others did"),
        ([*PREPARE, "--ray"], "two ways to spread the same work"),
        (["data", "prepare", "--input", "-", "--tokenizer", "t", "--out", "o"], "no common standard input"),
    ],
)
def test_other_commands_are_refused(words: list[str], message: str, cluster: Path) -> None:
    with pytest.raises(UserError, match=message):
        write(cluster, words=words)
    assert not (cluster / "jobs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-shards", "0"], "--num-shards 0: at least one"),
        (["--max-running", "0"], "--max-running 0: at least one"),
        (["--cpus", "0"], "--cpus 0: at least one"),
        (["--time", "4 hours"], "'--time=4 hours' cannot stand in an sbatch file"),
        (["--mem", "1G\n#SBATCH --x"], "cannot stand in an sbatch file"),
        (["--sbatch", "qos=long"], "it must be --NAME=VALUE"),
        (["--log-dir", "logs"], "my place/logs.* cannot stand in an sbatch file"),
    ],
)
def test_values_that_make_no_job_are_refused(options: list[str], message: str, cluster: Path) -> None:
    with pytest.raises(UserError, match=message):
        write(cluster, *options)
    assert not (cluster / "jobs").exists()


def test_mistakes_in_the_command_are_told_before_it_waits_in_a_queue(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        write(cluster, words=["data", "prepare", "--input", "a.jsonl", "--out", "o"])
    assert "the following arguments are required: --tokenizer" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told(cluster: Path) -> None:
    (cluster / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_array(cluster / "file" / "jobs", PREPARE, 2, resources=Resources(), log_dir=cluster.parent / "logs")


def test_tasks_without_work_are_named_at_once(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster / "text.jsonl").write_text('{"text": "one unit"}\n')
    words = ["data", "prepare", "--tokenizer", "tokenizer", "--out", "nystrom", "--input"]
    write(cluster, words=[*words, "text.jsonl"])
    said = capsys.readouterr().out
    assert "2 of the 3 tasks will have nothing to do (1, 2): the inputs are work for 1, so --num-shards 1" in said
    with gzip.open(cluster / "text.jsonl.gz", "wb", compresslevel=0) as f:
        f.write(b"\n" * 6_000_000)  # taken for 18 MB: shared by all tasks
    write(cluster, words=["nystrom", *words, "text.jsonl.gz"])
    assert "nothing to do" not in capsys.readouterr().out
