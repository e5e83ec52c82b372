"""Attention with a sink: each head has a learned logit for a token that is not there, so it may attend to nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.model.attention.form import Form, Given, OwnParameter
from pretrain.model.attention.layout import Rectangle
from pretrain.model.attention.registry import FORMS
from pretrain.model.attention.whole_text import WholeText


@FORMS.register
class Sink(Form):
    """Letters: R sequences, H heads of width d, L tokens."""

    name = "sink"
    far = "approximate"
    exact_up_to = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, given: Given) -> Tensor:
        """q, k, v and the result: (R, H, L, d)."""
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (R, H, L, L)
        if self.causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        elif rectangle.mask is not None:
            logits = logits.masked_fill(~rectangle.mask, -torch.inf)
        sink = given["sink"].to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
        return torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1] @ v

    def cache(self, max_length: int) -> WholeText:
        """Decoding reads the whole text again at each token: right for any causal form, and slow."""
        return WholeText(self, max_length)

    def flops(self, seq_len: int) -> float:
        """Per token and layer: those of exact attention, since the sink adds next to nothing."""
        return self.exact_flops(seq_len)

    def parameters(self) -> dict[str, OwnParameter]:
        """One logit for each head."""
        return {"sink": OwnParameter((self.config.num_heads,), nn.init.ones_)}
