"""How much arithmetic a model does, for model FLOPs utilisation and for comparing attention forms."""

from __future__ import annotations

from collections import Counter

from pretrain.model.attention.registry import form_of, forms_of
from pretrain.model.config import ModelConfig
from pretrain.model.feed_forward import feed_forward_kind


def forward_flops_per_token(config: ModelConfig, seq_len: int, target_share: float | None = None) -> float:
    """Floating-point operations of a forward pass over full rows of ``seq_len`` tokens, per token; training is 3 times
    that.

    A multiply-add counts 2. Norms, activations, gates, biases, rotary positions, softmax and embedding look-ups are
    left out, as is usual, and so is whatever is computed and then masked. With h the hidden size, f the feed-forward's,
    g its matrices (2, gated 3), d the head width, n the length, V the vocabulary and a sum over the layers:

        sum (2 (4 h^2 + g h f) + attention + 2 k h) + head

    * k is the convolution's kernel.
    * attention: what the layer's form says, :func:`attention_flops_per_token`.
    * head: 2 h V for every position of a causal model. A masked model runs it on targets only: ``target_share``
      (default 0.15 for mlm, 1 for clm) of 2 h^2 + 2 h V.
    """
    h = config.hidden_size
    masked = config.objective == "mlm"
    feed_forward = feed_forward_kind(config.ffn).matrices * h * config.ffn_size
    layer = 2.0 * (4 * h * h + feed_forward) + 2 * config.conv_kernel * h
    share = target_share if target_share is not None else (0.15 if masked else 1.0)
    head = share * (2 * h * (config.vocab_size or 0) + (2 * h * h if masked else 0))
    return sum(count * (layer + flops) for flops, count in _by_form(config, seq_len)) + head


def attention_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """One layer's attention proper, without projections and convolution; the terms are in the forms'
    :meth:`~pretrain.model.attention.form.Form.flops`. Raises ``ValueError`` for a pattern: ask
    ``config.of_layer(number)``, or :func:`all_attention_flops_per_token`."""
    return form_of(config).flops(seq_len)


def all_attention_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """That of all layers together, each by its own form."""
    return sum(count * flops for flops, count in _by_form(config, seq_len))


def _by_form(config: ModelConfig, seq_len: int) -> list[tuple[float, int]]:
    """Of each form: the operations of one layer, and how many layers have it."""
    counts = Counter(config.attention_by_layer)
    return [(form.flops(seq_len), counts[name]) for name, form in forms_of(config).items()]
