"""Two forms of attention that only tests know: one class each, and nothing else anywhere says their names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.attention.blockwise import Window
from pretrain.model.attention.form import Form, Given, OwnParameter
from pretrain.model.attention.forms.window import tokens_seen
from pretrain.model.attention.layout import Rectangle
from pretrain.model.attention.ring import Ring
from pretrain.model.attention.whole_text import WholeText


class Near(Form):
    """Exact attention to the last c + 1 tokens (mlm: to c on both sides), decoded from a ring."""

    name = "near"
    far = "unseen"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, given: Given) -> Tensor:
        at = torch.arange(q.shape[2], device=q.device)
        back = at[:, None] - at
        seen = (back.abs() < self.window.segments) & ((back >= 0) if self.causal else (back == back))
        if rectangle.mask is not None:
            seen = seen & rectangle.mask
            seen = seen | ~seen.any(-1, keepdim=True)  # padding far from all: anything but a softmax of nothing
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    def cache(self, max_length: int) -> Ring:
        return Ring.of_window(self.config, self.window, max_length)

    def flops(self, seq_len: int) -> float:
        return 4.0 * self.config.hidden_size * tokens_seen(self.window, seq_len, causal=self.causal) / seq_len

    @property
    def exact_up_to(self) -> int:
        return self.window.segments

    def parameters(self) -> dict[str, OwnParameter]:
        return {}

    @property
    def window(self) -> Window:
        return Window(1, self.config.segment_length + 1)

    @property
    def settings(self) -> tuple[str, ...]:
        return ("segment_length",)


class Sink(Form):
    """All tokens and, with a learned logit for each head, one that is not there; decoded from the whole text."""

    name = "sink"
    far = "approximate"
    exact_up_to = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, given: Given) -> Tensor:
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if self.causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        elif rectangle.mask is not None:
            logits = logits.masked_fill(~rectangle.mask, -torch.inf)
        sink = given["sink"].to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
        return torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1] @ v

    def cache(self, max_length: int) -> WholeText:
        return WholeText(self, max_length)

    def flops(self, seq_len: int) -> float:
        return self.exact_flops(seq_len)

    def parameters(self) -> dict[str, OwnParameter]:
        return {"sink": OwnParameter((self.config.num_heads,), nn.init.ones_)}
