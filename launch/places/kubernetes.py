"""``nystrom launch kubernetes``: a JobSet, a pod for each node, written as a file and given to ``kubectl``."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path, PurePosixPath

from data_pipeline.errors import UserError
from launch.places import PLACES, Place
from launch.places._kubernetes_manifest import CONFIG_FILE, Claim, Pods, manifest, object_name
from launch.plan import SECRETS, LaunchPlan, Rendered, make_plan

PROGRAM = ("nystrom", "launch")
"""In the image."""
KUBECTL_SECONDS = 60.0
_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18} | {
    f"{unit}i": 1024 ** (power + 1) for power, unit in enumerate("KMGTPE")
}
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


@PLACES.register
class Kubernetes(Place):
    """A cluster of Kubernetes with JobSet."""

    name = "kubernetes"
    summary = "a JobSet for Kubernetes, a pod for each node, applied by kubectl"
    description = (
        "Write the YAML of a JobSet that trains with a pod for each node, and give it to kubectl. The file is for "
        "people to read and keep. The run folder and the shards lie on volumes that exist; the image has nystrom."
    )
    examples = (
        "nystrom launch kubernetes --config configs/causal-16k.yaml --image registry/nystrom:1 --nodes 2 "
        "--gpus-per-node 8 --pvc data:/data --set output_dir=/data/runs --dry-run",
    )
    exit_status: Mapping[int, str] = {0: "the files are written, and the run is submitted; a dry run: nothing is done"}
    epilog = (
        "A pod that is preempted or evicted saves and ends with status 75, and the JobSet starts again. Statuses 2, "
        "74 and 76 end it; others restart it --max-restarts times. To save and stop: kubectl delete jobset NAME."
    )

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """What is asked of Kubernetes for each pod."""
        add = parser.add_argument
        add("--image", required=True, metavar="IMAGE", help="container image with nystrom")
        add("--nodes", type=int, default=1, metavar="N", help="nodes, a pod each (default: 1)")
        add("--gpus-per-node", type=int, default=0, metavar="G", help="GPUs of each pod (default: none)")
        add("--nproc", type=int, metavar="P", help="processes of each pod (default: one for each GPU, or one)")
        add(
            "--pvc",
            action="append",
            default=[],
            metavar="CLAIM:/MOUNT",
            help="PersistentVolumeClaim and where the pods see it; may be repeated. The run folder must be on one",
        )
        add("--workdir", metavar="/DIR", help="folder that relative paths start from (default: the first --pvc)")
        add("--namespace", metavar="NAME", help="namespace (default: that of kubectl's context)")
        add("--cpu", metavar="QUANTITY", help="cores of each pod, such as 64")
        add("--memory", metavar="QUANTITY", help="memory of each pod with its shared memory, such as 512Gi")
        add("--shm-size", default="16Gi", metavar="QUANTITY", help="size of /dev/shm (default: 16Gi)")
        add("--gpu-resource", default="nvidia.com/gpu", metavar="NAME", help="what GPUs are called (nvidia.com/gpu)")
        add(
            "--node-selector",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="label that nodes must have; may be repeated",
        )
        add("--service-account", metavar="NAME", help="service account of the pods")
        add("--priority-class", metavar="NAME", help="priority class of the pods")
        add(
            "--env-secret",
            action="append",
            default=[],
            metavar="SECRET",
            help="Secret whose keys become environment variables, such as WANDB_API_KEY; may be repeated",
        )
        add(
            "--eval",
            nargs="+",
            default=[],
            metavar="SUITE",
            help="suites of `nystrom eval` for one more pod, when training is done",
        )
        add("--out", type=Path, metavar="FILE", help="the file (default: NAME.yaml)")

    @staticmethod
    def plan(args: argparse.Namespace) -> LaunchPlan:
        """The plan; of the environment only what ``--env`` names, for an image has another machine's paths."""
        if args.gpus_per_node < 0:
            raise UserError(f"--gpus-per-node {args.gpus_per_node}: 0 or more")
        if args.resume == "never":
            raise UserError("--resume never: each restart of a pod would begin anew; give the run another name instead")
        processes = args.nproc if args.nproc is not None else max(1, args.gpus_per_node)
        if args.gpus_per_node and processes > args.gpus_per_node:
            raise UserError(f"--nproc {processes}: more than --gpus-per-node {args.gpus_per_node}")
        plan = make_plan(args, nodes=args.nodes, processes=processes, program=PROGRAM)
        asked = [each.partition("=")[0] for each in args.env]
        for name in asked:
            if SECRETS.search(name):
                raise UserError(
                    f"--env {name}: its value would stand in the file. Put it into a Secret (kubectl create secret "
                    f"generic my-secret --from-literal={name}=...) and give --env-secret my-secret"
                )
        words = ["--config", str(CONFIG_FILE), "--resume", args.resume, *(["--verbose"] if args.verbose else [])]
        return LaunchPlan(
            **{
                **vars(plan),
                "words": tuple(words),
                "environment": {name: plan.environment[name] for name in asked},
            }
        )

    @staticmethod
    def render(plan: LaunchPlan, args: argparse.Namespace) -> Rendered:
        """The file and the command that applies it."""
        from pretrain.config import load_config

        pods = _pods(args)
        name = object_name(plan.name, plan.nodes)
        _check_run_folder(plan, pods)
        if args.eval:
            from launch.evaluation import check_command

            run_dir = str(pods.directory / plan.run_dir)
            words = ("eval", *check_command(["eval", *args.eval, "--checkpoint", run_dir]))
            pods = Pods(**{**vars(pods), "evaluation": words})
        text = manifest(name, load_config(args.config, args.overrides).to_yaml(), plan, pods)
        out = args.out if args.out is not None else Path(f"{name}.yaml")
        space = ["--namespace", pods.namespace] if pods.namespace is not None else []
        return Rendered(
            files={out: text},
            commands=[(["kubectl", "apply", *space, "-f", str(out)], "starts it, once it is written")],
        )

    @staticmethod
    def start(plan: LaunchPlan, args: argparse.Namespace, rendered: Rendered) -> int:
        """Write the file, and apply it where there is a kubectl that reaches a cluster with JobSet."""
        name = object_name(plan.name, plan.nodes)
        if name != plan.name:
            print(f"in Kubernetes the run is called {name}: {plan.name!r} is no DNS label", file=sys.stderr)
        ((out, text),) = rendered.files.items()
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
        ((command, _),) = rendered.commands
        if shutil.which("kubectl") is None:
            raise UserError(
                f"{out} is written, but there is no kubectl here: give {' '.join(command)} where there is one"
            )
        space = command[2:-2]
        _check_cluster(name, space, out)
        said = _kubectl(command[1:])
        if said.returncode:
            raise UserError(f"kubectl refuses {out}: {_last_words(said)}")
        print(said.stdout.rstrip())
        suffix = "".join(f" {word}" for word in space)
        print(
            f"  logs:  kubectl logs -f job/{name}-node-0{suffix}\n"
            f"  state: kubectl get jobset {name}{suffix}, and where its volume is seen nystrom launch status\n"
            f"  stop:  kubectl delete jobset {name}{suffix} (saves first; the same file resumes)"
        )
        return 0


