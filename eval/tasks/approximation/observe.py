"""What the attention of each layer and head does on real text, beside exact attention on the same queries, keys and
values.

Each layer is compared where it runs. A hook takes its input and makes queries, keys and values of that as the layer
does. Everything is compared at once, so that no more than one layer's are held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.tasks.approximation.exact import BUDGET, exact_attention, matrix_distance
from pretrain.model.attention.blockwise import Window
from pretrain.model.attention.layout import Layout
from pretrain.model.attention.registry import form_of, forms_of
from pretrain.model.attention.self_attention import AttentionContext, SelfAttention
from pretrain.model.config import ModelConfig
from pretrain.model.transformer import NystromformerLM

MEAN_OF_V = "mean of V"


@dataclass(frozen=True)
class Observed:
    """Of R windows in L layers with H heads, all (R, L, H) in float64 on the CPU."""

    errors: dict[str, Tensor]
    """By form: ||output - exact||_F / ||exact||_F over the tokens of a window, the convolution left out."""
    entropy: Tensor
    entropy_share: Tensor
    near: Tensor | None
    """Of exact attention; see :class:`eval.tasks.approximation.exact.Exact`."""
    matrix: Tensor | None
    """||implied - S||_F / ||S||_F of the model's own form; None where a matrix is over the budget."""
    matrix_uniform: Tensor | None
    """The same of uniform attention."""


@torch.inference_mode()
def observe(model: NystromformerLM, input_ids: Tensor, forms: Mapping[str, ModelConfig]) -> Observed:
    """Run full windows (R, n) through the model and compare each of ``forms`` with exact attention in every layer.

    ``forms``: by name; they differ from the model's own configuration in the attention only. Uniform attention,
    ``mean of V``, is always there.
    """
    found: list[dict[str, Any]] = []
    layout = Layout.full(*input_ids.shape)
    weight = model.embeddings.word_embeddings.weight
    contexts = {
        name: AttentionContext.by_layer(config, layout, weight.device, weight.dtype) for name, config in forms.items()
    }
    windows = (form.window for form in forms_of(model.config).values())
    window = next((window for window in windows if window is not None), None)

    def look(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, SelfAttention)
        number = len(found)  # of this layer
        own = {name: (config.of_layer(number), contexts[name][number]) for name, config in forms.items()}
        found.append(_compare(module, args[0], args[1], own, window))

    attentions = [module for module in model.modules() if isinstance(module, SelfAttention)]
    handles = [module.register_forward_pre_hook(look) for module in attentions]
    try:
        model(input_ids.to(weight.device), layout=layout, hidden=True)
    finally:
        for handle in handles:
            handle.remove()

    def stack(values: list[Tensor | None]) -> Tensor | None:
        kept = [value.double().cpu() for value in values if value is not None]
        return torch.stack(kept, 1) if kept else None

    layers = {key: stack([layer[key] for layer in found]) for key in found[0]}
    entropy, share = layers["entropy"], layers["entropy_share"]
    assert entropy is not None
    assert share is not None
    return Observed(
        errors={name: errors for name in (*forms, MEAN_OF_V) if (errors := layers["error " + name]) is not None},
        entropy=entropy,
        entropy_share=share,
        near=layers["near"],
        matrix=layers["matrix"],
        matrix_uniform=layers["matrix_uniform"],
    )


def _compare(
    module: SelfAttention,
    x: Tensor,
    context: AttentionContext,
    forms: Mapping[str, tuple[ModelConfig, AttentionContext]],
    window: Window | None,
) -> dict[str, Tensor | None]:
    """(R, H) of one layer, by name. window: of the model, also where this layer is one without."""
    causal = module.form.causal
    q, k, v = (t.transpose(1, 2) for t in module.project(x, context))
    length = q.shape[2]
    at = torch.arange(length, device=q.device)
    first = None
    if causal and window is not None:
        first = ((at // window.segment_length - window.segments + 1) * window.segment_length).clamp(min=0)
    exact = exact_attention(q, k, v, causal=causal, window=first)
    mean = v.cumsum(2) / (at + 1)[:, None] if causal else v.mean(2, keepdim=True).expand_as(v)
    out: dict[str, Tensor | None] = {"error " + MEAN_OF_V: _relative(mean, exact.output)}
    for name, (config, shared) in forms.items():
        result = run_form(module, config, q, k, v, shared)
        out["error " + name] = _relative(result, exact.output)
    matrix = uniform = None
    if q.shape[1] * length * length <= BUDGET:
        matrix, uniform = _matrices(module, q, k, context, causal)
    return out | {
        "entropy": exact.entropy,
        "entropy_share": exact.entropy_share,
        "near": exact.near,
        "matrix": matrix,
        "matrix_uniform": uniform,
    }


def run_form(
    module: SelfAttention, config: ModelConfig, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext
) -> Tensor:
    """A layer's attention by another configuration, without the convolution. q, k, v: (R, H, n, d) of full rows."""
    form = form_of(config)
    return form.attend(q, k, v, context.partition.rectangles[0], form.given(module.own(), context.shared, q.device))


def _matrices(
    module: SelfAttention, q: Tensor, k: Tensor, context: AttentionContext, causal: bool
) -> tuple[Tensor, Tensor]:
    """The distance of the n by n matrix that the attention amounts to, and of the uniform one, a window at a time.

    Every form is linear in the values, so its matrix is its output for the columns of the identity, taken d at a time:
    as wide as its values are.
    """
    rows, heads, length, width = q.shape
    eye = torch.eye(length, -(-length // width) * width, dtype=q.dtype, device=q.device)
    distances = []
    for row in range(rows):
        one_q, one_k = q[row : row + 1], k[row : row + 1]
        columns = [
            run_form(module, module.config, one_q, one_k, values.expand(1, heads, -1, -1), context)
            for values in eye.split(width, dim=1)
        ]
        implied = torch.cat(columns, dim=-1)[..., :length]
        distances.append(matrix_distance(one_q, one_k, implied, causal=causal))
    return torch.cat([d[0] for d in distances]), torch.cat([d[1] for d in distances])


def _relative(found: Tensor, exact: Tensor) -> Tensor:
    """||found - exact||_F / ||exact||_F over tokens and width: (R, H, n, d) -> (R, H)."""
    return (found - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)
