"""Multi-head self-attention: projections, positions, one of the attention forms, and the skip convolution."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from pretrain.model.attention.blockwise import Window
from pretrain.model.attention.cache import LayerCache
from pretrain.model.attention.cache_plan import Prompts, Step
from pretrain.model.attention.causal_nystrom import causal_nystrom_attention, causal_window_attention
from pretrain.model.attention.layout import Layout, Partition, Rectangle
from pretrain.model.attention.nystrom import nystrom_attention, pooled_attention
from pretrain.model.attention.softmax import at_least_float32, softmax_attention, window_attention
from pretrain.model.config import ModelConfig
from pretrain.model.conv import skip_convolution
from pretrain.model.positions import RotaryTable, apply_rotary, rotary_table, segment_means

log = logging.getLogger(__name__)


@cache
def _say_exact(longest: int, limit: int) -> None:
    log.info("sequences of %d tokens get exact softmax attention: Nystrom begins beyond %d", longest, limit)


@dataclass(frozen=True)
class AttentionContext:
    """What all layers share for one batch: who attends to whom, and the rotary tables."""

    partition: Partition
    rotary: RotaryTable | None
    landmark_rotary: RotaryTable | None = None
    """The mean over each segment's positions, (1, S, 1, d / 2): what a constant added to every query amounts to."""
    plan: Prompts | Step | None = None
    """What a decoding cache, if there is one, is to keep of the batch."""

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        layout: Layout,
        device: torch.device,
        dtype: torch.dtype,
        plan: Prompts | Step | None = None,
    ) -> AttentionContext:
        """Once per batch. dtype: the weights'; tables are float32, or float64 for a float64 model."""
        if isinstance(plan, Step):
            return cls._of_step(config, plan, device, dtype)
        causal = config.objective == "clm"
        landmarks = config.num_landmarks if config.attention == "nystrom" and not causal else None
        limit = config.window_segments * config.segment_length if causal else config.num_landmarks
        if config.attention == "nystrom" and layout.longest <= limit and not torch.compiler.is_compiling():
            _say_exact(layout.longest, limit)
        rotary = far = None
        if config.positions == "rotary":
            rotary = _table(config, layout.positions(device), dtype)
            size = config.segment_length
            segments = -(-layout.length // size)
            if config.has_landmark_query and (segments > config.window_segments or plan is not None):
                table = rotary
                if not (layout.is_full and layout.length == segments * size):
                    # Every sequence starts at position 0, so one table serves all.
                    every = torch.arange(segments * size, device=device).unsqueeze(0)
                    table = _table(config, every, dtype)
                far = segment_means(table, size)
        return cls(layout.partition(device, causal=causal, num_landmarks=landmarks), rotary, far, plan)

    @classmethod
    def _of_step(cls, config: ModelConfig, step: Step, device: torch.device, dtype: torch.dtype) -> AttentionContext:
        """The landmarks are those that the step makes."""
        rotary = far = None
        if config.positions == "rotary":
            rotary = _table(config, step.positions(device), dtype)
            if config.has_landmark_query and step.completed is not None:
                tokens = step.completed.positions.flatten().unsqueeze(0)
                far = segment_means(_table(config, tokens, dtype), config.segment_length)
        return cls(Partition((), None), rotary, far, step)


def _table(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> RotaryTable:
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return rotary_table(positions, config.head_dim, config.rope_theta, table_dtype, scale=config.rope_position_scale)


class SelfAttention(nn.Module):
    """(B, N, hidden) -> (B, N, hidden), by ``config.attention`` and ``config.objective``.

    The convolution's weight, the landmark query and gamma are parameters of this module, not of submodules: how often
    the attention function runs depends on the batch's layout, and ZeRO-3 must gather weights equally often on every
    rank.
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
        self.landmark_query: nn.Parameter | None = None
        if config.has_landmark_query:
            self.landmark_query = nn.Parameter(torch.empty(config.num_heads, config.head_dim))
        self.gamma_logit: nn.Parameter | None = None
        if config.has_gamma and config.learn_gamma:
            self.gamma_logit = nn.Parameter(torch.empty(config.num_heads))

    def reset_parameters(self) -> None:
        """Initial values of what is no ``nn.Linear``: the offset starts at 0, gamma at ``gamma_init``."""
        config = self.config
        if self.conv_weight is not None:
            nn.init.normal_(self.conv_weight, std=config.init_std)
        if self.landmark_query is not None:
            nn.init.zeros_(self.landmark_query)
        if self.gamma_logit is not None:
            share = 2 * config.gamma_init - 1
            nn.init.constant_(self.gamma_logit, math.log(share / (1 - share)))

    def gamma(self) -> Tensor | None:
        """(H,) weights in (1/2, 1) of the identity in the causal form's triangular inverse; None without it."""
        if self.gamma_logit is not None:
            return 0.5 + 0.5 * torch.sigmoid(self.gamma_logit.to(at_least_float32(self.gamma_logit)))
        if not self.config.has_gamma:
            return None
        return torch.full((self.config.num_heads,), self.config.gamma_init, device=self.query.weight.device)

    def landmark_offset(self, context: AttentionContext) -> Tensor | None:
        """(H, S, d) or (H, 1, d): what is added to the mean query of each segment; None without it.

        With rotary positions it is turned as the queries are: it is the mean over the segment of one vector added to
        each query before the rotation, so that what a landmark gets depends on relative positions only.
        """
        if self.landmark_query is None:
            return None
        offset = self.landmark_query.to(at_least_float32(self.landmark_query))[None, None]
        if context.landmark_rotary is not None:
            offset = apply_rotary(offset, context.landmark_rotary)
        return offset[0].transpose(0, 1)

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        """With a cache (causal models, no gradients): keep the batch in it, or read and extend it by a token."""
        q, k, v = self.project(x, context)
        gamma, offset = self.gamma(), self.landmark_offset(context)
        if cache is not None and isinstance(context.plan, Step):
            out = cache.extend(q, k, v, context.plan, offset=offset, gamma=gamma, conv_weight=self.conv_weight)
            return self.output(out.flatten(2))
        if cache is not None and isinstance(context.plan, Prompts):
            cache.fill(q, k, v, context.plan, offset=offset, gamma=gamma)
        # Number and shapes of the rectangles change with every batch of packed rows, and each would be compiled anew:
        # that part of a compiled layer runs as it is.
        packed = context.partition.slots is not None
        interrupted = packed and torch.compiler.is_compiling()
        attend = torch.compiler.disable(self._attend_all) if interrupted else self._attend_all
        merged = attend(q, k, v, gamma, offset, context.partition)
        return self.output(merged.flatten(2))

    def project(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, N, H, d), positions applied."""
        heads = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        q, k, v = self.query(x).view(heads), self.key(x).view(heads), self.value(x).view(heads)
        if context.rotary is not None:
            q, k = apply_rotary(q, context.rotary), apply_rotary(k, context.rotary)
        return q, k, v

    def _attend_all(
        self, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, offset: Tensor | None, partition: Partition
    ) -> Tensor:
        """(B, N, H, d) each -> (B, N, H, d): attention on every rectangle, put back."""
        outputs = [self._attend(r.take(q), r.take(k), r.take(v), gamma, offset, r) for r in partition.rectangles]
        merged = partition.merge(outputs, v) if outputs else 0 * (q + k + v)
        window = self.config.window_segments * self.config.segment_length
        # Every parameter gets a gradient, if zero, whatever the batch holds: ranks whose batches differ must reduce the
        # same parameters, and ZeRO-3 adds a step's later gradients to what an earlier step left of a missing first one.
        unused = [] if outputs else [self.conv_weight]
        if all(r.length <= window for r in partition.rectangles):  # nothing reached beyond the window
            unused += [self.gamma_logit, self.landmark_query]
        for parameter in unused:
            if parameter is not None:
                merged = merged + 0 * parameter.sum().to(merged.dtype)
        return merged

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, offset: Tensor | None, rectangle: Rectangle
    ) -> Tensor:
        out = attention(self.config, q, k, v, rectangle, gamma=gamma, offset=offset)
        if self.conv_weight is not None:
            causal = self.config.objective == "clm"
            out = out + skip_convolution(v, self.conv_weight, causal=causal, mask=rectangle.mask)
        return out


def attention(
    config: ModelConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rectangle: Rectangle,
    *,
    gamma: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Attention alone, without the skip convolution, by ``config.attention`` and ``config.objective``.

    q, k, v: (R, H, L, d), positions applied; returns the same. gamma and offset: of the causal Nystrom form, see
    :func:`causal_nystrom_attention`.
    """
    causal = config.objective == "clm"
    window = Window(config.segment_length, config.window_segments)
    if config.attention == "softmax":
        return softmax_attention(q, k, v, rectangle, causal=causal)
    if config.attention == "window":
        return causal_window_attention(q, k, v, window) if causal else window_attention(q, k, v, rectangle, window)
    if causal:
        weighted = config.landmark_keys == "weighted"
        return causal_nystrom_attention(q, k, v, window=window, offset=offset, gamma=gamma, weighted=weighted)
    if config.landmark_inverse:
        return nystrom_attention(
            q,
            k,
            v,
            rectangle,
            num_landmarks=config.num_landmarks,
            iterations=config.inverse_iterations,
            init=config.inverse_init,
        )
    return pooled_attention(q, k, v, rectangle, num_landmarks=config.num_landmarks)