def _pods(args: argparse.Namespace) -> Pods:
    """What the arguments ask for; raises :class:`UserError` for a value that Kubernetes would refuse."""
    claims = tuple(map(_claim, args.pvc))
    if not claims:
        raise UserError("--pvc CLAIM:/MOUNT is missing: the run folder must outlive its pods")
    mounts = [claim.mount for claim in claims]
    taken = [*mounts, PurePosixPath("/dev/shm"), CONFIG_FILE.parent]
    doubled = next((mount for mount in mounts if taken.count(mount) > 1), None)
    if doubled is not None:
        raise UserError(f"--pvc: {doubled} is taken already")
    for option, value in (
        ("--namespace", args.namespace),
        ("--service-account", args.service_account),
        ("--priority-class", args.priority_class),
        *(("--env-secret", secret) for secret in args.env_secret),
    ):
        if value is not None:
            _check_name(option, value)
    if not args.image or any(c.isspace() for c in args.image):
        raise UserError(f"--image {args.image!r}: the name of an image, such as registry/nystrom:1")
    if not _LABEL_KEY.fullmatch(args.gpu_resource) or "/" not in args.gpu_resource:
        raise UserError(f"--gpu-resource {args.gpu_resource}: a name such as nvidia.com/gpu or amd.com/gpu")
    if args.cpu is not None and not re.fullmatch(r"\d+(\.\d+)?|\d+m", args.cpu):
        raise UserError(f"--cpu {args.cpu}: a number of cores such as 64, or thousandths such as 500m")
    shm = _bytes("--shm-size", args.shm_size)
    if args.memory is not None and _bytes("--memory", args.memory) <= shm:
        raise UserError(
            f"--memory {args.memory}: files in /dev/shm count too, so it must be well above --shm-size {args.shm_size}"
        )
    directory = PurePosixPath(args.workdir) if args.workdir is not None else mounts[0]
    if not directory.is_absolute():
        raise UserError(f"--workdir {args.workdir}: it must begin with '/'")
    return Pods(
        image=args.image,
        gpus=args.gpus_per_node,
        claims=claims,
        directory=directory,
        namespace=args.namespace,
        gpu_resource=args.gpu_resource,
        shm_size=args.shm_size,
        cpu=args.cpu,
        memory=args.memory,
        node_selector=dict(map(_label, args.node_selector)),
        service_account=args.service_account,
        priority_class=args.priority_class,
        secrets=tuple(args.env_secret),
    )


