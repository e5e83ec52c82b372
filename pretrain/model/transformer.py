"""The language model: embeddings, blocks, and the masked or causal head, in one class chosen by
``config.objective``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.batches import IGNORE
from data_pipeline.errors import UserError
from pretrain.model.attention.cache import LayerCache
from pretrain.model.attention.layout import Layout
from pretrain.model.attention.self_attention import AttentionContext, SelfAttention
from pretrain.model.compute import at_least_float32
from pretrain.model.config import STAGE_FIELDS, ModelConfig
from pretrain.model.decoding import DecodingCache
from pretrain.model.flops import forward_flops_per_token
from pretrain.model.positions import POSITION_OFFSET, learned_rows

"""Label of a position that is not a target."""

LOSS_CHUNK_ELEMENTS = 2**26
"""Logits held at a time in the loss: 256 MiB in float32. More are computed in chunks and again in the backward pass."""


LayerRunner = Callable[[nn.Module, Tensor, AttentionContext], Tensor]
"""Another way of computing ``layer(x, context)`` for a :class:`Block`."""


@dataclass(frozen=True)
class LMOutput:
    """What a forward pass returns."""

    logits: Tensor | None = None
    """(B, N, vocabulary); only without labels, and not when only ``hidden`` was asked for."""
    loss_sum: Tensor | None = None
    """Scalar, at least float32: SUM of the cross entropy (nats) over targets. The caller divides by the global
    count."""
    num_targets: Tensor | None = None
    """Scalar int64: labels that are not -100."""
    hidden: Tensor | None = None
    """(B, N, hidden): what the head reads."""


class Embeddings(nn.Module):
    """Words and, if learned, positions, normalised.

    Also before pre-norm blocks. Without it the stream starts at ``init_std`` (0.02), and the first block's output
    dwarfs the tokens: root mean square 15.9 against 0.09 in a masked model of width 128 after 1.8M tokens. The states
    collapse to a few directions (effective rank 4). The held-out loss was 4.63 then, and 3.70 with it after 1.6M.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, config.hidden_size)
        self.position_embeddings = None
        if config.positions == "learned":
            self.position_embeddings = nn.Embedding(config.max_positions + POSITION_OFFSET, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, layout: Layout, trained_positions: int | None = None) -> Tensor:
        """Positions from ``trained_positions`` on repeat those before; see :func:`learned_rows`."""
        x = self.word_embeddings(input_ids)
        if self.position_embeddings is not None:
            available = self.position_embeddings.num_embeddings - POSITION_OFFSET
            if layout.longest > available:
                raise UserError(
                    f"a sequence of {layout.longest} tokens is longer than the model's {available} learned positions: "
                    "shorten it, or train with a larger model.max_positions or positions: rotary"
                )
            positions = layout.positions(input_ids.device)
            x = x + self.position_embeddings(learned_rows(positions, layout.longest, trained_positions))
        return self.dropout(self.norm(x))


class FeedForward(nn.Module):
    """Two layers with GELU (its tanh form, transformers' ``gelu_new``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.intermediate = nn.Linear(config.hidden_size, config.ffn_size)
        self.output = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.gelu(self.intermediate(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and feed-forward, each with a residual path; the norm before (pre) or after (post, the paper's)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.pre_norm = config.norm == "pre"

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), context, cache))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, context, cache)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Head(nn.Module):
    """Hidden states to logits; for masked models through BERT's transform (dense, GELU, norm) and with an output
    bias."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        masked = config.objective == "mlm"
        self.dense = nn.Linear(config.hidden_size, config.hidden_size) if masked else None
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps) if masked else None
        self.decoder = nn.Linear(config.hidden_size, vocab_size, bias=masked)

    def forward(self, x: Tensor) -> Tensor:
        if self.dense is not None and self.norm is not None:
            x = self.norm(F.gelu(self.dense(x), approximate="tanh"))
        return self.decoder(x)


