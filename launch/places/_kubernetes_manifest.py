"""The YAML of ``nystrom launch kubernetes``: a ConfigMap with the configuration, and a JobSet with a pod for each node.

What it rests on, from the sources of Kubernetes 1.31 and JobSet 0.10:

- A pod that fails with an exit status of ``podFailurePolicy`` fails its Job, for the reason PodFailurePolicy. Only the
  Job's message tells which status it was, so the JobSet's rules match its text.
- A JobSet that restarts makes its Jobs anew. The Job's uid, which each pod has as a label, is the word for that start.
- Pod 0 of the Job has a name in DNS, before it is ready: that is where the processes meet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import yaml

from data_pipeline.errors import UserError
from launch.plan import LaunchPlan
from pretrain.distributed.signals import EXIT_BAD_STEPS, EXIT_NOT_SAVED, EXIT_PREEMPTED

NODE, CONTAINER, CONFIG = "node", "train", "config"
PORT = 29500
"""Pods have addresses of their own, so any port is free."""
CONFIG_FILE = PurePosixPath("/etc/nystrom/run.yaml")
MARGIN_SECONDS = 30
"""Between the moment at which processes that do not save in time are killed, and that at which the pod is."""
FINAL_STATUSES = (2, EXIT_NOT_SAVED, EXIT_BAD_STEPS)
NAME_LENGTH = 63
_FAILED = r"failed with exit code ({}) matching FailJob rule"
COMMENTS = {
    "failurePolicy:": "The first rule that fits decides; what fits none is restarted at most maxRestarts times.",
    "- name: FinalStatus": "2 a mistake, 74 could not save, 76 bad steps: again would be the same again.",
    "- name: SavedOrDisrupted": "75 saved and stopped, or the pod was preempted, evicted or lost: resumes, uncounted.",
    "backoffLimit: 0": "One pod less ends all; the JobSet starts them together.",
    "podFailurePolicy:": "These make the Job's failure tell which status it was; see failurePolicy.",
    "terminationGracePeriodSeconds:": "From SIGTERM to SIGKILL: for a save. nystrom is process 1 and hears it.",
    "- name: LAUNCH_ID": "Another one for each restart, the same in all pods: its logs are RUN/logs/LAUNCH_ID.",
    "medium: Memory": "A container's own /dev/shm has 64 MB: too little for NCCL and for workers of data.",
}
"""What people should know about a line of the file."""


@dataclass(frozen=True)
class Claim:
    """A volume that exists, and where the pods see it."""

    name: str
    mount: PurePosixPath


@dataclass(frozen=True)
class Pods:
    """What is asked of Kubernetes for each pod."""

    image: str
    gpus: int
    claims: tuple[Claim, ...]
    directory: PurePosixPath
    namespace: str | None = None
    gpu_resource: str = "nvidia.com/gpu"
    shm_size: str = "16Gi"
    cpu: str | None = None
    memory: str | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    service_account: str | None = None
    priority_class: str | None = None
    secrets: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    """The arguments of ``nystrom eval``; empty for no evaluation."""


class _Flow(list[Any]):
    """A list that stands on one line."""


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Kubernetes reads "1e3" and "y" as a number and a truth value, which PyYAML would write without quotes.
    quoted = "'" if re.match(r"[-+.]?\d|[yYnN]$", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else quoted)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(
    _Flow, lambda dumper, words: dumper.represent_sequence("tag:yaml.org,2002:seq", words, flow_style=True)
)


def object_name(name: str, nodes: int) -> str:
    """``name`` as a JobSet may be called: a DNS label of RFC 1035 that leaves room for its pods' names.

    Raises :class:`UserError` where nothing is left of it.
    """
    # NAME-node-0-INDEX-SUFFIX is a pod; "eval" is as long as "node".
    room = NAME_LENGTH - len(f"-{NODE}-0-{nodes - 1}-abcde")
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if label and not label[0].isalpha():
        label = f"run-{label}"
    label = label[:room].rstrip("-")
    if not label:
        raise UserError(f"name {name!r}: nothing of it can be a name in Kubernetes, which has a-z, 0-9 and '-'")
    return label


def manifest(name: str, config: str, plan: LaunchPlan, pods: Pods) -> str:
    """All documents as YAML with comments; ``config`` is the run's YAML."""
    documents = [_config_map(name, config, pods), _job_set(name, plan, pods)]
    header = (
        f"# The run {plan.name}: nodes: {plan.nodes}, processes of each: {plan.processes}.\n"
        f"# Start: kubectl apply -f THIS_FILE. Save and stop: kubectl delete jobset {name}. This file again resumes.\n"
        "# Needs Kubernetes 1.31 and JobSet 0.10, or later.\n"
    )
    parts = [yaml.dump(each, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000) for each in documents]
    # The configuration is the user's: no comment goes into it.
    return header + parts[0] + "---\n" + _comment(parts[1])