def _claim(text: str) -> Claim:
    name, _, mount = text.partition(":")
    _check_name("--pvc", name)
    if not mount.startswith("/") or mount == "/" or ":" in mount or ".." in PurePosixPath(mount).parts:
        raise UserError(f"--pvc {text}: it must be CLAIM:/MOUNT, such as data:/data")
    return Claim(name, PurePosixPath(mount))


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
        raise UserError(f"--node-selector {text}: it must be KEY=VALUE, such as cloud.google.com/gke-spot=true")
    return key, value


def _check_name(option: str, name: str) -> None:
    if len(name) > 63 or not _SUBDOMAIN.fullmatch(name):
        raise UserError(f"{option} {name!r}: a name in Kubernetes has a-z, 0-9, '-' and '.', and at most 63 of them")


def _bytes(option: str, text: str) -> Decimal:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTPE]i|[kMGTPE])?", text)
    amount = Decimal(found[1]) * Decimal(_UNITS[found[2] or ""]) if found else Decimal(0)
    if amount <= 0:
        raise UserError(f"{option} {text}: an amount of memory such as 16Gi or 500M")
    return amount


def _check_run_folder(plan: LaunchPlan, pods: Pods) -> None:
    """The run folder must be on a claim: what a pod writes elsewhere goes with it."""
    run_dir = pods.directory / plan.run_dir
    if ".." in run_dir.parts or not any(run_dir.is_relative_to(claim.mount) for claim in pods.claims):
        mounts = ", ".join(str(claim.mount) for claim in pods.claims)
        raise UserError(
            f"the run folder {run_dir} is on none of the volumes ({mounts}), so it would be lost with its pod: "
            f"--set output_dir={pods.claims[0].mount}/runs"
        )


def _check_cluster(name: str, space: Sequence[str], out: Path) -> None:
    """Raise :class:`UserError` unless kubectl reaches a cluster that has JobSet, and no such run yet."""
    found = _kubectl(["api-resources", "--api-group=jobset.x-k8s.io", "-o", "name"])
    if found.returncode:
        raise UserError(f"{out} is written, but kubectl reaches no cluster: {_last_words(found)}")
    if "jobsets.jobset.x-k8s.io" not in found.stdout:
        raise UserError(
            f"{out} is written, but this cluster has no JobSet: an administrator installs it once "
            "(https://jobset.sigs.k8s.io/docs/installation/)"
        )
    there = _kubectl(["get", "jobset", name, *space, "--ignore-not-found", "-o", "name"])
    if there.returncode:
        raise UserError(f"{out} is written, but kubectl may not look for the JobSet {name}: {_last_words(there)}")
    if there.stdout.strip():
        raise UserError(
            f"{out} is written, but there is a JobSet {name} already, which cannot be changed. Delete it first (one "
            f"that runs saves and ends): kubectl delete jobset {' '.join([name, *space])}"
        )


def _kubectl(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["kubectl", *words], capture_output=True, text=True, timeout=KUBECTL_SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess([], 1, "", f"no answer in {KUBECTL_SECONDS:g} s")
    except OSError as error:
        return subprocess.CompletedProcess([], 1, "", str(error))


def _last_words(said: subprocess.CompletedProcess[str]) -> str:
    lines = (said.stderr or said.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit status {said.returncode}"
