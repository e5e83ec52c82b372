"""``nystrom launch kubernetes``: the file, against the published schemas, and what kubectl is asked."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from training_case import settings, write_config

from data_pipeline.errors import UserError, run_cli
from launch.cli import main
from launch.places._kubernetes_manifest import COMMENTS, Claim, Pods, manifest, object_name
from launch.places.kubernetes import PROGRAM
from launch.plan import LaunchPlan
from pretrain.config import load_config

EXPECTED = Path(__file__).parent / "expected" / "kubernetes.yaml"
PLAN = LaunchPlan(
    name="Causal_16k",
    words=("--config", "/etc/nystrom/run.yaml", "--resume", "auto"),
    run_dir=Path("/data/runs/Causal_16k"),
    directory=Path("/here"),
    nodes=4,
    max_nodes=4,
    processes=8,
    environment={"NCCL_DEBUG": "WARN", "NUMBER": "1e3", "TRUTH": "y"},
    max_restarts=3,
    program=PROGRAM,
)
PODS = Pods(
    image="registry.example/nystrom:1",
    gpus=8,
    claims=(Claim("data", PurePosixPath("/data")), Claim("scratch", PurePosixPath("/scratch"))),
    directory=PurePosixPath("/data"),
    namespace="research",
    cpu="64",
    memory="512Gi",
    node_selector={"cloud.google.com/gke-spot": "true"},
    service_account="trainer",
    priority_class="low",
    secrets=("wandb",),
    evaluation=("eval", "lm", "--checkpoint", "/data/runs/Causal_16k"),
)


def text() -> str:
    return manifest("causal-16k", "name: Causal_16k\nseed: 1\n", PLAN, PODS)


def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    config_map, job_set = yaml.safe_load_all(text())
    return config_map, job_set


def test_the_file_is_the_expected_one() -> None:
    """After a change that is meant: write what :func:`text` returns into that file, and read it."""
    assert text() == EXPECTED.read_text(encoding="utf-8")


def problems(document: dict[str, Any]) -> list[str]:
    """What the schemas of core Kubernetes and of JobSet say against it: wrong types, and keys that there are not."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="the schemas of Kubernetes: install [dev]")
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="the schema of JobSet: install [dev]")
    found, core = [], [document]
    if document["kind"] == "JobSet":
        try:
            kept = models.JobsetV1alpha2JobSet.from_dict(copy.deepcopy(document)).to_dict()
            found += [f"{path}: not in the schema" for path in lost(document, kept)]
            found += [f"{path}: missing" for path in lost(kept, document)]
        except ValueError as error:  # of pydantic
            found.append(str(error))
        jobs = [job["template"]["spec"] for job in document["spec"]["replicatedJobs"]]
        core = [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}, "spec": spec} for spec in jobs]
    for each in core:
        try:
            kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"core: {error.message}")
    return found


def lost(given: Any, kept: Any, path: str = "") -> list[str]:
    """Paths in ``given`` that ``kept`` has not, or has with another value."""
    if isinstance(given, dict) and isinstance(kept, dict):
        both = [lost(value, kept.get(key), f"{path}.{key}") for key, value in given.items()]
        return [each for found in both for each in found]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = enumerate(zip(given, kept, strict=True))
        return [each for i, (old, new) in pairs for each in lost(old, new, f"{path}[{i}]")]
    return [] if given == kept else [path]


def test_the_schemas_take_it() -> None:
    config_map, job_set = documents()
    assert problems(config_map) == []
    assert problems(job_set) == []


def pod(job_set: dict[str, Any], job: int = 0) -> dict[str, Any]:
    found = job_set["spec"]["replicatedJobs"][job]["template"]["spec"]["template"]["spec"]
    assert isinstance(found, dict)
    return found


