"""One vector of each text: the hidden states of its real tokens, pooled."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from pretrain.model.attention.layout import Layout

Pooling = Literal["mean", "cls", "last"]


def pooled_states(backbone: nn.Module, input_ids: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
    """(B, hidden_size) float32 of ids (B, N), of which row b has lengths[b] real tokens; padding never enters.

    ``pooling``: "mean" of the real tokens, "cls" the first, "last" the last real one.
    """
    layout = Layout.from_lengths(lengths, input_ids.shape[1])
    hidden = backbone(input_ids, layout=layout, hidden=True).hidden.float()
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    real = torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]
    return (hidden * real[..., None]).sum(1) / lengths[:, None]


def check_pooling(pooling: Pooling, causal: bool) -> None:
    """Raises :class:`UserError` for the first token of a causal model."""
    if pooling == "cls" and causal:
        raise UserError(
            "--pooling cls reads the first token, which in a causal model has seen nothing but itself: use last or mean"
        )
