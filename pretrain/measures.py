"""Numbers of a run that follow from its other numbers. Imports no other part."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def model_flops_utilization(
    tokens_per_second: float, forward_flops: float, devices: int, peak: float | None
) -> float | None:
    """MFU (Chowdhery et al. 2022, appendix B): tokens/s x 3 x forward FLOPs per token / (devices x peak).

    The backward pass counts twice the forward; recomputation does not count. None without a known peak.
    """
    return None if peak is None else tokens_per_second * 3.0 * forward_flops / (devices * peak)
