"""What one process holds of weights, gradients and optimizer state, by ZeRO stage, without building any of it.

The accounting of Rajbhandari et al. 2020 (ZeRO, section 3) as DeepSpeed 0.19.8 does it, paddings and buffers included;
``tests/pretrain/planning/test_planning.py`` compares it with a real engine's tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrain.config import OptimizerConfig, RunConfig
from pretrain.engine.deepspeed_config import build_deepspeed_config
from pretrain.optim.optimizer import values_kept

if TYPE_CHECKING:
    from pretrain.model.config import ModelConfig

MASTER = 4
"""Bytes of a float32 value: master weights, moments, averages."""

# DeepSpeed 0.19.8's defaults, where the generated JSON does not say otherwise.
PERSISTENCE_THRESHOLD = 100_000
MAX_REUSE_DISTANCE = 1_000_000_000
FLAT_ALIGNMENT = 2
"""Stages 1 and 2 pad a group of parameters to a multiple of this times the processes."""


@dataclass(frozen=True)
class Group:
    """Parameters that share hyper-parameters; ZeRO lays each group out by itself."""

    name: str
    numels: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of all of them."""
        return sum(self.numels)


def parameter_sizes(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[Group, ...]:
    """The groups of the optimizer that a run would build, from the model's own code, without allocating weights."""
    return _parameter_sizes(model, optimizer.model_dump_json())


@functools.lru_cache(maxsize=8)
def _parameter_sizes(model: ModelConfig, optimizer_json: str) -> tuple[Group, ...]:
    # As JSON, since the settings of an optimizer's kind are a dictionary, which has no hash.
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pretrain.model.transformer import build_model
    from pretrain.optim.optimizer import build_optimizer

    with FakeTensorMode():
        optimizer = OptimizerConfig.model_validate_json(optimizer_json)
        groups = build_optimizer(build_model(model), optimizer).param_groups
        return tuple(Group(g["name"], tuple(p.numel() for p in g["params"])) for g in groups)


@dataclass(frozen=True)
class Zero:
    """What DeepSpeed is told that decides how much memory it takes."""

    stage: int
    processes: int
    width: int
    """Bytes of a weight and of a gradient as the backward pass makes it."""
    accumulated_width: int
    """Bytes of a gradient that is added to over micro-batches."""
    reduced_width: int
    """Bytes of a gradient on its way between processes."""
    bucket: int
    """Elements of the buffer in which gradients are reduced."""
    persistence_threshold: int
    max_reuse_distance: int
    offload: bool

    @classmethod
    def of(cls, config: RunConfig, processes: int) -> Zero:
        """From the JSON that the run would hand to DeepSpeed."""
        json = build_deepspeed_config(config)
        block = json["zero_optimization"]
        width = 4 if config.precision == "fp32" else 2
        widths = {"fp32": 4, "bf16": 2, "fp16": 2, None: width}
        return cls(
            stage=config.zero_stage,
            processes=processes,
            width=width,
            accumulated_width=widths[json.get("data_types", {}).get("grad_accum_dtype")],
            reduced_width=widths[json.get("communication_data_type")],
            bucket=int(block["reduce_bucket_size"]),
            persistence_threshold=int(block.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)),
            max_reuse_distance=int(block.get("stage3_max_reuse_distance", MAX_REUSE_DISTANCE)),
            offload="offload_optimizer" in block,
        )

    def partition(self, group: Group) -> int:
        """Elements of a group that one process updates, padding included."""
        if self.stage == 0:
            return group.numel
        if self.stage == 3:  # every parameter is cut by itself
            return sum(-(-numel // self.processes) for numel in group.numels)
        unit = FLAT_ALIGNMENT * self.processes
        return -(-group.numel // unit) * unit // self.processes

    def is_persistent(self, numel: int) -> bool:
        """Stage 3 keeps small parameters whole on every process."""
        return self.stage == 3 and self.processes > 1 and numel <= self.persistence_threshold


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one process, between the steps of a run."""

    weights: int
    gradients: int
    """When a step's last micro-batch is done. Stages 0 to 2 free them in the step."""
    optimizer: int
    """Master weights, moments, averages."""
    buffers: int
    """DeepSpeed's own: stage 3's bucket. (Those of stages 1 and 2 come and go with the gradients.)"""
    host_optimizer: int = 0
    """Of ``offload_optimizer``: the optimizer's part, and float32 gradients for it, in the host's memory."""

    @property
    def total(self) -> int:
        """On the device."""
        return self.lasting_on_device + self.gradients

    @property
    def lasting_on_device(self) -> int:
        """Without the gradients, which come and go."""
        return self.weights + self.optimizer + self.buffers

    @property
    def lasting(self) -> int:
        """That and what is in the host's memory."""
        return self.lasting_on_device + self.host_optimizer


def state_bytes(groups: Sequence[Group], config: RunConfig, processes: int) -> StateBytes:
    """What each of ``processes`` holds of a model whose parameters are ``groups``."""
    zero = Zero.of(config, processes)
    partitions = {group.name: zero.partition(group) for group in groups}
    own = sum(partitions.values())
    # A copy to update in float32, but at stage 0, and at stage 3 where the weights are float32 themselves.
    master = zero.stage in (1, 2) or (zero.stage == 3 and zero.width != MASTER)
    optimizer = sum(
        MASTER * (values_kept(config.optimizer, name) + master) * numel for name, numel in partitions.items()
    )
    everything = sum(group.numel for group in groups)
    numels = [numel for group in groups for numel in group.numels]
    if zero.stage == 3:
        gathered = sum(numel for numel in numels if zero.is_persistent(numel))
        weights = zero.width * (own + gathered)
    else:
        weights = zero.width * (everything if zero.stage == 0 else own * processes)
    gradients = zero.accumulated_width * (own if zero.stage >= 2 else everything)
    buffers = zero.reduced_width * zero.bucket if zero.stage == 3 else 0
    if not zero.offload:
        return StateBytes(weights, gradients, optimizer, buffers)
    # The host also has a gradient of each master weight, and where weights come from on their way back.
    host = optimizer + MASTER * own + zero.width * own
    if zero.stage == 3:
        return StateBytes(weights, 0, 0, buffers, host + gradients - zero.width * own)
    return StateBytes(weights, gradients, 0, zero.width * max(numels), host + zero.width * max(numels))
