"""Resume with other processes, another ZeRO stage or precision: each process takes its piece of every state.

DeepSpeed's load (0.19.8) works by position. On the processes, stage and groups that wrote the files it is exact; on
others it fails or, worse, does not. (Stage 1 loads into 2; a parameter that moved to another group shifts all after
it.) Its universal checkpoints are no way out: no stage 0, none between 1 and 3, AdamW's states only. At stage 3 every
group gets the first one's hyper-parameters, and all share one step count, which AdamW then counts up once for each.
"""

from __future__ import annotations

from typing import Any

import torch

from data_pipeline.errors import UserError
from pretrain.engine.state import fragments
from pretrain.engine.state.saved import SavedStates, ZeroLayout


def zero_layout(engine: Any) -> ZeroLayout:
    """Where DeepSpeed's ``engine`` would expect what in the files of its own ``load_checkpoint``."""
    import torch.distributed as dist

    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    names = tuple(map(tuple, group_names(engine)))
    paddings = getattr(optimizer, "round_robin_bit16_padding", None) or [[0] * len(group) for group in names]
    bf16_optimizer = stage == 1 and not hasattr(optimizer, "round_robin_bit16_groups")
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    return ZeroLayout(dist.get_world_size(), stage, names, tuple(map(tuple, paddings)), bf16_optimizer, precision)


def group_names(engine: Any) -> list[list[str]]:
    """Names of the optimized parameters in the order of the files, a list for each flat tensor (stage 0: group)."""
    if engine.zero_optimization_stage():
        return [list(group) for group in engine._get_zero_param_shapes()]
    return [[engine.param_names[p] for p in group["params"]] for group in engine.optimizer.param_groups]


@torch.no_grad()
def restore(engine: Any, saved: SavedStates) -> None:
    """Put the states of a checkpoint, however it was laid out, into a fresh ``engine`` of DeepSpeed's.

    Each process reads the pieces that it will hold, so that besides them about one parameter is in memory. Raises
    :class:`UserError` on all processes alike if the checkpoint is of another model.
    """
    places = fragments.places(engine)
    names = {parameter: engine.param_names[parameter] for parameter in places}
    _check_model(names, saved)
    states: dict[torch.Tensor, dict[str, Any]] = {}
    for parameter, (owner, offset, numel, start) in places.items():
        state = states.setdefault(owner, {})
        for name in saved.state_names(names[parameter]):
            piece = saved.read(names[parameter], name, start, start + numel)
            if name == fragments.MASTER:
                whole = owner
            else:
                whole = state.setdefault(name, torch.zeros_like(owner, requires_grad=False))
            whole.detach().view(-1)[offset : offset + numel] = piece.to(whole)
        for name, value in saved.scalars(names[parameter]).items():
            # Parameters that share a flat tensor share its step count, and one that never had a gradient is behind.
            # A copy of its own for each tensor: a step count that is shared is counted up once for each.
            own = value.clone() if isinstance(value, torch.Tensor) else value
            state[name] = max(state[name], own) if name in state else own
    _set_optimizer_state(engine, states, {group["name"]: group for group in saved.groups})
    fragments.sync_model_weights(engine)
    for name, buffer in engine.module.named_buffers():
        if name in saved.buffers:
            buffer.copy_(saved.buffers[name])
    # Only fp16's scales anything: another precision's would take its place, and the other way round.
    if saved.loss_scaler is not None and saved.layout.precision == zero_layout(engine).precision:
        engine.optimizer.loss_scaler = saved.loss_scaler
    for key, value in saved.counters.items():
        setattr(engine, key, value)


def _check_model(names: dict[Any, str], saved: SavedStates) -> None:
    shapes = {name: fragments.full_shape(parameter) for parameter, name in names.items()}
    for name in sorted(shapes.keys() | saved.shapes.keys()):
        if shapes.get(name) != saved.shapes.get(name):
            found, wanted = (
                "no such weights" if shape is None else f"the shape {tuple(shape)}"
                for shape in (saved.shapes.get(name), shapes.get(name))
            )
            raise UserError(f"checkpoint {saved.folder} is of another model: {name} has {found}, wanted is {wanted}")


def _set_optimizer_state(engine: Any, states: dict[torch.Tensor, dict[str, Any]], groups: dict[str, Any]) -> None:
    """Hand the states and the groups' saved hyper-parameters to the optimizer by its own ``load_state_dict``.

    So that devices are as its kind wants them (a fused AdamW's step count, say, beside the weights).
    """
    at_stage_3 = engine.zero_optimization_stage() == 3
    wrapper = engine.optimizer
    optimizer = wrapper if engine.zero_optimization_stage() == 0 else wrapper.optimizer
    if at_stage_3:  # where the groups are empty between steps
        wrapper._set_fp32_optimizer_param_groups()
    order = [owner for group in optimizer.param_groups for owner in group["params"]]
    body = optimizer.state_dict()
    for group in body["param_groups"]:
        kept = {key: value for key, value in groups.get(group.get("name"), {}).items() if key != "params"}
        group.update(kept)
    body["state"] = {i: states[owner] for i, owner in enumerate(order) if states[owner]}
    optimizer.load_state_dict(body)
    if at_stage_3:
        wrapper._clear_fp32_optimizer_param_groups()
