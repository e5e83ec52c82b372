"""The means over a sequence's segments that the masked form has as landmarks, and what their gradient gives tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.attention.layout import Rectangle, Segments, even_segments
from pretrain.model.attention.softmax import segment_means
from pretrain.model.compute import at_least_float32


def landmark_means(x: Tensor, rectangle: Rectangle, num_landmarks: int) -> Tensor:
    """(R, H, L, d) -> (R, H, m, d) means over each sequence's m segments, in at least float32."""
    rows, heads, length, width = x.shape
    with torch.autocast(x.device.type, enabled=False):
        if rectangle.segments is None and length % num_landmarks == 0:
            return segment_means(x, length // num_landmarks)
        tokens, sizes = segments_of(x, rectangle, num_landmarks)
        at = tokens + length * torch.arange(rows, device=x.device)[:, None, None]
        taken = x.transpose(1, 2).reshape(rows * length, heads * width).index_select(0, at.flatten())
        real = torch.arange(tokens.shape[2], device=x.device) < sizes.unsqueeze(2)
        dtype = at_least_float32(x.dtype)
        weights = (real / sizes.unsqueeze(2).to(dtype)).expand(rows, -1, -1).flatten(0, 1).unsqueeze(1)
        means = weights @ taken.view(rows * num_landmarks, -1, heads * width).to(dtype)
        return means.view(rows, num_landmarks, heads, width).transpose(1, 2)


def segments_of(x: Tensor, rectangle: Rectangle, num_landmarks: int) -> Segments:
    """Those of ``rectangle``; where that is full, of one row for all."""
    if rectangle.segments is not None:
        return rectangle.segments
    length = x.shape[2]
    return even_segments(torch.full((1,), length, device=x.device), num_landmarks, length)


class MeansGradient:
    """Each token's share of the gradient of :func:`landmark_means`, written row by row."""

    def __init__(self, x: Tensor, rectangle: Rectangle, num_landmarks: int) -> None:
        """x: (R, H, L, d), what the means are of."""
        length = x.shape[2]
        self.owners: Tensor | None = None
        """(R or 1, L) int64: each token's segment, m for padding; None where all segments are of one size."""
        self.sizes: Tensor | int = length // num_landmarks
        if rectangle.segments is None and length % num_landmarks == 0:
            return
        tokens, sizes = segments_of(x, rectangle, num_landmarks)
        columns = torch.arange(length, device=x.device).expand(len(tokens), -1).contiguous()
        self.owners = torch.searchsorted(tokens[:, :, 0].contiguous(), columns, right=True) - 1
        self.sizes = sizes[:, :, None].to(x.dtype)
        if rectangle.mask is not None:
            self.owners = self.owners.masked_fill(~rectangle.mask[:, 0, 0], num_landmarks)

    def write(self, gradient: Tensor, row: int, out: Tensor) -> None:
        """gradient: of some heads' means in that row, (H', m, d); out: (H', L, d)."""
        if self.owners is None:
            out.unflatten(1, (gradient.shape[1], -1)).copy_((gradient / self.sizes).unsqueeze(2))
            return
        assert isinstance(self.sizes, Tensor)
        row = min(row, len(self.owners) - 1)
        out.copy_(F.pad(gradient / self.sizes[row], (0, 0, 0, 1)).index_select(1, self.owners[row]))
