"""Which weights decay, and the optimizer that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrain.config import OptimizerConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

MUON, DECAY, NO_DECAY = "muon", "decay", "no_decay"


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameters in groups with their hyper-parameters; the groups' names are what a loaded one is known by.

    - ``muon`` (only for that kind): the weights of the linear maps in the layers.
    - ``decay``: other weights of two axes and more. The head's own matrix is one of them.
    - ``no_decay``: what has one axis or none (norms, biases, gates); ``landmark_query``, a bias per head; with
      ``decay_embeddings: false`` the word and position tables, and with them a head that is tied to the words.

    A tied weight appears once. Frozen parameters are left out.
    """
    from torch import nn

    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    inner = [m for layers in model.children() if isinstance(layers, nn.ModuleList) for m in layers.modules()]
    linear = {id(module.weight) for module in inner if isinstance(module, nn.Linear)}
    members: dict[str, list[nn.Parameter]] = {MUON: [], DECAY: [], NO_DECAY: []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = id(parameter) in tables and not config.decay_embeddings
        if config.kind == "muon" and id(parameter) in linear:
            members[MUON].append(parameter)
        elif spared or parameter.ndim < 2 or name.endswith("landmark_query"):
            members[NO_DECAY].append(parameter)
        else:
            members[DECAY].append(parameter)
    return [
        {"name": name, "params": parameters, **_hyperparameters(name, config)}
        for name, parameters in members.items()
        if parameters
    ]


def _hyperparameters(group: str, config: OptimizerConfig) -> dict[str, Any]:
    common = {"weight_decay": 0.0 if group == NO_DECAY else config.weight_decay}
    if group == MUON:
        return {**common, "momentum": config.momentum}
    if config.kind == "lion":
        return {**common, "betas": tuple(config.betas)}
    return {**common, "betas": tuple(config.betas), "eps": config.eps}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of ``config.kind`` over :func:`parameter_groups`, with an average of the weights if asked for.

    It is handed to DeepSpeed as a client optimizer: its hyper-parameters per group stay where a reader looks for them,
    and nothing is compiled (DeepSpeed's FusedAdam took minutes to build, and its weight decay defaults to another
    value).

    AdamW (Loshchilov & Hutter 2019) is PyTorch's; ``fused=True`` is its single-pass kernel, which exists for CPU and
    CUDA: a step over one flat partition of 10M float32 values took 11 ms with it, 44 ms with foreach and 59 ms with the
    loop on one CPU core. For :class:`~pretrain.optim.lion.Lion` and :class:`~pretrain.optim.muon.Muon` see there.

    LAMB (You et al. 2020) is left out on purpose. It scales the step of each tensor by the norms of that tensor and of
    its update, and what an optimizer gets from ZeRO is a flat partition of many tensors, cut at both ends: it would
    run, with norms of the wrong things.
    """
    import torch

    from pretrain.optim.average import WeightAverage
    from pretrain.optim.lion import Lion
    from pretrain.optim.muon import Muon

    groups = parameter_groups(model, config)
    optimizer: torch.optim.Optimizer
    if config.kind == "lion":
        optimizer = Lion(groups, lr=config.lr, betas=config.betas)
    elif config.kind == "muon":
        optimizer = Muon(groups, lr=config.lr)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
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
    average that is not asked for any more is dropped: it would go on to be saved, and stand still.
    """
    from pretrain.optim.average import forget_average

    for group in optimizer.param_groups:
        group.update(_hyperparameters(group["name"], config))
    if config.ema_decay is None:
        forget_average(optimizer)


def moments(config: OptimizerConfig) -> int:
    """Float32 values that the optimizer keeps for a weight, at most (Muon keeps one for the layers' matrices)."""
    return (1 if config.kind == "lion" else 2) + (config.ema_decay is not None)
