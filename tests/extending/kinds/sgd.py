"""Gradient descent with momentum, which is PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pretrain.optim.kind import KINDS, OptimizerKind

if TYPE_CHECKING:
    import torch

    from pretrain.config import OptimizerConfig


@KINDS.register
class SGD(OptimizerKind):
    """``friction`` is 1 minus the momentum: a run sets it in ``optimizer.settings``."""

    name = "sgd"
    settings: ClassVar[Mapping[str, float]] = {"friction": 0.1}

    @staticmethod
    def states(group: str) -> int:
        """Float32 values kept for each weight: the momentum. `nystrom plan` counts them."""
        return 1

    @staticmethod
    def hyperparameters(group: str, config: OptimizerConfig) -> dict[str, Any]:
        """Those of a group, besides learning rate and weight decay."""
        return {"momentum": 1 - config.setting("friction")}

    @staticmethod
    def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
        """torch is imported here only: a configuration is read without it."""
        import torch

        return torch.optim.SGD(groups, lr=config.lr)
