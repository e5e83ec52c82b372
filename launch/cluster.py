"""``cluster.yaml``: what a site's jobs have in common, so that commands need not repeat it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator

from data_pipeline.configuration import Strict, faults
from data_pipeline.errors import UserError
from pretrain.config.load import read_yaml


class ContainerConfig(Strict):
    """The container that the processes run in."""

    image: str | None = Field(None, description="Image: a file, or what the runtime takes.")
    runtime: Literal["pyxis", "apptainer"] = Field(
        "pyxis", description="pyxis: srun's option --container-image. apptainer: `apptainer exec`."
    )
    mounts: tuple[str, ...] = Field(
        (), description="Folders that the container sees, FOLDER or FOLDER:PLACE. The working directory is always one."
    )


class ClusterConfig(Strict):
    """A site's habits. Every key is an option of ``nystrom launch slurm`` too, which wins over the file."""

    partition: str | None = Field(None, description="Partition.")
    account: str | None = Field(None, description="Account.")
    qos: str | None = Field(None, description="Quality of service.")
    constraint: str | None = Field(None, description="Features of the nodes, as sbatch takes them.")
    time: str | None = Field(None, description="Time limit of a job, such as 24:00:00.")
    gpus_per_node: str | None = Field(None, description="GPUs of each node: a number, or TYPE:NUMBER.")
    processes_per_node: int | None = Field(None, ge=1, description="Processes of each node; left out: one for a GPU.")
    cpus_per_task: int | None = Field(None, ge=1, description="Cores of each node's task, for all its processes.")
    mem: str | None = Field(None, description="Memory of each node, such as 500G; 0 is all.")
    exclusive: bool = Field(False, description="Whole nodes.")
    requeue: bool = Field(False, description="Requeue the job when it is preempted or hits its time limit.")
    sbatch: tuple[str, ...] = Field((), description="Further options of sbatch, each --NAME=VALUE.")
    setup: tuple[str, ...] = Field((), description="Lines of shell before the run, such as `module load cuda`.")
    env: dict[str, str] = Field({}, description="Environment variables of all processes.")
    interface: str | None = Field(
        None, description="Network interface of NCCL and gloo: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME."
    )
    container: ContainerConfig = Field(ContainerConfig(), description="The container that the processes run in.")
    shared: tuple[str, ...] = Field((), description="Folders that all nodes see, although they may look local.")

    @field_validator("time", mode="before")
    @classmethod
    def _time(cls, value: object) -> object:
        if isinstance(value, int):  # YAML 1.1 reads 24:00:00 as 86400, which Slurm would take for minutes
            raise ValueError("write it in quotes, such as '24:00:00': YAML reads it as a number without them")
        return value

    @field_validator("gpus_per_node", "mem", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("env", mode="before")
    @classmethod
    def _texts(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {key: str(v) if isinstance(v, int) and not isinstance(v, bool) else v for key, v in value.items()}


def load_cluster(path: str | Path) -> ClusterConfig:
    """Read a ``cluster.yaml``; raises :class:`UserError` with the file and the key for what cannot be."""
    raw = read_yaml(path)
    try:
        return ClusterConfig.model_validate(raw)
    except ValidationError as error:
        lines = faults(error, ClusterConfig)
        raise UserError(f"{path}: " + ("; ".join(lines) if len(lines) == 1 else "\n  " + "\n  ".join(lines))) from None
