"""Lion (Chen et al. 2023), whose rule is :class:`pretrain.optim.lion.Lion`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pretrain.optim.kind import KINDS, OptimizerKind

if TYPE_CHECKING:
    import torch

    from pretrain.config import OptimizerConfig


@KINDS.register
class Lion(OptimizerKind):
    """The default betas are those of Lion's authors (section 4.1), who take (0.95, 0.98) where training is unstable."""

    name = "lion"
    defaults: ClassVar[Mapping[str, Any]] = {"betas": (0.9, 0.99)}

    @staticmethod
    def states(group: str) -> int:
        """The momentum."""
        return 1

    @staticmethod
    def hyperparameters(group: str, config: OptimizerConfig) -> dict[str, Any]:
        """Of every group alike."""
        return {"betas": tuple(config.betas)}

    @staticmethod
    def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
        """Our own class."""
        from pretrain.optim import lion

        return lion.Lion(groups, lr=config.lr, betas=config.betas)