def _comment(text: str) -> str:
    lines = []
    for line in text.splitlines():
        words = line.lstrip()
        comment = next((said for start, said in COMMENTS.items() if words.startswith(start)), None)
        if comment is not None:
            lines.append(f"{line[: len(line) - len(words)]}# {comment}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _metadata(name: str, run: str, pods: Pods) -> dict[str, Any]:
    namespace = {"namespace": pods.namespace} if pods.namespace is not None else {}
    return {
        "name": name,
        **namespace,
        "labels": {"app.kubernetes.io/name": "nystrom", "app.kubernetes.io/instance": run},
    }


def _config_map(name: str, config: str, pods: Pods) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(f"{name}-{CONFIG}", name, pods),
        "data": {CONFIG_FILE.name: config},
    }


def _job_set(name: str, plan: LaunchPlan, pods: Pods) -> dict[str, Any]:
    master = f"{name}-{NODE}-0-0.{name}"
    command = plan.node_command(str(plan.nodes), "JOB_COMPLETION_INDEX", master, str(PORT), "$(LAUNCH_ID)")
    jobs = [_replicated_job(NODE, CONTAINER, command, plan.nodes, name, plan, pods)]
    if pods.evaluation:
        words = [*plan.program, "local", "--nproc", str(plan.processes), "--", *pods.evaluation]
        after = _replicated_job("eval", "eval", words, 1, name, plan, pods)
        jobs.append({"name": "eval", "dependsOn": [{"name": NODE, "status": "Complete"}], **after})
    final = "|".join(map(str, FINAL_STATUSES))
    rules: list[dict[str, Any]] = [
        {
            "name": "FinalStatus",
            "action": "FailJobSet",
            "onJobFailureReasons": _Flow(["PodFailurePolicy"]),
            "onJobFailureMessagePatterns": [_FAILED.format(final)],
        },
        {
            "name": "SavedOrDisrupted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": _Flow(["PodFailurePolicy"]),
            "onJobFailureMessagePatterns": [
                _FAILED.format(EXIT_PREEMPTED),
                "has condition DisruptionTarget matching FailJob rule",
            ],
        },
    ]
    if pods.evaluation:
        rules.append({"name": "EvaluationFailed", "action": "FailJobSet", "targetReplicatedJobs": _Flow(["eval"])})
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(name, name, pods),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": plan.max_restarts, "rules": rules},
            "replicatedJobs": jobs,
        },
    }


def _replicated_job(
    job: str, container: str, command: Sequence[str], count: int, name: str, plan: LaunchPlan, pods: Pods
) -> dict[str, Any]:
    def fails(statuses: Sequence[int]) -> dict[str, Any]:
        on = {"containerName": container, "operator": "In", "values": _Flow(statuses)}
        return {"action": "FailJob", "onExitCodes": on}

    disrupted = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {
        "name": job,
        "replicas": 1,
        "template": {
            "spec": {
                "completionMode": "Indexed",
                "completions": count,
                "parallelism": count,
                "backoffLimit": 0,
                "podReplacementPolicy": "Failed",
                "podFailurePolicy": {"rules": [fails(FINAL_STATUSES), fails([EXIT_PREEMPTED]), disrupted]},
                "template": {
                    "metadata": {"labels": _metadata(name, name, pods)["labels"]},
                    "spec": _pod(container, command, name, plan, pods),
                },
            }
        },
    }


def _pod(container: str, command: Sequence[str], name: str, plan: LaunchPlan, pods: Pods) -> dict[str, Any]:
    chosen = {
        "serviceAccountName": pods.service_account,
        "priorityClassName": pods.priority_class,
        "nodeSelector": dict(pods.node_selector) or None,
    }
    names = [f"claim-{i}" for i in range(len(pods.claims))]
    job_uid = {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/controller-uid']"}}
    secrets = [{"secretRef": {"name": secret}} for secret in pods.secrets]
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(plan.stop_timeout) + MARGIN_SECONDS,
        **{key: value for key, value in chosen.items() if value is not None},
        "containers": [
            {
                "name": container,
                "image": pods.image,
                "workingDir": str(pods.directory),
                "command": _Flow(command),
                "env": [
                    {"name": "LAUNCH_ID", "valueFrom": job_uid},
                    *({"name": key, "value": value} for key, value in plan.environment.items()),
                ],
                **({"envFrom": secrets} if secrets else {}),
                **_resources(pods),
                "volumeMounts": [
                    {"name": CONFIG, "mountPath": str(CONFIG_FILE.parent), "readOnly": True},
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                    *(
                        {"name": volume, "mountPath": str(claim.mount)}
                        for volume, claim in zip(names, pods.claims, strict=True)
                    ),
                ],
            }
        ],
        "volumes": [
            {"name": CONFIG, "configMap": {"name": f"{name}-{CONFIG}"}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": pods.shm_size}},
            *(
                {"name": volume, "persistentVolumeClaim": {"claimName": claim.name}}
                for volume, claim in zip(names, pods.claims, strict=True)
            ),
        ],
    }


def _resources(pods: Pods) -> dict[str, Any]:
    """Requests equal to limits: a pod with less could be throttled, or ended for memory, by its neighbours."""
    wanted = {"cpu": pods.cpu, "memory": pods.memory, pods.gpu_resource: str(pods.gpus) if pods.gpus else None}
    limits = {key: value for key, value in wanted.items() if value is not None}
    return {"resources": {"requests": dict(limits), "limits": limits}} if limits else {}
