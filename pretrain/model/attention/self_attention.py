"""Multi-head self-attention: projections, positions, one of the attention forms, and the skip convolution."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from pretrain.model.attention.causal_nystrom import causal_nystrom_attention
from pretrain.model.attention.layout import Layout, Partition, Rectangle
from pretrain.model.attention.nystrom import nystrom_attention
from pretrain.model.attention.softmax import softmax_attention
from pretrain.model.config import ModelConfig
from pretrain.model.conv import skip_convolution
from pretrain.model.positions import apply_rotary, rotary_table

log = logging.getLogger(__name__)


@cache
def _say_exact(longest: int, limit: int) -> None:
    log.info("sequences of %d tokens get exact softmax attention: Nystrom begins beyond %d", longest, limit)


@dataclass(frozen=True)
class AttentionContext:
    """What all layers share for one batch: who attends to whom, and the rotary table."""

    partition: Partition
    rotary: tuple[Tensor, Tensor] | None

    @classmethod
    def build(cls, config: ModelConfig, layout: Layout, device: torch.device, dtype: torch.dtype) -> AttentionContext:
        """Once per batch. dtype: the weights'; tables are float32, or float64 for a float64 model."""
        causal = config.objective == "clm"
        landmarks = config.num_landmarks if config.attention == "nystrom" and not causal else None
        limit = config.window_segments * config.segment_length if causal else config.num_landmarks
        if config.attention == "nystrom" and layout.longest <= limit and not torch.compiler.is_compiling():
            _say_exact(layout.longest, limit)
        rotary = None
        if config.positions == "rotary":
            table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            rotary = rotary_table(layout.positions(device), config.head_dim, config.rope_theta, table_dtype)
        return cls(layout.partition(device, causal=causal, num_landmarks=landmarks), rotary)


class SelfAttention(nn.Module):
    """(B, N, hidden) -> (B, N, hidden), by ``config.attention`` and ``config.objective``.

    The convolution's weight and gamma are parameters of this module, not of submodules: how often the attention
    function runs depends on the batch's layout, and ZeRO-3 must gather weights equally often on every rank.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.conv_weight: nn.Parameter | None = None
        if config.conv_kernel:
            self.conv_weight = nn.Parameter(torch.empty(config.num_heads, 1, config.conv_kernel, 1))
        self.gamma_logit: nn.Parameter | None = None
        if config.objective == "clm" and config.attention == "nystrom" and config.learn_gamma:
            self.gamma_logit = nn.Parameter(torch.empty(config.num_heads))

    def gamma(self) -> Tensor | None:
        """(H,) weights in (1/2, 1) of the identity in the causal form's triangular inverse; None: pooling, or not that
        form."""
        if self.gamma_logit is not None:
            logit = self.gamma_logit
            return 0.5 + 0.5 * torch.sigmoid(logit if logit.dtype == torch.float64 else logit.float())
        config = self.config
        if config.objective != "clm" or config.attention != "nystrom" or config.gamma_init == 1.0:
            return None
        return torch.full((self.config.num_heads,), self.config.gamma_init, device=self.query.weight.device)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        heads = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        q, k, v = self.query(x).view(heads), self.key(x).view(heads), self.value(x).view(heads)
        if context.rotary is not None:
            q, k = apply_rotary(q, context.rotary), apply_rotary(k, context.rotary)
        partition = context.partition
        gamma = self.gamma()
        window = self.config.window_segments * self.config.segment_length
        outputs = [self._attend(r.take(q), r.take(k), r.take(v), gamma, r) for r in partition.rectangles]
        merged = partition.merge(outputs, v) if outputs else 0 * (q + k + v)
        if gamma is not None and all(r.length <= window for r in partition.rectangles):
            # Nothing reached beyond the window. Every parameter gets a gradient all the same, if zero: ranks whose
            # batches differ must reduce the same parameters.
            merged = merged + 0 * gamma.sum().to(merged.dtype)
        return self.output(merged.flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, rectangle: Rectangle) -> Tensor:
        config = self.config
        causal = config.objective == "clm"
        if config.attention == "softmax":
            out = softmax_attention(q, k, v, rectangle, causal=causal)
        elif causal:
            size, window = config.segment_length, config.window_segments
            out = causal_nystrom_attention(q, k, v, segment_length=size, window_segments=window, gamma=gamma)
        else:
            out = nystrom_attention(
                q,
                k,
                v,
                rectangle,
                num_landmarks=config.num_landmarks,
                iterations=config.inverse_iterations,
                init=config.inverse_init,
            )
        if self.conv_weight is not None:
            out = out + skip_convolution(v, self.conv_weight, causal=causal, mask=rectangle.mask)
        return out
