"""The optimizer that a configuration asks for: which weights decay, and a running average of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pretrain.optim.kind import DECAY, KINDS, NO_DECAY

if TYPE_CHECKING:
    from pretrain.config import OptimizerConfig

AVERAGE = "ema"
"""Name of the average in the optimizer's state, and hence in the files of a checkpoint."""


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameters in groups with their hyper-parameters; the groups' names are what a loaded one is known by.

    - one of the kind's own (``muon`` of that kind), if it asks for one: the weights of the linear maps in the layers.
    - ``decay``: other weights of two axes and more. The head's own matrix is one of them.
    - ``no_decay``: what has one axis or none (norms, biases, gates), and what its module names in a method
      ``no_weight_decay``. With ``decay_embeddings: false`` also the word and position tables, and with them a head that
      is tied to the words.

    A tied weight appears once. Frozen parameters are left out.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    exempt = {
        id(getattr(module, name)) for module in model.modules() for name in getattr(module, "no_weight_decay", set)()
    }
    inner = [m for layers in model.children() if isinstance(layers, nn.ModuleList) for m in layers.modules()]
    linear = {id(module.weight) for module in inner if isinstance(module, nn.Linear)}
    matrices = KINDS.get(config.kind).matrices
    names = [DECAY, NO_DECAY] if matrices is None else [matrices, DECAY, NO_DECAY]
    members: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if not config.decay_embeddings and id(parameter) in tables:
            exempt.add(id(parameter))
        if matrices is not None and id(parameter) in linear:
            members[matrices].append(parameter)
        elif parameter.ndim < 2 or id(parameter) in exempt:
            members[NO_DECAY].append(parameter)
        else:
            members[DECAY].append(parameter)
    return [
        {"name": name, "params": parameters, **_hyperparameters(name, config)}
        for name, parameters in members.items()
        if parameters
    ]


def _hyperparameters(group: str, config: OptimizerConfig) -> dict[str, Any]:
    own = KINDS.get(config.kind).hyperparameters(group, config)
    return {"weight_decay": 0.0 if group == NO_DECAY else config.weight_decay, **own}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of ``config.kind`` over :func:`parameter_groups`, with an average of the weights if asked for.

    It is handed to DeepSpeed as a client optimizer. Its hyper-parameters per group stay where a reader looks for them,
    and nothing is compiled. (DeepSpeed's FusedAdam took minutes to build, and its weight decay defaults to another
    value.)

    The kinds are the modules of ``pretrain/optim/kinds``.

    LAMB (You et al. 2020) is left out on purpose. It scales the step of each tensor by the norms of that tensor and of
    its update. What an optimizer gets from ZeRO is a flat partition of many tensors, cut at both ends: LAMB would run,
    with norms of the wrong things.
    """
    optimizer = KINDS.get(config.kind).build(parameter_groups(model, config), config)
    if config.ema_decay is not None:
        WeightAverage(optimizer, config.ema_decay)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def apply_hyperparameters(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Put the configuration's hyper-parameters back after a checkpoint was loaded.

    Loading restores the groups' old values; without this a changed configuration would silently not take effect. An
    average that is not asked for any more is dropped: it would still be saved, and never change.
    """
    for group in optimizer.param_groups:
        group.update(_hyperparameters(group["name"], config))
    if config.ema_decay is None:
        forget_average(optimizer)


def values_kept(config: OptimizerConfig, group: str) -> int:
    """Float32 values that are kept for a weight of a group beside its master weight: moments, and the average."""
    return KINDS.get(config.kind).states(group) + (config.ema_decay is not None)


def most_values_kept(config: OptimizerConfig) -> int:
    """As :func:`values_kept`, of the group that keeps most."""
    matrices = KINDS.get(config.kind).matrices
    return max(values_kept(config, group) for group in (matrices, DECAY, NO_DECAY) if group is not None)


class WeightAverage:
    """Exponential moving average of the weights (Polyak & Juditsky 1992; Tarvainen & Valpola 2017, eq. 2).

    After each optimizer step every weight p changes its average to ``a <- decay * a + (1 - decay) * p``; the average
    starts from the weights before the first step. It is part of the optimizer's state, beside the moments, as float32
    values of the master weights. So every ZeRO stage partitions, offloads, saves and loads it with them, and nothing
    else has to know of it.

    A step that is skipped does not move it: DeepSpeed does not call the optimizer then, and at stage 0 the dropped
    gradients are None. It works through PyTorch's hooks around ``step`` and not by a class of its own, because ZeRO's
    list of known optimizers is a list of exact types.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self._decay = decay
        self._starts: dict[torch.Tensor, torch.Tensor] = {}
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Not into the state yet: AdamW takes a parameter whose state is not empty for one that it knows.
        self._starts = {p: p.detach().clone() for p in _moving(optimizer) if AVERAGE not in optimizer.state.get(p, {})}

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = _moving(optimizer)
        for p in params:
            if p in self._starts:
                optimizer.state[p][AVERAGE] = self._starts.pop(p)
        self._starts = {}
        if params:
            torch._foreach_lerp_([optimizer.state[p][AVERAGE] for p in params], params, 1 - self._decay)


def forget_average(optimizer: torch.optim.Optimizer) -> None:
    """Drop the average from the state, for a run that continues without it."""
    for state in optimizer.state.values():
        state.pop(AVERAGE, None)


def _moving(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
