"""Muon (Jordan et al. 2024) for the layers' matrices, AdamW for all else; see :class:`pretrain.optim.muon.Muon`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrain.optim.kind import KINDS, OptimizerKind
from pretrain.optim.kinds.adamw import AdamW

if TYPE_CHECKING:
    import torch

    from pretrain.config import OptimizerConfig


@KINDS.register
class Muon(OptimizerKind):
    """Its class tells the groups apart by their hyper-parameters: one with a ``momentum`` holds matrices."""

    name = "muon"
    matrices = "muon"

    @staticmethod
    def states(group: str) -> int:
        """The momentum of the layers' matrices, or what AdamW keeps."""
        return 1 if group == Muon.matrices else AdamW.states(group)

    @staticmethod
    def hyperparameters(group: str, config: OptimizerConfig) -> dict[str, Any]:
        """The momentum for the layers' matrices, or what AdamW takes."""
        return {"momentum": config.momentum} if group == Muon.matrices else AdamW.hyperparameters(group, config)

    @staticmethod
    def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
        """Our own class."""
        from pretrain.optim import muon

        return muon.Muon(groups, lr=config.lr)
