"""What a language model is made of: embeddings, blocks, heads, and how their weights begin."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.errors import UserError
from pretrain.model.attention.cache import LayerCache
from pretrain.model.attention.layout import Layout
from pretrain.model.attention.self_attention import AttentionContext, SelfAttention
from pretrain.model.config import ModelConfig
from pretrain.model.feed_forward import feed_forward_kind
from pretrain.model.initial import ResidualLinear, initial_std
from pretrain.model.norms import build_norm
from pretrain.model.positions import POSITION_OFFSET, learned_rows
from pretrain.model.token_loss import Decoder, cross_entropy_sum


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
        self.norm = build_norm(config)
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
    """``output(act(intermediate(x)))``, or gated ``output(act(gate(x)) * intermediate(x))``; see ``feed_forward.py``.

    A gate is a matrix of its own and not half of a fused one: Muon orthogonalises each matrix as one linear map, and
    other libraries' checkpoints keep the two apart.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kind = feed_forward_kind(config.ffn)
        self.activation = kind.activation()
        self.gate: nn.Linear | None = None
        if kind.gated:
            self.gate = nn.Linear(config.hidden_size, config.ffn_size, bias=config.bias)
        self.intermediate = nn.Linear(config.hidden_size, config.ffn_size, bias=config.bias)
        self.output = ResidualLinear(config.ffn_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.output(self.activation(self.intermediate(x)))
        return self.output(self.activation(self.gate(x)) * self.intermediate(x))


class Block(nn.Module):
    """Attention and feed-forward, each with a residual path; the norm before (pre) or after (post, the paper's)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = build_norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = build_norm(config)
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
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias) if masked else None
        self.norm = build_norm(config) if masked else None
        self.decoder = Decoder(config.hidden_size, vocab_size, bias=masked)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or with ``targets`` the sum of their cross entropy; shapes as :class:`Decoder`."""
        if self.dense is not None and self.norm is not None:
            x = self.norm(F.gelu(self.dense(x), approximate="tanh"))
        if targets is None:
            return self.decoder(x)
        if isinstance(self.decoder, Decoder):
            return self.decoder(x, targets)
        return cross_entropy_sum(self.decoder(x), targets)  # replaced: an adapter, a layer of integers, a resized one


def reset_module(module: nn.Module, config: ModelConfig) -> None:
    """Draw the initial values of the parameters that ``module`` itself has, whichever order modules come in."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=config.init_std)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=initial_std(module, config))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, SelfAttention)):
        module.reset_parameters()
