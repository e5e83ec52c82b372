"""A decoding cache that is right for every causal form: all queries, keys and values, and the form run over all of them
for each new token.

It costs a whole attention for each token, O(n) operations for a form that is linear in the length, and keeps 3 h
numbers a token. It is for a form under trial, whose own cache is not written yet, and for testing that cache later.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.model.attention.cache import Cache, DecodingStep, LayerCache
from pretrain.model.attention.form import Form, Given
from pretrain.model.attention.layout import Rectangle
from pretrain.model.conv import skip_convolution


class WholeText(Cache):
    """For texts of up to ``max_length`` tokens.

    For a form whose ``given`` depends on the batch's layout (``prepare``) it is not enough: a step has no layout of the
    whole text.
    """

    def __init__(self, form: Form, max_length: int) -> None:
        self.form, self.max_length = form, max_length

    def prompts(self, starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> Tensor:
        """(B, longest) int64: each row's tokens in the flattened batch, its first one again where it has no more."""
        columns = np.arange(int(lengths.max()))
        return torch.from_numpy(starts[:, None] + np.where(columns < lengths[:, None], columns, 0)).to(device)

    def step(self, lengths: np.ndarray, position: Tensor) -> WholeStep:
        rows = torch.arange(len(lengths), device=position.device)
        return WholeStep(len(lengths), 1, end=int(lengths.max()) + 1, position=position, rows=rows)

    def layer(self, rows: int, dtype: torch.dtype, device: torch.device) -> WholeTextLayer:
        return WholeTextLayer(self, rows, dtype, device)

    def elements(self) -> tuple[int, int]:
        return 3 * self.form.config.hidden_size * self.max_length, 0


@dataclass(frozen=True, kw_only=True, eq=False)
class WholeStep(DecodingStep):
    """Where the new tokens go."""

    rows: Tensor
    """(B,) int64: 0 to B - 1."""


class WholeTextLayer(LayerCache):
    """(B, H, L, d) each. What lies behind a row's text is in the future of all its tokens, so that none sees it."""

    STATE = ("queries", "keys", "values")

    def __init__(self, cache: WholeText, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        config = cache.form.config
        self.form = cache.form
        shape = (rows, config.num_heads, cache.max_length, config.head_dim)
        self.queries, self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(3))

    def fill(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor, given: Given) -> None:
        rectangle = Rectangle(plan.shape[1], plan.shape[1], plan)
        for x, kept in ((q, self.queries), (k, self.keys), (v, self.values)):
            kept[:, :, : plan.shape[1]] = rectangle.take(x)

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, step: WholeStep, given: Given, conv_weight: Tensor | None
    ) -> Tensor:
        for x, kept in ((q, self.queries), (k, self.keys), (v, self.values)):
            kept[step.rows, :, step.position] = x[:, 0].to(kept.dtype)
        with torch.autocast(q.device.type, enabled=False):
            queries, keys, values = (x[:, :, : step.end] for x in (self.queries, self.keys, self.values))
            out = self.form.attend(queries, keys, values, Rectangle(step.end, step.end), given)
            if conv_weight is not None:
                out = out + skip_convolution(values, conv_weight, causal=True, mask=None)
        return out[step.rows, :, step.position].unsqueeze(1).to(v.dtype)
