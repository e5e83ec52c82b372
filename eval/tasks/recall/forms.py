"""The same weights with another form of attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data_pipeline.errors import UserError
from pretrain.model.attention.registry import form_of
from pretrain.model.config import ModelConfig
from pretrain.model.transformer import NystromformerLM, build_model

OWN = "own"


def forms(config: ModelConfig, named: Sequence[str]) -> dict[str, ModelConfig]:
    """Name -> configuration, ``own`` first; a form that is the checkpoint's own is called so."""
    found = {OWN: config}
    for name in named:
        if name not in (OWN, config.attention):
            found[name] = ModelConfig.model_validate(config.model_dump() | {"attention": name})
    return found


def window_tokens(config: ModelConfig) -> int | None:
    """w c: a token sees no other exactly that is so far back or farther; None where all or none are seen exactly."""
    window = form_of(config).window
    return None if window is None else window.segments * window.segment_length


def with_weights(model: NystromformerLM, config: ModelConfig) -> NystromformerLM:
    """A model of ``config`` with a copy of the weights of ``model``, on its device, in evaluation mode.

    Parameters that only one of the two forms has stay as they are initialised, or are left out.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = build_model(config)
    missing, unexpected = built.load_state_dict(model.state_dict(), strict=False)
    own = {*form_of(config).parameters(), *form_of(model.config).parameters()}
    foreign = [name for name in [*missing, *unexpected] if name.rpartition(".")[2] not in own]
    if foreign:
        raise UserError(f"attention {config.attention} does not fit the weights: {', '.join(foreign)}")
    return built.to(next(model.parameters()).device).eval()
