"""The same weights under another form of attention: what a comparison of forms runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data_pipeline.errors import UserError
from pretrain.model.attention.registry import form_of, forms_of, pattern_of
from pretrain.model.config import ModelConfig
from pretrain.model.layers import Block
from pretrain.model.transformer import NystromformerLM, build_model

EXACT: dict[str, Any] = {"attention": "softmax"}
WINDOW: dict[str, Any] = {"attention": "window"}
POOLED: dict[str, Any] = {"landmark_inverse": False}
FLAT: dict[str, Any] = {"landmark_levels": 1}
LANDMARKS_ALONE: dict[str, Any] = {"recall_segments": 0}
OWN = "own"


def changed(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """``config`` with other values, checked."""
    return ModelConfig.model_validate({**config.model_dump(), **changes})


def named_forms(config: ModelConfig, names: Sequence[str]) -> dict[str, ModelConfig]:
    """Name -> configuration, ``own`` first; a form that is the checkpoint's own is called so. A pattern by layer is
    named as by :func:`pattern_of`."""
    others = {name: pattern_of(name) for name in names if name != OWN}
    found = {name: form for name, form in others.items() if form != config.attention}
    return {OWN: config, **{name: changed(config, {"attention": form}) for name, form in found.items()}}


def window_tokens(config: ModelConfig) -> int | None:
    """w c: in no layer a token sees another one exactly that is so far back or farther; None where all or none are seen
    exactly, or in some layer."""
    windows = {form.window for form in forms_of(config).values()}
    reach = [window.segments * window.segment_length for window in windows if window is not None]
    return max(reach) if len(reach) == len(windows) else None


def settings_read(config: ModelConfig) -> frozenset[str]:
    """Keys of the configuration that the form of some layer reads."""
    return frozenset(key for form in forms_of(config).values() for key in form.settings)


def _own_parameters(config: ModelConfig) -> set[str]:
    """The names of what the layers' forms learn, ``layers.0.attention.`` and so on before them."""
    return {
        f"layers.{number}.attention.{name}"
        for number in range(config.num_layers)
        for name in form_of(config.of_layer(number)).parameters()
    }


def with_attention(
    model: NystromformerLM, changes: Mapping[str, Any], layers: Sequence[int] | None = None, *, fresh: bool = False
) -> NystromformerLM:
    """A second model on the very same parameters, whose configuration has ``changes`` in its attention.

    layers: those that change, default all. ``model`` stays as it is. A form that has no use for a parameter (gamma, the
    landmark query) leaves it out. Where it needs one that the model does not have, ``ValueError`` is raised; with
    ``fresh`` it is initialised, and all parameters are copies.
    """
    config = changed(model.config, changes)
    if fresh and _own_parameters(config) - _own_parameters(model.config):
        return _initialised(model, config)
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for number, layer in enumerate(twin.layers):
        if layers is None or number in layers:
            assert isinstance(layer, Block)
            layer.attention.change_form(config.of_layer(number))
    if layers is None:
        twin.config = config
    return twin


def _initialised(model: NystromformerLM, config: ModelConfig) -> NystromformerLM:
    """A model of ``config`` with a copy of the weights of ``model``, and its own where there are none to copy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = build_model(config)
    missing, unexpected = built.load_state_dict(model.state_dict(), strict=False)
    own = _own_parameters(config) | _own_parameters(model.config)
    foreign = [name for name in [*missing, *unexpected] if name not in own]
    if foreign:
        raise UserError(f"attention {config.attention_label} does not fit the weights: {', '.join(foreign)}")
    return built.to(next(model.parameters()).device).train(model.training)
