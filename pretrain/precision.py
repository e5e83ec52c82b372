"""bf16 or fp32: what a device computes faster in, and what a run's ``precision: auto`` comes to.

A CPU is measured and not asked for its flags: they say nothing of libraries that the environment caps
(``ONEDNN_MAX_CPU_ISA``). Without instructions for bf16 PyTorch still multiplies it, 3 to 50 times slower than float32.
Measured: 0.36 of float32's speed where oneDNN converts, 0.01 to 0.05 where it does not, and 2 or more with the
instructions.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

    from pretrain.config import RunConfig
    from pretrain.distributed.world import World

FASTER = 1.1
"""From this ratio of speeds on bf16 is taken. Where there are instructions for it 1.5 and more was measured, where
there are none 0.4 at most: noise of a machine that others use too does not reach it from either side."""
TOO_SLOW = 0.6
"""Below it a small product has decided: a larger one would take tens of milliseconds and say the same."""
SMALL, LARGE = 128, 384
"""Sides of the matrices: 0.04 and 1 ms in float32 on one core; the small one 1.2 ms in bf16 where that is slow."""
TRIES = 4
"""Of which the fastest counts, after one that pays for what is prepared at the first call."""


def bf16_speed() -> float:
    """How many times as fast as float32 a core of this CPU multiplies bf16 matrices; measured once in a process.

    In 10 ms where bf16 is slow and 30 ms where it is not, most of them for the first products ever.
    """
    return _measured()


@functools.cache
def _measured() -> float:
    import torch

    # On one thread: the sizes are made for one, and threads that wait for each other on a busy machine would be most of
    # what is measured.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            small = _ratio(SMALL)
            return small if small < TOO_SLOW else _ratio(LARGE)
    finally:
        torch.set_num_threads(threads)


def _ratio(side: int) -> float:
    """Time of a float32 product over that of the same in bf16; matrices (side, side)."""
    import torch

    # Values without a random number: a run's generators stay as they are.
    matrices = [torch.ones(side, side, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.bfloat16)]
    best = [float("inf")] * len(matrices)
    for attempt in range(TRIES + 1):
        # In turns, so that whatever slows the machine down for a while slows down both.
        for i, matrix in enumerate(matrices):
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            if attempt:
                best[i] = min(best[i], time.perf_counter() - began)
    return best[0] / best[1]


class Bf16Support(NamedTuple):
    """What a device makes of bf16."""

    ratio: float
    """Speed of bf16 products to that of float32 ones; of a GPU, which is not measured, infinity or 0."""
    words: str
    """The same to be read, with ``{whose}`` for the device."""

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """The faster one."""
        return "bf16" if self.ratio >= FASTER else "fp32"


def bf16_support(device: torch.device) -> Bf16Support:
    """A GPU has bf16 or has not, a CPU is measured; elsewhere bf16 is left alone."""
    import torch

    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Bf16Support(float("inf"), "{whose} GPU has bf16")
        return Bf16Support(0.0, "{whose} GPU has no bf16 of its own")
    if device.type != "cpu":
        return Bf16Support(0.0, f"bf16 was never tried on {device.type}")
    ratio = bf16_speed()
    how = f"{ratio:.2g} of" if ratio < 1 else f"{ratio:.2g} times"
    return Bf16Support(ratio, f"{{whose}} CPU multiplies bf16 matrices at {how} its float32 speed")


def fast_precision(device: torch.device) -> Literal["bf16", "fp32"]:
    """bf16 where the device multiplies matrices faster in it than in float32, else fp32; never fp16."""
    return bf16_support(device).precision


class ResolvedPrecision(NamedTuple):
    """A configuration whose precision is no longer ``auto``."""

    config: RunConfig
    text: str
    """The precision for the description of the run, with why if it was ``auto``."""
    note: str | None = None
    """A line to be said at the start."""


def resolve_precision(config: RunConfig, world: World, began: str | None = None) -> ResolvedPrecision:
    """What the run's precision is, the same on all processes, which must call it alike.

    ``began``: the precision of the checkpoint that the run resumes from, None for a run that begins. ``auto`` keeps it;
    a run that begins takes bf16 if every process finds it faster, else fp32. (Whether a checkpoint may be resumed in
    this precision is :func:`pretrain.checkpoint.resume.check_resume`'s to say, before.)
    """
    asked = config.precision
    if asked in ("fp32", "fp16"):
        return ResolvedPrecision(config, asked)
    if asked == "auto" and config.zero_stage == 0:
        return ResolvedPrecision(_with(config, "fp32"), "fp32 (auto: zero_stage 0 has no other)")
    verdict = _of_all(world.gather(bf16_support(world.device)))
    if asked == "bf16":
        slow = f"precision bf16 was asked for, and {verdict.words}: --set precision=fp32 is faster here"
        return ResolvedPrecision(config, asked, slow if verdict.ratio < 1 else None)
    if began is None:
        return ResolvedPrecision(_with(config, verdict.precision), f"{verdict.precision} (auto: {verdict.words})")
    note = None
    if verdict.precision != began and began != "fp16":
        note = (
            f"precision auto keeps {began}, in which the run began; here {verdict.precision} would be faster "
            f"({verdict.words}): --set precision={verdict.precision} changes it"
        )
    return ResolvedPrecision(_with(config, began), f"{began} (auto: the run began in it)", note)


def resolve_for_plan(config: RunConfig, on_gpu: bool) -> ResolvedPrecision:
    """The precision to plan with: GPUs, which need not be here, have bf16; a CPU is taken to be like this one."""
    import torch

    if config.precision != "auto":
        return ResolvedPrecision(config, config.precision)
    if config.zero_stage == 0:
        return ResolvedPrecision(_with(config, "fp32"), "fp32 (auto: zero_stage 0 has no other)")
    if on_gpu:
        return ResolvedPrecision(_with(config, "bf16"), "bf16 (auto: a GPU is taken to have it)")
    verdict = _of_all([bf16_support(torch.device("cpu"))])
    return ResolvedPrecision(_with(config, verdict.precision), f"{verdict.precision} (auto: {verdict.words})")


def _of_all(verdicts: list[Bf16Support]) -> Bf16Support:
    """The verdict that decides for all: the first process's, unless bf16 is slow for another one only."""
    worst = min(range(len(verdicts)), key=lambda rank: verdicts[rank].ratio)
    if verdicts[worst].precision == verdicts[0].precision:
        worst = 0
    ratio, words = verdicts[worst]
    return Bf16Support(ratio, words.format(whose="this" if worst == 0 else f"process {worst}'s"))


def _with(config: RunConfig, precision: str) -> RunConfig:
    return config.model_copy(update={"precision": precision})
