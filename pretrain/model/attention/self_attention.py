"""Multi-head self-attention: projections, positions, one of the attention forms, and the skip convolution."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pretrain.model.attention.cache import DecodingStep, LayerCache
from pretrain.model.attention.form import Form, Given, Rotary
from pretrain.model.attention.layout import Layout, Partition, Rectangle
from pretrain.model.attention.registry import form_of, forms_of
from pretrain.model.compute import at_least_float32
from pretrain.model.conv import skip_convolution
from pretrain.model.initial import ResidualLinear
from pretrain.model.positions import RotaryTable, apply_rotary, rotary_table, yarn_table
from pretrain.model.rms_norm import RMSNorm

if TYPE_CHECKING:
    from pretrain.model.config import ModelConfig

log = logging.getLogger(__name__)


@cache
def _say_exact(name: str, longest: int, limit: int | None) -> None:
    log.info("sequences of %d tokens get exact softmax attention: %s begins beyond %d", longest, name, limit)


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one form and kind of positions share for one batch: which tokens attend to which, and the
    rotary tables."""

    partition: Partition
    rotary: RotaryTable | None
    shared: Any = None
    """What the form computes once for the batch; see :meth:`Form.prepare`."""
    plan: Any = None
    """What a decoding cache, if there is one, is to keep of the batch: of ``Cache.prompts`` or ``Cache.step``."""

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        layout: Layout,
        device: torch.device,
        dtype: torch.dtype,
        plan: Any = None,
    ) -> AttentionContext:
        """Once per batch, for layers of one form and kind of positions. dtype: the weights'; tables are float32, or
        float64 for a float64 model."""
        return cls._of(form_of(config), layout, _rotary(config, layout, device, dtype), device, plan)

    @classmethod
    def by_layer(
        cls,
        config: ModelConfig,
        layout: Layout,
        device: torch.device,
        dtype: torch.dtype,
        plans: Mapping[str, Any] | None = None,
    ) -> tuple[AttentionContext, ...]:
        """Once per batch: one for each layer, the same object for layers of one form and kind of positions. plans: by
        the name of the form, where a decoding cache has them."""
        rotary, forms = _rotary(config, layout, device, dtype), forms_of(config)
        kinds = tuple(zip(config.attention_by_layer, config.positions_by_layer, strict=True))
        contexts = {
            (name, positions): cls._of(
                forms[name],
                layout,
                rotary if positions == "rotary" else None,
                device,
                None if plans is None else plans[name],
            )
            for name, positions in dict.fromkeys(kinds)
        }
        return tuple(contexts[kind] for kind in kinds)

    @classmethod
    def _of(
        cls, form: Form, layout: Layout, rotary: Rotary | None, device: torch.device, plan: Any
    ) -> AttentionContext:
        shared = form.prepare(layout, rotary, device, plan)
        table = None if rotary is None else rotary.table
        if isinstance(plan, DecodingStep):  # nothing is taken apart: the cache itself attends
            return cls(Partition((), None), table, shared, plan)
        limit = form.exact_up_to
        within = form.far == "approximate" and limit is not None and layout.longest <= limit
        if within and not torch.compiler.is_compiling():
            _say_exact(form.name.capitalize(), layout.longest, limit)
        return cls(layout.partition(device, causal=form.causal, num_landmarks=form.pooled_to), table, shared, plan)


def _rotary(config: ModelConfig, layout: Layout, device: torch.device, dtype: torch.dtype) -> Rotary | None:
    if not config.rotary:
        return None
    angles = partial(_table, config, dtype=dtype)
    return Rotary(angles(layout.positions(device)), angles)


def _table(config: ModelConfig, positions: Tensor, *, dtype: torch.dtype) -> RotaryTable:
    width, theta, scale = config.head_dim, config.rope_theta, config.rope_position_scale
    original = config.rope_original_length
    if config.rope_scaling == "yarn" and original is not None and scale < 1:
        return yarn_table(positions, width, theta, at_least_float32(dtype), scale=scale, original_length=original)
    return rotary_table(positions, width, theta, at_least_float32(dtype), scale=scale)


