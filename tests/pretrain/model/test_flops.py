"""Parameters and floating-point operations, counted by hand."""

from __future__ import annotations

import pytest

from pretrain.model import ModelConfig, build_model
from pretrain.model.flops import attention_flops_per_token

VOCAB = 31


def config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_landmarks": 6,
        "segment_length": 4,
        "window_segments": 2,
        "conv_kernel": 5,
    }
    return ModelConfig.model_validate(values | changes)


def test_number_of_parameters_by_hand() -> None:
    model = build_model(config(objective="clm", attention="softmax", conv_kernel=0))
    layer = 4 * (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16) + 2 * 2 * 16
    norms = 2 * 2 * 16  # after the embeddings and before the head
    assert model.num_parameters(embeddings=False) == 2 * layer + norms
    assert model.num_parameters() == 2 * layer + norms + VOCAB * 16


def test_flops_by_hand_and_linear_in_the_length() -> None:
    exact = build_model(config(objective="clm", attention="softmax", conv_kernel=0))
    dense = 2 * (4 * 16 * 16 + 2 * 16 * 64)
    assert exact.flops_per_token(99) == 2 * (dense + 2 * 100 * 16) + 2 * 16 * VOCAB
    encoder = build_model(config(conv_kernel=5))
    n, m = 60, 6
    attention = 8 * m * 16 + (4 * m * m * 16 + 8 * 6 * m**3 * 2) / n
    head = 0.15 * (2 * 16 * 16 + 2 * 16 * VOCAB)
    assert encoder.flops_per_token(n) == pytest.approx(2 * (dense + attention + 2 * 5 * 16) + head)
    pooled = build_model(config(conv_kernel=5, landmark_inverse=False))
    assert pooled.flops_per_token(n) == pytest.approx(2 * (dense + 4 * m * 16 + 2 * 5 * 16) + head)
    assert encoder.flops_per_token(6000) < encoder.flops_per_token(600)
    decoder = build_model(config(objective="clm"))
    assert (
        decoder.flops_per_token(8) == exact.flops_per_token(8) + 2 * 2 * 5 * 16
    )  # inside the window: exact + convolution


def test_flops_of_the_causal_form_count_what_is_seen() -> None:
    c, w, n, h = 4, 2, 30, 16
    seen = sum(t + 1 - max(t // c - w + 1, 0) * c + max(t // c - w + 1, 0) for t in range(n))
    m = -(-n // c) - w
    gathered = sum((i + 1) * c for i in range(m))
    pooled = (4 * h * seen + 6 * h * m * c) / n
    assert attention_flops_per_token(config(objective="clm"), n) == pytest.approx(pooled)
    inverse = pooled + (4 * h * gathered + 2 * h * m * m) / n
    assert attention_flops_per_token(config(objective="clm", landmark_inverse=True), n) == pytest.approx(inverse)
    chosen = sum(min(2, max(t // c - w + 1, 0)) for t in range(n))
    recalled = pooled + chosen * (4 * h * c - 2 * h) / n
    assert attention_flops_per_token(config(objective="clm", recall_segments=2), n) == pytest.approx(recalled)
    exact = attention_flops_per_token(config(objective="clm", attention="softmax"), 16)
    assert attention_flops_per_token(config(objective="clm", recall_segments=2), 16) == exact  # w + 2 segments
    near = sum(t + 1 - max(t // c - w + 1, 0) * c for t in range(n))
    assert attention_flops_per_token(config(objective="clm", attention="window"), n) == pytest.approx(4 * h * near / n)
    both = sum(min((t // c + w) * c, n) - max(t // c - w + 1, 0) * c for t in range(n))
    assert attention_flops_per_token(config(attention="window"), n) == pytest.approx(4 * h * both / n)
