"""What DeepSpeed 0.19.8 gets wrong inside its ZeRO optimizers, put right from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def zero_optimizer_at_stage_1() -> Iterator[None]:
    """While the engine is built: bfloat16 with float32 gradients at stage 1 gets the optimizer of the other stages.

    DeepSpeed 0.19.8 takes ``BF16_Optimizer`` for that one combination (``DeepSpeedEngine._do_optimizer_sanity_check``).
    Its checkpoints lack the stage and cannot be consolidated. ``DeepSpeedZeroOptimizer``, which it takes at stage 1 for
    float16 and with offloading, accumulates in float32 as well, and its checkpoints are those of the other precisions.
    """
    from deepspeed.runtime.constants import BFLOAT16
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine

    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def choose_zero(self: Any, optimizer: Any) -> Any:
        chosen = choose(self, optimizer)
        return ZERO_OPTIMIZATION if chosen == BFLOAT16 else chosen

    DeepSpeedEngine._do_optimizer_sanity_check = choose_zero
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


def forget_gradients(optimizer: Any) -> None:
    """After a step that DeepSpeed skipped: drop the gradients that it keeps.

    With offloading and float32 accumulation, ZeRO 1 and 2 clear the sums of the gradients after an applied step only
    (``DeepSpeedZeroOptimizer.step``): one infinite gradient would make every later step infinite.
    """
    if getattr(optimizer, "cpu_offload", False):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


def keep_scale_until_applied(optimizer: Any) -> None:
    """float16: let the loss scale grow after a step and not within it; the caller does so with :func:`grow_scale`.

    ZeRO 1 to 3 update the scale before they divide the gradients by it. A step after which the scale doubles would be
    taken with half the gradient, and at stage 3 report half its norm.

    Nor is an overflow at the smallest scale an exception any more: it is a bad step like any other.
    """
    optimizer.loss_scaler.raise_error_at_min_scale = False

    def shrink_only(overflow: bool = False) -> None:
        if overflow:
            optimizer.loss_scaler.update_scale(True)

    optimizer._update_scale = shrink_only


def grow_scale(optimizer: Any) -> None:
    """Tell float16's loss scaler about a step that was applied."""
    optimizer.loss_scaler.update_scale(False)