MISTAKES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda it: it["spec"]["failurePolicy"].update(maxRestart=1), ".spec.failurePolicy.maxRestart: not in the schema"),
    (lambda it: it["spec"]["failurePolicy"].update(maxRestarts="three"), "maxRestarts"),
    (lambda it: it["spec"]["failurePolicy"]["rules"][0].update(onReasons=[]), "rules[0].onReasons: not in the schema"),
    (lambda it: it["spec"]["failurePolicy"]["rules"][0].pop("action"), "rules[0].action: missing"),
    (lambda it: it["spec"]["replicatedJobs"][0].update(replica=1), ".replica: not in the schema"),
    (lambda it: it["spec"]["replicatedJobs"][0]["template"]["spec"].update(backofLimit=1), "core: .*'backofLimit'"),
    (lambda it: pod(it).update(priorityClass="low"), "core: .*'priorityClass'"),
    (lambda it: pod(it)["containers"][0].update(workDir="/"), "core: .*'workDir'"),
    (lambda it: pod(it)["containers"][0]["env"].append({"name": "A", "value": 1}), "core: 1 is not of type 'string'"),
    (lambda it: pod(it)["volumes"][1]["emptyDir"].update(size="1Gi"), "core: .*'size'"),
]


@pytest.mark.parametrize(("plant", "words"), MISTAKES)
def test_the_schemas_refuse_a_planted_mistake(plant: Callable[[dict[str, Any]], Any], words: str) -> None:
    _, job_set = documents()
    plant(job_set)
    said = problems(job_set)
    assert any(words in each or re.search(words, each) for each in said), said


def test_each_start_has_a_word_of_its_own_and_all_meet_at_pod_0() -> None:
    _, job_set = documents()
    command = pod(job_set)["containers"][0]["command"]
    assert command[:3] == ["nystrom", "launch", "node"]
    options = dict(zip(command[3:-5:2], command[4:-5:2], strict=False))
    assert options["--nodes"] == "4"
    assert options["--node-rank"] == "JOB_COMPLETION_INDEX"
    # JOBSET-JOB-INDEX-POD.SUBDOMAIN; the subdomain is the JobSet's name where none is given.
    assert options["--master-addr"] == "causal-16k-node-0-0.causal-16k"
    assert options["--launch-id"] == "$(LAUNCH_ID)"
    assert pod(job_set)["terminationGracePeriodSeconds"] == 150


def test_which_status_starts_again() -> None:
    """What Kubernetes writes into a Job's condition, against the rules; the texts are those of Kubernetes 1.31."""
    _, job_set = documents()
    for_pods = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    policy = job_set["spec"]["failurePolicy"]

    def action(status: int, disrupted: bool = False) -> str:
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        for index, rule in enumerate(for_pods):
            where = f"matching FailJob rule at index {index}"
            if status in rule.get("onExitCodes", {}).get("values", ()):
                reason = "PodFailurePolicy"
                message = f"Container train for pod research/p failed with exit code {status} {where}"
                break
            if disrupted and "onPodConditions" in rule:
                reason, message = "PodFailurePolicy", f"Pod research/p has condition DisruptionTarget {where}"
                break
        for rule in policy["rules"]:
            if "node" not in rule.get("targetReplicatedJobs", ["node"]):
                continue
            patterns = rule["onJobFailureMessagePatterns"]
            if reason in rule["onJobFailureReasons"] and any(re.search(each, message) for each in patterns):
                return str(rule["action"])
        return "RestartJobSet"

    found = {status: action(status) for status in (1, 2, 74, 75, 76, 77, 137)}
    assert found == {
        **dict.fromkeys((2, 74, 76), "FailJobSet"),
        75: "RestartJobSetAndIgnoreMaxRestarts",
        **dict.fromkeys((1, 77, 137), "RestartJobSet"),
    }
    assert action(137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(2, disrupted=True) == "FailJobSet"
    assert policy["maxRestarts"] == 3


def test_every_comment_has_its_line() -> None:
    shown = text()
    for comment in COMMENTS.values():
        assert f"# {comment}\n" in shown
    assert "'1e3'" in shown  # Kubernetes would read a number, and refuse it as a variable's value
    assert "'y'" in shown


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("causal-16k", "causal-16k"),
        ("Causal_16k.v2", "causal-16k-v2"),
        ("16k", "run-16k"),
        ("--a--", "a"),
        ("a" * 100, "a" * 48),  # and -node-0-3-abcde: 63
        ("a" * 47 + "-b", "a" * 47),
    ],
)
def test_names_fit(name: str, wanted: str) -> None:
    found = object_name(name, 4)
    assert found == wanted
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", found)
    assert len(f"{found}-node-0-3-abcde") <= 63


