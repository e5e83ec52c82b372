"""How much arithmetic a model does, for model FLOPs utilisation and for comparing attention forms."""

from __future__ import annotations

from pretrain.model.config import ModelConfig


def forward_flops_per_token(config: ModelConfig, seq_len: int, target_share: float | None = None) -> float:
    """Floating-point operations of a forward pass over full rows of ``seq_len`` tokens, per token; training is 3 times
    that.

    A multiply-add counts 2. Norms, activations, softmax and embedding look-ups are left out, as is usual, and so is
    whatever is computed and then masked. With h the hidden size, f the feed-forward's, d the head width, n the length,
    V the vocabulary and L the layers:

        L * (2 (4 h^2 + 2 h f) + attention + 2 k h) + head

    * k is the convolution's kernel.
    * attention, exact: 4 n h; causal (n + 1) / 2 tokens are seen on average, so 2 (n + 1) h.
    * attention, bidirectional Nystrom with m landmarks and T steps of the inverse: 8 m h for the two rectangular
      products, and (4 m^2 h + 8 T m^3 h / d) / n for the landmark matrix, its inverse, and the inverse times the
      values. Pooled, without the inverse: 4 m h.
    * attention, causal Nystrom, m landmarks of c tokens: 4 h for every token seen in the window and every landmark
      seen, on average; and the landmarks' own work over n: 6 h m c for their keys, masses and values, and with the
      inverse 4 h c m (m + 1) / 2 for B V, and h m^2 each for A and the triangular solve.
    * attention, window: 4 h for every token seen.
    * head: 2 h V for every position of a causal model. A masked model runs it on targets only: ``target_share``
      (default 0.15 for mlm, 1 for clm) of 2 h^2 + 2 h V.
    """
    h, n = config.hidden_size, seq_len
    masked = config.objective == "mlm"
    layer = 2.0 * (4 * h * h + 2 * h * config.ffn_size) + 2 * config.conv_kernel * h
    layer += attention_flops_per_token(config, n)
    share = target_share if target_share is not None else (0.15 if masked else 1.0)
    head = share * (2 * h * (config.vocab_size or 0) + (2 * h * h if masked else 0))
    return config.num_layers * layer + head


def attention_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """One layer's attention proper, without projections and convolution; the terms are in
    :func:`forward_flops_per_token`."""
    h, n = config.hidden_size, seq_len
    causal = config.objective == "clm"
    if config.attention == "softmax":
        return 2.0 * (n + 1) * h if causal else 4.0 * n * h
    c, w = config.segment_length, config.window_segments
    if not causal and config.attention == "nystrom":
        if n <= config.num_landmarks:
            return 4.0 * n * h
        m = -(-n // -(-n // config.num_landmarks))
        if not config.landmark_inverse:
            return 4.0 * m * h
        small = 4 * m * m * h + 8 * config.inverse_iterations * m**3 * config.num_heads
        return 8.0 * m * h + small / n

    segments = -(-n // c)
    sizes = [min(c, n - i * c) for i in range(segments)]
    if not causal:
        seen = sum(size * sum(sizes[max(i - w + 1, 0) : i + w]) for i, size in enumerate(sizes))
        return 4.0 * h * seen / n
    if n <= w * c:
        return 2.0 * (n + 1) * h
    window = sum(size * (min(i, w - 1) * c + (size + 1) / 2) for i, size in enumerate(sizes))
    if config.attention == "window":
        return 4.0 * h * window / n
    landmarks = sum(size * max(i - w + 1, 0) for i, size in enumerate(sizes))
    m = segments - w
    own = 6.0 * h * m * c
    if config.landmark_inverse:
        own += 4.0 * h * c * m * (m + 1) / 2 + 2.0 * h * m * m
    return (4.0 * h * (window + landmarks) + own) / n
