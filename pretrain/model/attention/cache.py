"""What a decoding cache is made of, whatever the form of attention: a plan for each forward pass, and state by layer.

A form says by :meth:`Form.cache` what it keeps of texts of up to L tokens. That object plans passes, once for all
layers, and makes the state of one layer. A forward pass over B prompts fills the state; each later pass reads it and
extends it by one token for each row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pretrain.model.attention.form import Given
from pretrain.model.attention.layout import Layout


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodingStep(Layout):
    """A forward pass over one new token for each of B rows, a (B, 1) batch. Forms add what they need."""

    end: int
    """Tokens of the longest text, the new one included."""
    position: Tensor
    """(B,) int64, of the new token in its text."""

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.end

    def positions(self, device: torch.device) -> Tensor:
        """(B, 1) int64: each row's own."""
        return self.position.unsqueeze(1).to(device)


class LayerCache(ABC):
    """What one layer keeps of B texts."""

    STATE: ClassVar[tuple[str, ...]]
    """Names of the attributes that are tensors, rows first, or None."""

    def tensors(self) -> dict[str, Tensor]:
        """All state by name, rows first."""
        return {name: x for name in self.STATE if (x := getattr(self, name)) is not None}

    def keep(self, rows: Tensor) -> None:
        """Only these rows (int64) from now on, in this order."""
        for name, x in self.tensors().items():
            setattr(self, name, x.index_select(0, rows))

    @abstractmethod
    def fill(self, q: Tensor, k: Tensor, v: Tensor, plan: Any, given: Given) -> None:
        """Keep prompts. q, k, v: (B, N, H, d). plan: of :meth:`Cache.prompts`. given: of ``Form.given``."""

    @abstractmethod
    def extend(self, q: Tensor, k: Tensor, v: Tensor, step: Any, given: Given, conv_weight: Tensor | None) -> Tensor:
        """Attention and skip convolution of one new token for each row, which is kept. q, k, v: (B, 1, H, d); returns
        the same. step: of :meth:`Cache.step`. conv_weight: (H, 1, kernel, 1)."""


class Cache(ABC):
    """What a form keeps of texts of up to some length, for one layer and the same in all layers of that form."""

    @abstractmethod
    def prompts(self, starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> Any:
        """A forward pass over one prompt for each row: ``starts`` and ``lengths`` (B,) int64 in the flattened batch."""

    @abstractmethod
    def step(self, lengths: np.ndarray, position: Tensor) -> DecodingStep:
        """A pass over one token more behind texts of ``lengths`` (B,) tokens; ``position`` (B,) is the same on the
        device."""

    @abstractmethod
    def layer(self, rows: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """Empty state of one layer for ``rows`` texts, in the dtype of the model."""

    @abstractmethod
    def elements(self) -> tuple[int, int]:
        """Numbers kept for each row in one layer: those in the dtype of the model, and those in at least float32."""
