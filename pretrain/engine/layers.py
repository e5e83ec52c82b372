"""How training runs a layer of the model: at once, compiled, or again in the backward pass.

A property of the engine and not of the model: weights and losses are the same (compiled: up to rounding).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from pretrain.model.attention.self_attention import AttentionContext
    from pretrain.model.transformer import LayerRunner

COMPILE_BACKEND = "inductor"
COMPILED_SHAPES = 64
"""Of (rows, length), in a run: two for a stage of the curriculum, its micro-batch and what is left of a batch. Beyond
that layers run as they are. Each is compiled for itself; one graph for all lengths took 15 s a shape and not 3 s."""


def layer_runner(checkpointing: bool, compiled: bool) -> LayerRunner | None:
    """What :attr:`NystromformerLM.run_layer` is to be; None if layers are simply called.

    ``checkpointing`` keeps each layer's input only and computes the rest again in the backward pass (Chen et al. 2016),
    with the generators put back so that dropout draws the same.
    """
    run: LayerRunner | None = None
    if compiled:
        run = _compiled()
    if checkpointing:
        run = _checkpointed(run or _call)
    return run


def _call(layer: nn.Module, x: Tensor, context: AttentionContext) -> Tensor:
    return layer(x, context)


def _checkpointed(run: LayerRunner) -> LayerRunner:
    def run_again_in_backward(layer: nn.Module, x: Tensor, context: AttentionContext) -> Tensor:
        return checkpoint(run, layer, x, context, use_reentrant=False)

    return run_again_in_backward


def _compiled() -> LayerRunner:
    return torch.compile(  # type: ignore[call-overload]  # torch 2.13's overloads lack the last two
        _call, backend=COMPILE_BACKEND, dynamic=False, recompile_limit=COMPILED_SHAPES, isolate_recompiles=True
    )