class NystromformerLM(nn.Module):
    """Masked encoder or causal decoder. Build it with :func:`build_model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise UserError(
                "model.vocab_size is not set: give it, or take it from the tokenizer or the shards' manifest"
            )
        self.config = config
        self.run_layer: LayerRunner | None = None
        """How layers run in training mode, if not by calling them: whoever trains the model may set it, to compute a
        layer again in the backward pass or to run a compiled one. Evaluation and decoding never use it."""
        self.embeddings = Embeddings(config, config.vocab_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps) if config.norm == "pre" else None
        self.head = Head(config, config.vocab_size)
        if config.tie_embeddings:
            # One Parameter in two modules, each using it in its own forward: what ZeRO-3 asks of a tied weight.
            self.head.decoder.weight = self.embeddings.word_embeddings.weight
        self.reset_parameters()

    def set_positions(self, config: ModelConfig) -> None:
        """Compute from now on what ``config`` says; it may differ from the present one in :data:`STAGE_FIELDS` only.

        The forward pass reads ``self.config`` anew each time, so a compiled model notices and compiles again.
        """
        old, new = self.config.model_dump(), config.model_dump()
        other = sorted(key for key in old if key not in STAGE_FIELDS and old[key] != new[key])
        if other:
            raise ValueError(f"a model that is built cannot change {', '.join(other)}")
        self.config = config

    def reset_parameters(self) -> None:
        """Normal weights of ``init_std``, zero biases.

        With pre-norm the projections that write to the residual stream are scaled by 1 / sqrt(2 layers). Its variance
        at the output then does not grow with depth (Radford et al. 2019).
        """
        config = self.config
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            if isinstance(module, SelfAttention):
                module.reset_parameters()
            if isinstance(module, Block) and config.norm == "pre":
                residual_std = config.init_std / math.sqrt(2 * config.num_layers)
                nn.init.normal_(module.attention.output.weight, std=residual_std)
                nn.init.normal_(module.feed_forward.output.weight, std=residual_std)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        layout: Layout | None = None,
        hidden: bool = False,
        cache: DecodingCache | None = None,
    ) -> LMOutput:
        """Run the model.

        ``input_ids``: (B, N) int64. ``labels``: (B, N) int64, -100 where there is no target; never shifted here.
        ``layout``: padding and documents, default full rows. ``hidden``: also return the last hidden states and,
        without labels, skip the head. ``cache``: what the layers keep for decoding; see :mod:`pretrain.model.decoding`,
        which gives it.

        With labels the head runs on targets only and ``logits`` is None. A batch without any target gives a loss of 0
        that still reaches every parameter, so that ranks of a distributed run stay in step.
        """
        batch, length = input_ids.shape
        layout = layout or Layout.full(batch, length)
        if (layout.batch, layout.length) != (batch, length):
            raise ValueError(
                f"layout is for ({layout.batch}, {layout.length}) tokens, input_ids are ({batch}, {length})"
            )
        x = self.embeddings(input_ids, layout, self.config.trained_positions)
        context = AttentionContext.build(self.config, layout, x.device, x.dtype, None if cache is None else cache.plan)
        for number, layer in enumerate(self.layers):
            if self.run_layer is not None and self.training and cache is None:
                x = self.run_layer(layer, x, context)
            else:
                x = layer(x, context, None if cache is None else cache.layers[number])
        if self.norm is not None:
            x = self.norm(x)
        states = x if hidden else None
        if labels is None:
            return LMOutput(logits=None if hidden else self.head(x), hidden=states)
        loss_sum = self._loss_sum(x, labels, layout)
        return LMOutput(loss_sum=loss_sum, num_targets=(labels != IGNORE).sum(), hidden=states)

    def _loss_sum(self, x: Tensor, labels: Tensor, layout: Layout) -> Tensor:
        # A causal model's full rows are (nearly) all targets: picking them out would only wait for the device.
        if self.config.objective == "clm" and layout.is_full:
            states, targets = x.flatten(0, 1), labels.flatten()
        else:
            chosen = labels != IGNORE
            states, targets = x[chosen], labels[chosen]
        # From the batch's shape and not from the targets: ZeRO-3 must gather the head equally often on every rank.
        chunks = -(-labels.numel() * self.head.decoder.out_features // LOSS_CHUNK_ELEMENTS)
        if chunks <= 1:
            return self._chunk_loss(states, targets)
        total = states.new_zeros((), dtype=at_least_float32(states.dtype))
        for part, target in zip(states.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
            total = total + checkpoint(self._chunk_loss, part, target, use_reentrant=False)
        return total

    def _chunk_loss(self, states: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(states)
        return F.cross_entropy(logits.to(at_least_float32(logits.dtype)), targets, ignore_index=IGNORE, reduction="sum")

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Weights, a tied one counted once; without word and position tables if ``embeddings`` is False."""
        total = sum(_numel(p) for p in self.parameters())
        if embeddings:
            return total
        tables = [self.embeddings.word_embeddings, self.embeddings.position_embeddings]
        return total - sum(_numel(table.weight) for table in tables if table is not None)

    def flops_per_token(self, seq_len: int) -> float:
        """Forward floating-point operations per token at this length; see
        :func:`pretrain.model.flops.forward_flops_per_token`."""
        return forward_flops_per_token(self.config, seq_len)


def build_model(config: ModelConfig) -> NystromformerLM:
    """A freshly initialised model in float32 on the CPU, from torch's global random state.

    Raises :class:`UserError` if ``config.vocab_size`` is not set.
    """
    return NystromformerLM(config)


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor and this attribute
