"""The same weights under another form of attention: what a comparison of forms runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data_pipeline.errors import UserError
from pretrain.model.attention.registry import form_of
from pretrain.model.config import ModelConfig
from pretrain.model.layers import Block
from pretrain.model.transformer import NystromformerLM, build_model

EXACT: dict[str, Any] = {"attention": "softmax"}
WINDOW: dict[str, Any] = {"attention": "window"}
POOLED: dict[str, Any] = {"landmark_inverse": False}
OWN = "own"


def changed(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """``config`` with other values, checked."""
    return ModelConfig.model_validate({**config.model_dump(), **changes})


def named_forms(config: ModelConfig, names: Sequence[str]) -> dict[str, ModelConfig]:
    """Name -> configuration, ``own`` first; a form that is the checkpoint's own is called so."""
    others = (name for name in names if name not in (OWN, config.attention))
    return {OWN: config, **{name: changed(config, {"attention": name}) for name in others}}


def window_tokens(config: ModelConfig) -> int | None:
    """w c: a token sees no other exactly that is so far back or farther; None where all or none are seen exactly."""
    window = form_of(config).window
    return None if window is None else window.segments * window.segment_length


def with_attention(
    model: NystromformerLM, changes: Mapping[str, Any], layers: Sequence[int] | None = None, *, fresh: bool = False
) -> NystromformerLM:
    """A second model on the very same parameters, whose configuration has ``changes`` in its attention.

    layers: those that change, default all. ``model`` stays as it is. A form that has no use for a parameter (gamma, the
    landmark query) leaves it out. Where it needs one that the model does not have, ``ValueError`` is raised; with
    ``fresh`` it is initialised, and all parameters are copies.
    """
    config = changed(model.config, changes)
    if fresh and set(form_of(config).parameters()) - set(form_of(model.config).parameters()):
        return _initialised(model, config)
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for number, layer in enumerate(twin.layers):
        if layers is None or number in layers:
            assert isinstance(layer, Block)
            layer.attention.change_form(config)
    if layers is None:
        twin.config = config
    return twin


def _initialised(model: NystromformerLM, config: ModelConfig) -> NystromformerLM:
    """A model of ``config`` with a copy of the weights of ``model``, and its own where there are none to copy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = build_model(config)
    missing, unexpected = built.load_state_dict(model.state_dict(), strict=False)
    own = {*form_of(config).parameters(), *form_of(model.config).parameters()}
    foreign = [name for name in [*missing, *unexpected] if name.rpartition(".")[2] not in own]
    if foreign:
        raise UserError(f"attention {config.attention} does not fit the weights: {', '.join(foreign)}")
    return built.to(next(model.parameters()).device).train(model.training)
