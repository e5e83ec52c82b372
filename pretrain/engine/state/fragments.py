"""This process's flat piece of every state of a parameter, at every ZeRO stage.

ZeRO keeps the float32 master weights and the optimizer's state of many parameters in a few flat tensors, and gives each
process a part of them (Rajbhandari et al. 2020, section 5). At stages 1 and 2 the group's parameters lie one after
another, and each process has an equal stretch of that. At stage 3 each process has an equal stretch of each parameter,
the last one padded. At stage 0 everything is everywhere. Here that becomes one answer: where, in which tensor, this
process holds which elements of the flattened parameter.

DeepSpeed 0.19.8's own ``safe_get_full_*`` and ``safe_set_full_*`` are not used. They know nothing of stage 0, and
setting fails at stage 3 when the processes do not divide the parameter. At stages 1 and 2 they rest on ``_hp_mapping``,
which forgets the order of ``round_robin_gradients`` and, after a load, the optimizer's state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.errors import UserError

MASTER = "fp32"
"""Name of the float32 master weights among the states of a parameter (without mixed precision the weights are that)."""


class Fragment(NamedTuple):
    """Elements ``start`` to ``start + len(values)`` of a flattened parameter: a flat view, writable, possibly empty."""

    values: torch.Tensor
    start: int


class Place(NamedTuple):
    """Where a parameter's piece lies: in ``owner`` (the tensor by which the optimizer knows it), at ``offset``."""

    owner: torch.Tensor
    offset: int
    numel: int
    start: int  # of the piece, in the flattened parameter


def places(engine: Any) -> dict[nn.Parameter, Place]:
    """Every parameter that is optimized, group by group in the order of its group's flat tensors, with its place.

    ``engine`` is DeepSpeed's. Raises :class:`UserError` if the states are not in memory (offloaded to NVMe).
    """
    found: dict[nn.Parameter, Place] | None = engine.__dict__.get("_nystrom_places")
    if found is None:
        stage = engine.zero_optimization_stage()
        find = _whole_parameters if stage == 0 else _stretches_of_parameters if stage == 3 else _stretches_of_groups
        found = engine.__dict__["_nystrom_places"] = find(engine.optimizer)
    return found


def state_names(engine: Any, parameter: nn.Parameter) -> list[str]:
    """Names of the states that have a value for each element: ``fp32`` and those of the optimizer, ``exp_avg`` etc.

    The optimizer creates its own at its first step. ``step`` is none of them, nor are other scalars. A parameter that
    is frozen has no states.
    """
    place = places(engine).get(parameter)
    if place is None:
        return []
    state = engine.optimizer.state.get(place.owner, {})
    return [MASTER, *(name for name, value in state.items() if is_per_element(name, value, place.owner.shape))]


def is_per_element(name: str, value: Any, shape: torch.Size) -> bool:
    """Whether an entry of the optimizer's state of a tensor of this shape belongs to its elements one by one."""
    # By name too: a parameter of no axis has the shape of a step count.
    return isinstance(value, torch.Tensor) and value.shape == shape and name != "step"


def fragment(engine: Any, parameter: nn.Parameter, name: str) -> Fragment:
    """This process's piece of the state ``name`` of a parameter. Raises ``KeyError`` if there is no such state."""
    place = places(engine)[parameter]
    whole = place.owner if name == MASTER else engine.optimizer.state[place.owner][name]
    return Fragment(whole.detach().view(-1).narrow(0, place.offset, place.numel), place.start)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the parameter, also where ZeRO-3 has left an empty one behind."""
    return getattr(parameter, "ds_shape", parameter.shape)


def get_full(engine: Any, parameter: nn.Parameter, name: str) -> torch.Tensor:
    """The whole state: float32, on the CPU, in the parameter's shape. All processes must call it alike."""
    shape = full_shape(parameter)
    values, start = fragment(engine, parameter, name)
    if len(values) == shape.numel() and engine.zero_optimization_stage() == 0:
        return values.float().reshape(shape).to("cpu", copy=True)
    whole = torch.zeros(shape.numel(), dtype=torch.float32, device=engine.device)
    whole[start : start + len(values)] = values.to(whole.device)
    # Added as whole numbers, which leaves every bit in place: as floats, -0.0 + 0.0 is 0.0.
    dist.all_reduce(whole.view(torch.int32))
    return whole.reshape(shape).cpu()


@torch.no_grad()
def set_full(engine: Any, parameter: nn.Parameter, name: str, value: torch.Tensor) -> None:
    """Write this process's piece of ``value`` (the parameter's shape, any device); each process writes its own.

    After ``fp32`` was written, call :func:`sync_model_weights`.
    """
    if value.shape != full_shape(parameter):
        raise ValueError(f"the value has the shape {tuple(value.shape)}, not {tuple(full_shape(parameter))}")
    values, start = fragment(engine, parameter, name)
    values.copy_(value.reshape(-1)[start : start + len(values)])


@torch.no_grad()
def sync_model_weights(engine: Any) -> None:
    """Let the weights that the model computes with follow the master weights, on all processes together."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        # As DeepSpeed's own load does: small parameters that persist whole are dropped, then gathered anew.
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()


def _whole_parameters(optimizer: Any) -> dict[nn.Parameter, Place]:
    return {p: Place(p, 0, p.numel(), 0) for group in optimizer.param_groups for p in group["params"]}


def _stretches_of_groups(optimizer: Any) -> dict[nn.Parameter, Place]:
    """Stages 1 and 2: process r has the r-th equal stretch of the group's parameters laid end to end."""
    if hasattr(optimizer, "round_robin_bit16_groups"):
        groups, owners = optimizer.round_robin_bit16_groups, optimizer.single_partition_of_fp32_groups
        offsets = optimizer.round_robin_bit16_offsets
    else:  # BF16_Optimizer, which stage 1 uses when gradients accumulate in float32
        groups, owners = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
        offsets = [[sum(p.numel() for p in group[:i]) for i in range(len(group))] for group in groups]
    out = {}
    for number, (group, owner) in enumerate(zip(groups, owners, strict=True)):
        first = dist.get_rank(group=optimizer.real_dp_process_group[number]) * owner.numel()
        for parameter, offset in zip(group, offsets[number], strict=True):
            low = min(max(offset, first), first + owner.numel())
            high = min(max(offset + parameter.numel(), low), first + owner.numel())
            out[parameter] = Place(owner, low - first, high - low, max(low - offset, 0) if high > low else 0)
    return out


def _stretches_of_parameters(optimizer: Any) -> dict[nn.Parameter, Place]:
    """Stage 3: process r has the r-th equal stretch of each parameter; the last ones may be short or empty."""
    if optimizer.swap_optimizer:
        raise UserError("optimizer state that was offloaded to NVMe can only be used by as many processes as wrote it")
    out = {}
    for group, owner in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            start = min(optimizer._get_param_partition_rank(parameter) * size, parameter.ds_numel)
            out[parameter] = Place(owner, offset, min(size, parameter.ds_numel - start), start)
            offset += size
    return out
