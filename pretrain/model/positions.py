"""Where a token stands: rotary tables, computed once for each batch and shared by all layers, and rows of learned ones.

What happens when the length grows beyond the training length: ``rotary`` computes any position, but its slow angles
have never been seen; the curriculum changes base or scale where a longer stage begins
(:mod:`pretrain.curriculum.stages`). ``learned`` repeats the rows that were trained and raises beyond its table.
``none`` has nothing to extend (a causal decoder still tells positions apart through its masks, an encoder only through
the convolution).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RotaryTable = tuple[Tensor, Tensor]
"""Cosines and sines, each (1 or B, N, 1, width / 2)."""


POSITION_OFFSET = 2
"""Learned positions start at this row, as in transformers' checkpoints."""
FAST_TURNS, SLOW_TURNS = 32.0, 1.0
"""YaRN's beta and alpha: an angle that turns more often than the first within the original length is left as it is, one
that turns less often than the second is interpolated."""


def rotary_table(positions: Tensor, width: int, theta: float, dtype: torch.dtype, *, scale: float = 1.0) -> RotaryTable:
    """Cosines and sines of rotary position embeddings (Su et al. 2021, arXiv 2104.09864, section 3.2.2).

    positions: (1 or B, N) int64; returns two (1 or B, N, 1, width / 2) of ``dtype``. ``scale`` multiplies the positions
    (position interpolation, Chen et al. 2023, arXiv 2306.15595, eq. 4). Both are constants of the model, never taken
    from the length at hand: the logits of a prefix would change with what follows it. Angles are formed in float64: a
    float32 product is off by 4e-3 radians at position 65,536.
    """
    steps = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    angles = (positions.to(torch.float64) * scale)[:, :, None, None] * theta ** (-steps / width)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def yarn_table(
    positions: Tensor, width: int, theta: float, dtype: torch.dtype, *, scale: float, original_length: int
) -> RotaryTable:
    """As :func:`rotary_table`, with ``scale`` for the slow angles only, and all entries times the root of YaRN's
    temperature (Peng et al. 2023, arXiv 2309.00071, sections 3.2 to 3.4).

    ``original_length``: tokens that the angles were trained on before they were scaled, at least 1. It, theta and the
    scale, below 1, are constants of the model: nothing follows from the length at hand.
    """
    frequencies = yarn_frequencies(width, theta, scale, original_length).to(positions.device)
    angles = positions.to(torch.float64)[:, :, None, None] * frequencies
    factor = yarn_factor(scale)
    return (factor * angles.cos()).to(dtype), (factor * angles.sin()).to(dtype)


def yarn_frequencies(width: int, theta: float, scale: float, original_length: int) -> Tensor:
    """(width / 2,) float64, radians a token: interpolation by parts.

    The ramp is linear in the number of the angle and its ends are whole numbers, as in the authors' program and in
    transformers; in the paper (section 3.2) it is linear in the turns.
    """

    def number_of(turns: float) -> float:
        """Of the angle that turns so often within the original length."""
        return width * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(number_of(FAST_TURNS)), 0)
    high = max(min(math.ceil(number_of(SLOW_TURNS)), width - 1), low)
    steps = torch.arange(width // 2, dtype=torch.float64)
    interpolated = ((steps - low) / (high - low or 0.001)).clamp(0, 1)
    return theta ** (-2 * steps / width) * (1 - interpolated * (1 - scale))


def yarn_factor(scale: float) -> float:
    """Factor of queries and of keys, 0.1 ln(1 / scale) + 1: logits get its square (section 3.4). 1 for a scale of 1."""
    return 1 - 0.1 * math.log(scale)


def learned_rows(positions: Tensor, longest: int, trained: int | None) -> Tensor:
    """Rows of the learned table for ``positions`` (any shape, all below ``longest``), int64.

    Positions from ``trained`` on have not been trained: they take the rows of the trained ones again, in order, as
    Longformer's table is extended (Beltagy et al. 2020, arXiv 2004.05150, section 5). None: all rows are trained.
    """
    if trained is not None and longest > trained:
        positions = positions % trained
    return positions + POSITION_OFFSET


def segment_rotary_table(table: RotaryTable, segment_length: int) -> RotaryTable:
    """Means over the positions of each segment: (1, S * c, 1, width / 2) -> (1, S, 1, width / 2)."""
    cos, sin = (x.unflatten(1, (-1, segment_length)).mean(dim=2) for x in table)
    return cos, sin


def apply_rotary(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate the halves of x (B, N, H, d) by the table's angles, in the table's precision; returns x's own."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
