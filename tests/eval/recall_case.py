"""Subjects that are no networks: one that copies what followed the longest match, one that guesses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Copier(nn.Module):
    """Says what stands where the longest run of tokens before here was seen: a perfect induction head.

    With a ``mask_id`` it fills in masks (which match anything) and looks on both sides of the row for the run.
    """

    def __init__(self, vocab_size: int, mask_id: int | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.mask_id = mask_id
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, input_ids: Tensor, hidden: bool = False) -> Any:
        said = np.stack([self._row(row) for row in input_ids.numpy()])
        return SimpleNamespace(hidden=torch.nn.functional.one_hot(torch.from_numpy(said), self.config.vocab_size))

    def head(self, states: Tensor) -> Tensor:
        return states * self.scale

    def _row(self, row: np.ndarray) -> np.ndarray:
        length = len(row)
        run = np.zeros((length + 1, length + 1), dtype=np.int64)  # [p + 1, q + 1]: of matches that ends at p and q
        for p in range(length):
            same = row == row[p]
            free = np.zeros(length, dtype=bool)
            if self.mask_id is not None and row[p] == self.mask_id:
                free[:] = True
            run[p + 1, 1:] = np.where(same & ~free, run[p, :-1] + 1, np.where(free, run[p, :-1], 0))
        said = np.zeros(length, dtype=np.int64)
        for p in range(length):
            if self.mask_id is None:
                found = run[p + 1, 1 : p + 1]  # q < p
                said[p] = row[found.size - 1 - int(found[::-1].argmax()) + 1] if found.size and found.max() else 0
            else:
                found = run[p, :-1].copy()  # ends before q
                found[row == self.mask_id] = -1
                said[p] = row[int(found.argmax())]
        return said


class Guesser(nn.Module):
    """Independent normal logits, other ones in each call."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, input_ids: Tensor, hidden: bool = False) -> Any:
        return SimpleNamespace(hidden=torch.zeros(*input_ids.shape, 1))

    def head(self, states: Tensor) -> Tensor:
        return torch.randn(len(states), self.config.vocab_size, generator=self.generator)
