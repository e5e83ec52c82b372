"""Kinds of norms by name. A further kind is one entry of :data:`NORMS`, a function of (width, eps, bias).

A configuration is read with this module, so it imports torch where a norm is built and not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from pretrain.model.config import ModelConfig


def _layer_norm(width: int, eps: float, bias: bool) -> nn.Module:
    from torch import nn

    return nn.LayerNorm(width, eps=eps, bias=bias)


def _rms_norm(width: int, eps: float, bias: bool) -> nn.Module:
    from pretrain.model.rms_norm import RMSNorm

    return RMSNorm(width, eps=eps)  # it has no bias to leave out


NORMS = {"layernorm": _layer_norm, "rmsnorm": _rms_norm}
"""layernorm: Ba et al. 2016 (arXiv 1607.06450). rmsnorm: Zhang and Sennrich 2019 (arXiv 1910.07467)."""


def norm_name(name: str) -> str:
    """``name``. Raises ``ValueError``, with the known names, for an unknown one."""
    if name not in NORMS:
        raise ValueError(f"there is no norm '{name}': known: {', '.join(NORMS)}")
    return name


def build_norm(config: ModelConfig) -> nn.Module:
    """A norm over the last axis, ``hidden_size`` wide, with the gain 1 and, if it has one, the bias 0."""
    return NORMS[norm_name(config.norm_kind)](config.hidden_size, config.norm_eps, config.bias)
