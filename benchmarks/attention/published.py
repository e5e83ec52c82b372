"""The published implementations' attention, without their projections, so that q, k and v are everybody's.

Both are layers that project hidden states. Their own ``forward`` runs unchanged; the modules it projects with are
replaced by ones that hand over the q, k and v given. In 16 bits both run under autocast, as their iteration mixes the
inputs' precision with a float32 identity and fails otherwise.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from benchmarks.attention.forms import Built, Form, UnavailableError, nystrom_gib
from benchmarks.attention.setting import Setting, forward_flops


class _Given(nn.Module):
    """A projection that gives what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor | None:
        return self.value


def _installed(package: str, pip_name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UnavailableError(f"not installed (pip install {pip_name})")


def _autocast(setting: Setting) -> AbstractContextManager[object]:
    if setting.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(setting.device.type, dtype=setting.dtype)
    return nullcontext()


def transformers(setting: Setting) -> Built:
    """``NystromformerSelfAttention`` of transformers, its convolution included."""
    _installed("transformers", "transformers")
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    m = setting.masked.num_landmarks
    if setting.length % m or setting.length <= m:
        raise UnavailableError(f"needs a length divisible by its {m} landmarks and above them")
    layer = NystromformerSelfAttention(
        NystromformerConfig(
            hidden_size=setting.heads * setting.head_dim,
            num_attention_heads=setting.heads,
            num_landmarks=m,
            segment_means_seq_len=setting.length,
            conv_kernel_size=setting.masked.conv_kernel,
            attention_probs_dropout_prob=0.0,
        )
    )
    key, value = _Given(), _Given()
    for name, module in (("query", nn.Identity()), ("key", key), ("value", value)):
        layer.register_module(name, module)
    layer.to(setting.device).train()
    weight = layer.conv.weight = _convolution(setting)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key.value, value.value = k.flatten(2), v.flatten(2)
        with _autocast(setting):
            (out,) = layer(q.flatten(2))
        key.value = value.value = None
        return out.view_as(q)

    return Built(forward, (weight,))


def lucidrains(setting: Setting) -> Built:
    """``NystromAttention`` of nystrom-attention, its convolution included. It wants q, k and v side by side in one
    tensor, so joining them (and taking the gradient apart) is in its time."""
    _installed("nystrom_attention", "nystrom-attention")
    from nystrom_attention import NystromAttention

    m = setting.masked.num_landmarks
    if setting.length <= m:
        raise UnavailableError(f"needs a length above its {m} landmarks")
    layer = NystromAttention(
        dim=setting.heads * setting.head_dim,
        dim_head=setting.head_dim,
        heads=setting.heads,
        num_landmarks=m,
        pinv_iterations=setting.masked.inverse_iterations,
        residual_conv_kernel=setting.masked.conv_kernel,
    )
    layer.to_qkv, layer.to_out = nn.Identity(), nn.Identity()
    layer.to(setting.device).train()
    weight = layer.res_conv.weight = _convolution(setting)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with _autocast(setting):
            out: Tensor = layer(torch.cat([x.flatten(2) for x in (q, k, v)], dim=2))
        return out.view_as(q)

    return Built(forward, (weight,))


def _convolution(setting: Setting) -> nn.Parameter:
    """Our convolution's weight, in float32 as autocast expects it."""
    return nn.Parameter(setting.conv_weight(setting.masked).detach().float())


def _flops(setting: Setting) -> float:
    return forward_flops(setting.masked, [setting.length] * setting.batch, conv=True)


PUBLISHED = [
    Form("transformers", "NystromformerSelfAttention, convolution", ("sdpa",), transformers, _flops, nystrom_gib),
    Form("lucidrains", "nystrom-attention, convolution", ("sdpa",), lucidrains, _flops, nystrom_gib),
]
