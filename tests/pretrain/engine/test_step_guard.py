"""The norm that clips at ZeRO stage 0, against the norm in float64."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.config import OptimizerConfig
from pretrain.engine.training import StepGuard


def stepped(gradient: torch.Tensor, clip: float) -> tuple[StepGuard, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    unused = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter, unused], lr=1.0)
    guard = StepGuard(optimizer, OptimizerConfig(lr=1.0, grad_clip=clip))
    parameter.grad = gradient.clone()
    optimizer.step()
    return guard, parameter


def test_the_norm_of_a_large_gradient_is_that_of_float64() -> None:
    """PyTorch's float32 norm of these on a CPU is 6e-5 too small, and so would be every clipped step too long."""
    gradient = 1e-3 * torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    expected = float(gradient.double().norm())
    guard, parameter = stepped(gradient, clip=0.5)
    assert guard.applied
    assert guard.grad_norm == pytest.approx(expected, rel=1e-7)
    assert float(parameter.detach().double().norm()) == pytest.approx(0.5, rel=2e-6)
    assert stepped(gradient[:1000], clip=0.0)[1].equal(-gradient[:1000])


@pytest.mark.parametrize("bad", [math.inf, math.nan, 3e38])
def test_a_norm_that_is_not_finite_drops_the_step(bad: float) -> None:
    guard, parameter = stepped(torch.full((4,), bad), clip=1.0)
    assert (guard.applied, guard.grad_norm) == (False, math.inf)
    assert not parameter.any()
