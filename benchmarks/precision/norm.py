"""The norm of a gradient, added up in float32 by PyTorch, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def errors(counts: Sequence[int]) -> list[dict[str, Any]]:
    """For so many random float32 values each, how far the float32 norm is off, relative to the float64 one."""
    rows = []
    for count in counts:
        values = torch.randn(count, generator=torch.Generator().manual_seed(0))
        right = float(torch.linalg.vector_norm(values, dtype=torch.float64))
        rows.append({"values": count, "error": float(torch.linalg.vector_norm(values)) / right - 1})
    return rows
