"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Evolved sign momentum (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

    With learning rate lr, decay w and betas (b1, b2), a gradient g changes a weight p and its momentum m to

        p <- p - lr * (sign(b1 * m + (1 - b1) * g) + w * p)
        m <- b2 * m + (1 - b2) * g

    The rule is elementwise, hence the same on ZeRO's flat partitions as on whole tensors. DeepSpeed brings two of its
    own, but FusedLion exists for CUDA only and DeepSpeedCPULion for the CPU only, and both are compiled at the first
    start; PyTorch's fused loops over lists need neither and differ from them by memory traffic alone.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            grads, averages = [p.grad for p in params], [self.state[p]["exp_avg"] for p in params]
            (beta1, beta2), lr = group["betas"], group["lr"]
            updates = torch._foreach_lerp(averages, grads, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-lr)
            torch._foreach_lerp_(averages, grads, 1 - beta2)
        return loss