def test_a_name_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(UserError, match="nothing of it can be a name in Kubernetes"):
        object_name("模型", 1)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command; the file goes to the working directory."""
    config = write_config(tmp_path / "run.yaml", settings(tmp_path, tmp_path))
    monkeypatch.chdir(tmp_path)
    place = ["kubernetes", "--config", config, "--image", "registry/nystrom:1", "--pvc", "data:/data"]
    return [*place, "--set", "output_dir=/data/runs", "seed=7"]


def test_a_dry_run_shows_the_file_and_the_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--nodes", "2", "--gpus-per-node", "8", "--env", "A=b", "--namespace", "research", "--eval", "lm"]
    assert main([*words, *more, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "\n# starts it, once it is written\nkubectl apply --namespace research -f run.yaml\n" in shown
    assert not Path("run.yaml").read_text().startswith("#")  # the configuration; nothing was written
    body = shown.split("# starts it")[0]
    config_map, job_set = yaml.safe_load_all(body)
    assert problems(config_map) == []
    assert problems(job_set) == []
    Path("applied.yaml").write_text(config_map["data"]["run.yaml"])
    assert load_config("applied.yaml") == load_config(words[2], ["output_dir=/data/runs", "seed=7"])
    train = pod(job_set)["containers"][0]
    assert train["env"][1:] == [{"name": "A", "value": "b"}]  # and nothing of this machine's environment
    assert train["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert train["command"][-5:] == ["--", "--config", "/etc/nystrom/run.yaml", "--resume", "auto"]
    evaluation = pod(job_set, 1)["containers"][0]["command"]
    assert " ".join(evaluation) == "nystrom launch local --nproc 8 -- eval lm --checkpoint /data/runs/run"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--nodes", "0"], "--nodes 0: at least one node"),
        (["--gpus-per-node", "-1"], "--gpus-per-node -1: 0 or more"),
        (["--gpus-per-node", "2", "--nproc", "4"], "--nproc 4: more than --gpus-per-node 2"),
        (["--resume", "never"], "--resume never: each restart of a pod would begin anew"),
        (["--pvc", "Data:/x"], "--pvc 'Data': a name in Kubernetes"),
        (["--pvc", "more"], "--pvc more: it must be CLAIM:/MOUNT"),
        (["--pvc", "more:/data"], "--pvc: /data is taken already"),
        (["--pvc", "more:/dev/shm"], "--pvc: /dev/shm is taken already"),
        (["--memory", "16"], "--memory 16: files in /dev/shm count too"),
        (["--memory", "lots"], "--memory lots: an amount of memory"),
        (["--shm-size", "16GB"], "--shm-size 16GB: an amount of memory"),
        (["--shm-size", "0"], "--shm-size 0: an amount of memory"),
        (["--cpu", "many"], "--cpu many: a number of cores"),
        (["--node-selector", "spot"], "--node-selector spot: it must be KEY=VALUE"),
        (["--namespace", "My_Space"], "--namespace 'My_Space': a name in Kubernetes"),
        (["--service-account", "a b"], "--service-account 'a b'"),
        (["--env-secret", "-x"], "--env-secret"),
        (["--image", "a b"], "--image 'a b'"),
        (["--gpu-resource", "gpu"], "--gpu-resource gpu: a name such as"),
        (["--workdir", "data"], "--workdir data: it must begin with '/'"),
        (["--env", "WANDB_API_KEY=abc"], "Put it into a Secret"),
        (["--set", "output_dir=runs/../.."], "is on none of the volumes (/data)"),
        (["--set", "output_dir=/other"], "--set output_dir=/data/runs"),
        (["--eval", "nonsense"], "nonsense"),
    ],
)
def test_what_kubernetes_would_refuse_is_told_before(
    words: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if more[0] == "--env-secret":
        more = ["--env-secret=-x"]
    assert run_cli(main, "nystrom launch", [*words, *more, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "abc" not in said.out + said.err
    assert "Traceback" not in said.err


def test_without_a_volume_it_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    at = words.index("--pvc")
    assert run_cli(main, "nystrom launch", [*words[:at], *words[at + 2 :], "--dry-run"]) == 2
    assert "the run folder must outlive its pods" in capsys.readouterr().err


KUBECTL = """#!/bin/sh
echo "$*" >> "$HOME/asked"
case "$1" in
    api-resources) [ "$CLUSTER" = gone ] && { echo "first" >&2; echo "connection refused" >&2; exit 1; }
        [ "$CLUSTER" = bare ] || echo jobsets.jobset.x-k8s.io ;;
    get) [ "$CLUSTER" = taken ] && echo jobset.jobset.x-k8s.io/run; true ;;
    apply) [ "$CLUSTER" = strict ] && { echo 'error: unknown field "spec.x"' >&2; exit 1; }
        echo "configmap/run-config created"; echo "jobset.jobset.x-k8s.io/run created" ;;
