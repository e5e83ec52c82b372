"""How wide the initial weights of a linear map are drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from pretrain.model.config import ModelConfig


class ResidualLinear(nn.Linear):
    """A linear map whose output is added to the residual stream."""


def initial_std(linear: nn.Linear, config: ModelConfig) -> float:
    """Standard deviation of a map's initial weights.

    With ``residual_init: scaled`` a :class:`ResidualLinear` has init_std / sqrt(2 layers), so that the sum of all
    sublayers' outputs does not grow with the depth (Radford et al. 2019, GPT-2, section 2.3).
    """
    if config.residual_init == "scaled" and isinstance(linear, ResidualLinear):
        return config.init_std / math.sqrt(2 * config.num_layers)
    return config.init_std