class SelfAttention(nn.Module):
    """(B, N, hidden) -> (B, N, hidden), by the one form that its configuration names (``ModelConfig.of_layer``).

    The convolution's weight and what the form itself learns are parameters of this module, not of submodules. How often
    the attention function runs depends on the batch's layout, and ZeRO-3 must gather weights equally often on every
    rank.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.form: Form = form_of(config)
        self.form.check()
        width, bias = config.hidden_size, config.bias
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.output = ResidualLinear(width, width, bias=bias)
        self.query_norm: RMSNorm | None = None
        self.key_norm: RMSNorm | None = None
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.key_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.conv_weight: nn.Parameter | None = None
        if config.conv_kernel:
            self.conv_weight = nn.Parameter(torch.empty(config.num_heads, 1, config.conv_kernel, 1))
        parameters = self.form.parameters()
        self.own_names = tuple(parameters)
        for name, parameter in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.empty(parameter.shape)))

    def reset_parameters(self) -> None:
        """Initial values of what is no ``nn.Linear``: the convolution's weight, and what the form itself learns."""
        if self.conv_weight is not None:
            nn.init.normal_(self.conv_weight, std=self.config.init_std)
        with torch.no_grad():
            for name, parameter in self.form.parameters().items():
                parameter.reset(getattr(self, name))

    @property
    def config(self) -> ModelConfig:
        """What it computes by; :meth:`change_form` gives it another one."""
        return self.form.config

    def own(self) -> dict[str, Tensor]:
        """The parameters that the form itself has, by name."""
        return {name: getattr(self, name) for name in self.own_names}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters of this module that the optimizer must not decay, whatever their shape."""
        return {name for name, parameter in self.form.parameters().items() if not parameter.decay}

    def change_form(self, config: ModelConfig) -> None:
        """Compute by another configuration from now on, with the parameters that are there. Those that only the present
        form learns are left out; raises ValueError for what only the other one learns."""
        form = form_of(config)
        wanted = form.parameters()
        if missing := [name for name in wanted if name not in self.own_names]:
            raise ValueError(f"attention {form.name} needs {', '.join(missing)}, which the weights do not have")
        for name in self.own_names:
            if name not in wanted:
                delattr(self, name)
        self.form, self.own_names = form, tuple(wanted)

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        """With a cache (causal models, no gradients): keep the batch in it, or read and extend it by a token."""
        q, k, v = self.project(x, context)
        given = self.form.given(self.own(), context.shared, x.device)
        if cache is not None and isinstance(context.plan, DecodingStep):
            out = cache.extend(q, k, v, context.plan, given, self.conv_weight)
            return self.output(out.flatten(2))
        if cache is not None:
            cache.fill(q, k, v, context.plan, given)
        # Number and shapes of the rectangles change with every batch of packed rows, and each would be compiled anew:
        # that part of a compiled layer runs as it is.
        packed = context.partition.slots is not None
        interrupted = packed and torch.compiler.is_compiling()
        attend = torch.compiler.disable(self._attend_all) if interrupted else self._attend_all
        merged = attend(q, k, v, given, context.partition)
        return self.output(merged.flatten(2))

    def project(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, N, H, d), positions applied.

        ``qk_norm``, an RMS norm of each head as in Qwen3 (2025, arXiv 2505.09388, section 2), comes before positions.
        Every form, its landmarks and the decoding cache included, gets what is normed.
        """
        heads = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        q, k, v = self.query(x).view(heads), self.key(x).view(heads), self.value(x).view(heads)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if context.rotary is not None:
            q, k = apply_rotary(q, context.rotary), apply_rotary(k, context.rotary)
        return q, k, v

    def _attend_all(self, q: Tensor, k: Tensor, v: Tensor, given: Given, partition: Partition) -> Tensor:
        """(B, N, H, d) each -> (B, N, H, d): attention on every rectangle, put back."""
        outputs = [self._attend(r.take(q), r.take(k), r.take(v), given, r) for r in partition.rectangles]
        merged = partition.merge(outputs, v) if outputs else 0 * (q + k + v)
        exact = self.form.exact_up_to
        # Every parameter gets a gradient, if zero, whatever the batch holds. Ranks whose batches differ must reduce the
        # same parameters, and ZeRO-3 adds a step's later gradients to what an earlier step left of a missing first one.
        unused = [] if outputs else [self.conv_weight]
        if exact is None or all(r.length <= exact for r in partition.rectangles):
            unused += [getattr(self, name) for name in self.own_names]
        for parameter in unused:
            if parameter is not None:
                merged = merged + 0 * parameter.sum().to(merged.dtype)
        return merged

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, given: Given, rectangle: Rectangle) -> Tensor:
        weight = self.conv_weight
        if weight is None:
            return self.form.attend(q, k, v, rectangle, given)
        joined = self.form.attend_and_convolve(q, k, v, rectangle, given, weight)
        if joined is not None:
            return joined
        convolved = skip_convolution(v, weight, causal=self.form.causal, mask=rectangle.mask)
        return self.form.attend(q, k, v, rectangle, given) + convolved