esac
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Stands in for kubectl; returns what it was asked."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "kubectl"
    program.write_text(KUBECTL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/bin{os.pathsep}/usr/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    return lambda: (tmp_path / "asked").read_text().splitlines()


def test_it_writes_the_file_and_applies_it(
    words: list[str], kubectl: Callable[[], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--out", "made/run.yaml", "--namespace", "research"]) == 0
    assert kubectl() == [
        "api-resources --api-group=jobset.x-k8s.io -o name",
        "get jobset run --namespace research --ignore-not-found -o name",
        "apply --namespace research -f made/run.yaml",
    ]
    assert "jobset.jobset.x-k8s.io/run created" in (out := capsys.readouterr().out)
    assert "stop:  kubectl delete jobset run --namespace research (saves first" in out
    _, job_set = yaml.safe_load_all(Path("made/run.yaml").read_text())
    assert job_set["metadata"]["namespace"] == "research"


@pytest.mark.parametrize(
    ("cluster", "message", "asked"),
    [
        ("gone", "made.yaml is written, but kubectl reaches no cluster: connection refused", 1),
        ("bare", "this cluster has no JobSet: an administrator installs it once", 1),
        ("taken", "there is a JobSet run already, which cannot be changed", 2),
        ("strict", 'kubectl refuses made.yaml: error: unknown field "spec.x"', 3),
    ],
)
def test_what_a_cluster_says_is_passed_on(
    words: list[str],
    kubectl: Callable[[], list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    cluster: str,
    message: str,
    asked: int,
) -> None:
    monkeypatch.setenv("CLUSTER", cluster)
    assert run_cli(main, "nystrom launch", [*words, "--out", "made.yaml"]) == 2
    assert message in capsys.readouterr().err
    assert len(kubectl()) == asked
    assert Path("made.yaml").exists()


def test_without_kubectl_the_file_is_written(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_cli(main, "nystrom launch", [*words, "--set", "name=Big_Run", "output_dir=/data"]) == 2
    said = capsys.readouterr().err
    assert "big-run.yaml is written, but there is no kubectl here: give kubectl apply -f big-run.yaml" in said
    assert "in Kubernetes the run is called big-run: 'Big_Run' is no DNS label" in said
    assert Path("big-run.yaml").exists()
