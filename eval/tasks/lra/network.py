"""The classifier of Long Range Arena: the project's encoder, the mean over real tokens, and a head of two layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eval.tasks.lra import LRASettings
from pretrain.model.attention.layout import Layout
from pretrain.model.attention.registry import pattern_of
from pretrain.model.config import ModelConfig
from pretrain.model.transformer import NystromformerLM, build_model

Inputs = list[tuple[Tensor, Tensor]]
"""For each sequence of an example, ids (B, N) int64 and lengths (B,) int64."""


def model_config(settings: LRASettings, attention: str, vocabulary: int, longest: int) -> ModelConfig:
    """The encoder: pre-norm, learned positions, as in LRA/code/model.py of the Nyströmformer repository.

    Its softmax attention has no convolution, so ``softmax`` has none here; ``softmax-conv`` tells what the convolution
    does from what the landmarks do.
    """
    return ModelConfig(
        objective="mlm",
        attention=pattern_of("softmax" if attention == "softmax-conv" else attention),
        vocab_size=vocabulary,
        hidden_size=settings.hidden_size,
        num_layers=settings.layers,
        num_heads=settings.heads,
        intermediate_size=settings.ffn_size,
        dropout=settings.hidden_dropout,
        positions="learned",
        max_positions=longest,
        landmark_inverse=True,
        num_landmarks=settings.num_landmarks,
        conv_kernel=0 if attention == "softmax" else settings.conv_kernel,
    )


class ArenaClassifier(nn.Module):
    """Encoder (one for all sequences of an example), pooling, head (Linear, ReLU, Linear).

    Two sequences are joined as [x1, x2, x1 * x2, x1 - x2] (SCHeadDual of the Nyströmformer repository). The mean is
    over real tokens: LRA's own divides by the padded length, which tells the head how long the text is.
    """

    def __init__(self, config: ModelConfig, classes: int, head_size: int, sequences: int) -> None:
        super().__init__()
        self.backbone: NystromformerLM = build_model(config)
        del self.backbone.head  # of the language model; it would count as parameters and never be trained
        for module in self.backbone.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()  # torch's own, as published
        joined = config.hidden_size * (4 if sequences == 2 else 1)
        self.head = nn.Sequential(nn.Linear(joined, head_size), nn.ReLU(), nn.Linear(head_size, classes))

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits (B, classes)."""
        pooled = [self.pool(ids, lengths) for ids, lengths in inputs]
        if len(pooled) == 2:
            first, second = pooled
            pooled = [first, second, first * second, first - second]
        return self.head(torch.cat(pooled, dim=-1))

    def pool(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Mean hidden states (B, hidden_size) of the real tokens, float32. ``lengths`` are best kept on the CPU."""
        layout = Layout.from_lengths(lengths, ids.shape[1])
        hidden = self.backbone(ids, layout=layout, hidden=True).hidden.float()
        lengths = lengths.to(ids.device)
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return (hidden * real[..., None]).sum(1) / lengths[:, None]

    def num_parameters(self) -> int:
        """All of them."""
        return sum(parameter.numel() for parameter in self.parameters())
