"""The learning rate as a pure function of tokens seen.

Tokens and not steps, so that a change of the batch, of the length or of the number of processes leaves it where it was,
and so that a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config import ScheduleConfig

DEFAULT_DECAY_SHARE = 0.2
"""Share of the run that WSD's decay takes when ``decay_tokens`` is left out (Hägele et al. 2024: 10 to 20%)."""


def learning_rate(tokens: int, *, total_tokens: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of the optimizer step that brings the run to ``tokens`` tokens seen.

    Warm-up is linear from 0 to ``peak`` over ``warmup_tokens``. Then, with ``floor = min_lr_ratio * peak``:

    - ``constant``: ``peak``.
    - ``linear``, ``cosine`` (Loshchilov & Hutter 2017, eq. 5, one cycle): from ``peak`` down to ``floor`` at the end.
    - ``wsd``: ``peak`` until the last ``decay_tokens``, then ``1 - sqrt(x)`` down to ``floor``, the shape that Hägele
      et al. 2024 (section 4) found best, or ``1 - x``. A decay longer than what warm-up leaves starts right after
      warm-up.
    - ``inverse_sqrt`` (Vaswani et al. 2017, eq. 3): ``peak * sqrt(warmup_tokens / tokens)``, never below ``floor``.
      Like ``constant`` it does not depend on the length of the run, and is above ``floor`` at its end.

    ``tokens`` includes the step's own batch. So the first step of a run has a learning rate above 0, and the last step
    of a schedule that ends at ``floor`` has exactly that. Beyond ``total_tokens`` it stays there.
    """
    if tokens < schedule.warmup_tokens:
        return peak * tokens / schedule.warmup_tokens
    if schedule.kind == "constant":
        return peak
    floor = schedule.min_lr_ratio * peak
    if schedule.kind == "inverse_sqrt":
        return max(floor, peak * math.sqrt(schedule.warmup_tokens / tokens))
    start = schedule.warmup_tokens
    if schedule.kind == "wsd":
        decay = schedule.decay_tokens or round(DEFAULT_DECAY_SHARE * total_tokens)
        start = max(start, total_tokens - decay)
    if tokens <= start:
        return peak
    progress = min(1.0, (tokens - start) / (total_tokens - start)) if total_tokens > start else 1.0
    if schedule.kind == "linear" or (schedule.kind == "wsd" and schedule.decay_shape == "linear"):
        share = 1.0 - progress
    elif schedule.kind == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        share = 1.0 - math.sqrt(progress)
    return floor + (peak - floor) * share
