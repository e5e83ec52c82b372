"""The learning rate against its definition."""

from __future__ import annotations

import itertools
import math

import pytest

from pretrain.config import ScheduleConfig
from pretrain.optim.schedule import learning_rate

TOTAL, PEAK = 1000, 0.5


def rate(tokens: int, **schedule: object) -> float:
    return learning_rate(tokens, total_tokens=TOTAL, peak=PEAK, schedule=ScheduleConfig(**schedule))


@pytest.mark.parametrize("kind", ["wsd", "cosine", "linear", "inverse_sqrt", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(kind: str) -> None:
    assert rate(10, kind=kind, warmup_tokens=100) == pytest.approx(PEAK * 0.1)
    assert rate(50, kind=kind, warmup_tokens=100) == pytest.approx(PEAK * 0.5)
    assert rate(100, kind=kind, warmup_tokens=100) == PEAK


@pytest.mark.parametrize("kind", ["wsd", "cosine", "linear"])
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_ends_at_the_floor_and_stays_there(kind: str, ratio: float) -> None:
    for tokens in (TOTAL, TOTAL + 1, 10 * TOTAL):
        assert rate(tokens, kind=kind, min_lr_ratio=ratio) == pytest.approx(ratio * PEAK, abs=1e-12)


@pytest.mark.parametrize("kind", ["wsd", "cosine", "linear", "inverse_sqrt", "constant"])
def test_never_rises_after_warm_up(kind: str) -> None:
    rates = [rate(t, kind=kind, warmup_tokens=100) for t in range(100, TOTAL + 1)]
    assert all(a >= b for a, b in itertools.pairwise(rates))


def test_shapes_at_the_middle() -> None:
    middle = 100 + (TOTAL - 100) // 2
    assert rate(middle, kind="cosine", warmup_tokens=100, min_lr_ratio=0.2) == pytest.approx(PEAK * 0.6)
    assert rate(middle, kind="linear", warmup_tokens=100, min_lr_ratio=0.2) == pytest.approx(PEAK * 0.6)
    assert rate(middle, kind="constant", warmup_tokens=100) == PEAK


def test_wsd_holds_the_peak_until_its_decay() -> None:
    assert rate(800, kind="wsd") == PEAK  # 20% of the run by default
    assert rate(801, kind="wsd") < PEAK
    assert rate(600, kind="wsd", decay_tokens=400) == PEAK
    expected = PEAK * (0.1 + 0.9 * (1 - math.sqrt(0.25)))
    assert rate(700, kind="wsd", decay_tokens=400) == pytest.approx(expected)


def test_wsd_may_decay_linearly() -> None:
    assert rate(700, kind="wsd", decay_tokens=400, decay_shape="linear") == pytest.approx(PEAK * (0.1 + 0.9 * 0.75))


def test_inverse_sqrt_falls_by_the_root_down_to_the_floor() -> None:
    schedule = {"kind": "inverse_sqrt", "warmup_tokens": 100}
    assert rate(400, **schedule, min_lr_ratio=0.0) == pytest.approx(PEAK / 2)
    assert rate(900, **schedule, min_lr_ratio=0.0) == pytest.approx(PEAK / 3)
    assert rate(900, **schedule, min_lr_ratio=0.4) == PEAK * 0.4
    with pytest.raises(ValueError, match="kind inverse_sqrt falls from the end of the warm-up: give warmup_tokens"):
        ScheduleConfig(kind="inverse_sqrt")


def test_agrees_with_torchs_schedulers() -> None:
    """PyTorch's cosine and linear decay, stepped once for each token after the warm-up."""
    import torch

    after, floor = TOTAL - 100, 0.2
    for kind in ("cosine", "linear"):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
        scheduler: torch.optim.lr_scheduler.LRScheduler
        if kind == "cosine":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, after, eta_min=floor * PEAK)
        else:
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, floor, after)
        for tokens in range(100, TOTAL + 1):
            expected = optimizer.param_groups[0]["lr"]
            assert rate(tokens, kind=kind, warmup_tokens=100, min_lr_ratio=floor) == pytest.approx(expected, rel=1e-6)
            optimizer.step()
            scheduler.step()


def test_wsd_decay_longer_than_the_run_starts_after_warm_up() -> None:
    assert rate(100, kind="wsd", warmup_tokens=100, decay_tokens=5000) == PEAK
    assert rate(101, kind="wsd", warmup_tokens=100, decay_tokens=5000) < PEAK
