"""A model of seven odd parameters in a DeepSpeed engine of any stage, and the same without DeepSpeed."""

from __future__ import annotations

from typing import Any

STEPS = 3


def odd_model(width: int = 7) -> Any:
    """Seven parameters, one of them used twice, whose sizes (1, 35, 7, 21, 3, 9, 3) no two processes share evenly."""
    import torch
    from torch import nn

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(5, width), nn.Linear(width, 3), nn.Linear(3, 3)
            self.tied = nn.Linear(3, 3, bias=False)
            self.tied.weight = self.third.weight
            self.gain = nn.Parameter(torch.ones(1))
            self.register_buffer("seen", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.second(torch.tanh(self.first(x) * self.gain))
            return self.tied(self.third(hidden)).float().square().mean()

    torch.manual_seed(1)
    return Odd()


def adamw(model: Any, not_decayed: str = "") -> Any:
    """AdamW with two groups that differ in every hyper-parameter, and a state besides its own, ``ema``.

    ``not_decayed`` names a matrix that goes to the other group.
    """
    import torch

    def average(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            optimizer.state[p].setdefault("ema", p.detach().clone()).lerp_(p.detach(), 0.1)

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name != not_decayed]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or name == not_decayed]
    groups = [
        {"name": "decay", "params": matrices, "weight_decay": 0.5, "betas": (0.8, 0.9), "eps": 1e-6},
        {"name": "no_decay", "params": others, "weight_decay": 0.0, "betas": (0.9, 0.99), "eps": 1e-7},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, fused=True)
    optimizer.register_step_post_hook(average)
    return optimizer


def inputs(step: int) -> Any:
    """The batch of a step, the same on every process."""
    import torch

    return torch.randn(6, 5, generator=torch.Generator().manual_seed(step))


def plain_states(steps: int = STEPS) -> dict[str, dict[str, Any]]:
    """The reference: every state of every parameter after some steps without DeepSpeed."""
    model = odd_model()
    optimizer = adamw(model)
    for step in range(steps):
        optimizer.zero_grad()
        model(inputs(step)).backward()
        optimizer.step()
    return {
        name: {"fp32": p.detach(), **{k: v for k, v in optimizer.state[p].items() if k != "step"}}
        for name, p in model.named_parameters()
    }


def join() -> tuple[int, int]:
    """Join the process group; returns rank and number of processes."""
    import os

    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.HashStore() if world_size == 1 else None
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    return rank, world_size


def build_engine(stage: int, precision: str, extra: dict[str, Any], width: int = 7, not_decayed: str = "") -> Any:
    """DeepSpeed's engine around the model; ``extra`` are blocks of its JSON."""
    from pretrain.engine.training import import_deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_force_ds_cpu_optimizer": False,
        **extra,
        "zero_optimization": {"stage": stage, **extra.get("zero_optimization", {})},
    }
    if precision != "fp32":
        config[precision] = {"enabled": True, **extra.get(precision, {})}
    model = odd_model(width)
    return import_deepspeed().initialize(model=model, optimizer=adamw(model, not_decayed), config=config)[0]


def take_step(engine: Any, step: int) -> None:
    """One optimizer step on the batch of ``step``."""
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(inputs(step).to(dtype)), scale_wrt_gas=False)
    engine.step()
