"""The rule for losses out of line, against a plain loop over medians."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.telemetry.spikes import SpikeDetector, bounds


def noisy_losses(count: int, seed: int = 0) -> list[float]:
    """A loss that falls, with noise and a few jumps, one of them three steps long."""
    draw = np.random.default_rng(seed)
    losses = 2.0 + 3.0 * np.exp(-np.arange(count) / 100) + 0.05 * draw.standard_normal(count)
    losses[[60, 150, 151, 152, 230]] += 2.0
    return losses.tolist()


def plain_loop(losses: list[float], window: int) -> list[int]:
    """Steps at which a stretch of losses out of line begins."""

    def stands_out(step: int) -> bool:
        before = np.array(losses[max(0, step - window) : step])
        if len(before) < min(20, window):
            return False
        older, newer = before[: len(before) // 2], before[len(before) // 2 :]
        level = np.median(newer)
        line = (level - np.median(older)) / (len(before) / 2) * np.arange(len(before))
        deviation = 1.4826 * np.median(np.abs(before - line - np.median(before - line)))
        return losses[step] > level + max(8 * deviation, 0.01 * level)

    return [step for step in range(len(losses)) if stands_out(step) and not (step and stands_out(step - 1))]


@pytest.mark.parametrize("window", [2, 5, 20, 100, 1000])
def test_equals_a_plain_loop(window: int) -> None:
    losses = noisy_losses(300)
    detector = SpikeDetector(window)
    assert [step for step, loss in enumerate(losses) if detector.add(loss)] == plain_loop(losses, window)


def test_a_stretch_is_one_spike_and_says_what_was_expected() -> None:
    losses = noisy_losses(300)
    detector = SpikeDetector(100)
    found = {step: spike for step, loss in enumerate(losses) if (spike := detector.add(loss))}
    assert list(found) == [60, 150, 230]
    assert found[150].loss == losses[150]
    assert found[150].expected == np.median(losses[100:150])
    assert found[150].expected < found[150].limit < found[150].loss


def test_a_detector_is_rebuilt_wherever_it_was_left() -> None:
    losses = noisy_losses(300)
    for cut in (0, 10, 61, 150, 151, 152, 153, 299):
        whole, part = SpikeDetector(30), SpikeDetector(30)
        for loss in losses[:cut]:
            whole.add(loss)
            part.add(loss)
        part = SpikeDetector(30, part.losses)
        assert [whole.add(loss) for loss in losses[cut:]] == [part.add(loss) for loss in losses[cut:]], cut


def test_a_loss_that_has_moved_for_good_is_the_new_normal() -> None:
    detector = SpikeDetector(20)
    steps = [step for step, loss in enumerate([1.0] * 40 + [2.0] * 100 + [2.5]) if detector.add(loss)]
    assert steps == [40, 140]


def test_another_stage_starts_afresh() -> None:
    detector = SpikeDetector(20)
    for _ in range(30):
        assert detector.add(1.0) is None
    detector.clear()
    assert [detector.add(loss) for loss in [5.0] * 20] == [None] * 20
    assert detector.add(6.0) == (6.0, 5.0, pytest.approx(5.05))


def test_bounds_of_values_that_hardly_move_leave_room() -> None:
    assert bounds([3.0, 3.0, 3.0, 100.0]) == (3.0, pytest.approx(3.03))
    low, high = bounds([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (low, high) == (3.0, pytest.approx(3.0 + 8 * 1.4826 * 1.0))
