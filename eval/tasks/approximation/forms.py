"""The same weights under another attention: what a comparison of forms runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.model.config import ModelConfig
from pretrain.model.transformer import Block, NystromformerLM

EXACT: dict[str, Any] = {"attention": "softmax"}
WINDOW: dict[str, Any] = {"attention": "window"}
POOLED: dict[str, Any] = {"landmark_inverse": False}


def changed(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """``config`` with other values, checked."""
    return ModelConfig.model_validate({**config.model_dump(), **changes})


def with_attention(
    model: NystromformerLM, changes: Mapping[str, Any], layers: Sequence[int] | None = None
) -> NystromformerLM:
    """A second model on the very same parameters, whose configuration has ``changes`` in its attention.

    layers: those that change, default all. ``model`` stays as it is. What is added to the weights' function is nothing:
    a form that has no use for a parameter (gamma, the landmark query) leaves it out.
    """
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    config = changed(model.config, changes)
    for number, layer in enumerate(twin.layers):
        if layers is None or number in layers:
            assert isinstance(layer, Block)
            layer.attention.change_form(config)
    if layers is None:
        twin.config = config
    return twin
