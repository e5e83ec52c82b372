"""What a measurement is of: shapes, precision and the two models whose attention is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.model.config import ModelConfig
from pretrain.model.flops import attention_flops_per_token


@dataclass(frozen=True)
class Setting:
    """One attention of B rows, H heads of d and n tokens; q, k and v are (B, n, H, d), as projections give them."""

    batch: int
    heads: int
    head_dim: int
    length: int
    dtype: torch.dtype
    device: torch.device
    masked: ModelConfig
    """Of the bidirectional forms: landmarks, iterations, convolution."""
    causal: ModelConfig
    """Of the causal forms: segments, window, gamma, convolution."""

    @property
    def tokens(self) -> int:
        """B n."""
        return self.batch * self.length

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, the same for every form: standard normal, on which no form's time depends."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.length, self.heads, self.head_dim)
        q, k, v = (torch.randn(shape, generator=generator).to(self.device, self.dtype) for _ in range(3))
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()

    def conv_weight(self, config: ModelConfig) -> Tensor:
        """(H, 1, k, 1), in the model's precision."""
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(self.heads, 1, config.conv_kernel, 1, generator=generator) / config.conv_kernel
        return weight.to(self.device, self.dtype).requires_grad_()

    def gamma(self) -> Tensor:
        """(H,), float32 as the model computes it."""
        return torch.full((self.heads,), self.causal.gamma_init, device=self.device, requires_grad=True)


def models(
    heads: int,
    head_dim: int,
    *,
    landmarks: int | None = None,
    segment_length: int | None = None,
    window_segments: int | None = None,
    conv_kernel: int | None = None,
    landmark_band: int | None = None,
    landmark_branching: int | None = None,
) -> tuple[ModelConfig, ModelConfig]:
    """The masked and the causal model; what is None has ModelConfig's default. Raises pydantic.ValidationError."""
    own = {
        "num_landmarks": landmarks,
        "segment_length": segment_length,
        "window_segments": window_segments,
        "conv_kernel": conv_kernel,
        "landmark_band": landmark_band,
        "landmark_branching": landmark_branching,
    }
    shared = {"hidden_size": heads * head_dim, "num_heads": heads, "positions": "none"}
    shared |= {key: value for key, value in own.items() if value is not None}
    masked, causal = (ModelConfig.model_validate({"objective": of, **shared}) for of in ("mlm", "clm"))
    return masked, causal


def exact(config: ModelConfig) -> ModelConfig:
    """The same model with exact attention."""
    return config.model_copy(update={"attention": "softmax"})


def forward_flops(config: ModelConfig, lengths: Sequence[int], *, conv: bool = False) -> float:
    """Floating-point operations of one attention's forward pass over sequences of these lengths, by the formulas of
    :mod:`pretrain.model.flops`: what a perfect kernel would have to do."""
    per_token = 2.0 * config.conv_kernel * config.hidden_size if conv else 0.0
    return sum(n * (attention_flops_per_token(config, n) + per_token) for n in lengths)


def document_lengths(length: int, row: int) -> list[int]:
    """Documents that fill a row of ``length`` tokens: log-uniform between 1/64 of it and all of it, the last one cut;
    the same in every run."""
    generator = np.random.default_rng(row)
    sizes: list[int] = []
    while (left := length - sum(sizes)) > 0:
        drawn = int(np.exp(generator.uniform(np.log(max(length / 64, 1)), np.log(length))))
        sizes.append(min(max(drawn, 1), left))
    return sizes


def document_ids(batch: int, length: int) -> Tensor:
    """(B, n) int64 for ``Layout.from_documents``; rows have different documents."""
    rows = [document_lengths(length, row) for row in range(batch)]
    return torch.stack([torch.repeat_interleave(torch.tensor(sizes)) for sizes in rows])
