"""Where a token stands: rotary tables, computed once for each batch and shared by all layers.

What happens when the length grows beyond the training length: ``rotary`` computes any position, but its slow angles
have never been seen (raise ``rope_theta`` and train on the longer length); ``learned`` has no row for it and raises;
``none`` has nothing to extend (a causal decoder still tells positions apart through its masks, an encoder only through
the convolution).
"""

from __future__ import annotations

import torch
from torch import Tensor

RotaryTable = tuple[Tensor, Tensor]
"""Cosines and sines, each (1 or B, N, 1, width / 2)."""


def rotary_table(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> RotaryTable:
    """Cosines and sines of rotary position embeddings (Su et al. 2021, arXiv 2104.09864, section 3.2.2).

    positions: (1 or B, N) int64; returns two (1 or B, N, 1, width / 2) of ``dtype``. Angles are formed in float64: a
    float32 product is off by 4e-3 radians at position 65,536.
    """
    steps = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    angles = positions.to(torch.float64)[:, :, None, None] * theta ** (-steps / width)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def segment_means(table: RotaryTable, segment_length: int) -> RotaryTable:
    """Means over the positions of each segment: (1, S * c, 1, width / 2) -> (1, S, 1, width / 2)."""
    cos, sin = (x.unflatten(1, (-1, segment_length)).mean(dim=2) for x in table)
    return cos, sin


def apply_rotary(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate the halves of x (B, N, H, d) by the table's angles, in the table's precision; returns x's own."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
