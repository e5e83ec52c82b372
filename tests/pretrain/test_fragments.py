"""Every state of every parameter, read and written in pieces at every ZeRO stage, against a plain optimizer."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run_ranks, values

STEPS = 3


def odd_model() -> Any:
    """Seven parameters whose sizes (35, 7, 1, 21, 3, 9, 3) no two processes share evenly."""
    import torch
    from torch import nn

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 3)
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(self.second(torch.tanh(self.first(x) * self.gain))).float().square().mean()

    torch.manual_seed(1)
    return Odd()


def adamw(model: Any) -> Any:
    import torch

    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, fused=True)


def inputs(step: int) -> Any:
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


def read_and_write(stage: int, precision: str, extra: dict[str, Any]) -> None:
    """Runs in the ranks: trains, compares what is read with the reference, writes, reads again, publishes."""
    import os

    import torch
    import torch.distributed as dist

    from pretrain.engine import fragments
    from pretrain.engine.training import import_deepspeed

    deepspeed = import_deepspeed()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.HashStore() if world_size == 1 else None
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    model = odd_model()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": {"stage": stage, **extra.get("zero_optimization", {})},
        "zero_force_ds_cpu_optimizer": False,
        **({"data_types": extra["data_types"]} if "data_types" in extra else {}),
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    engine = deepspeed.initialize(model=model, optimizer=adamw(model), config=config)[0]
    named = dict(model.named_parameters())
    assert all(fragments.state_names(engine, p) == ["fp32"] for p in named.values())
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for step in range(STEPS):
        engine.backward(engine(inputs(step).to(dtype)), scale_wrt_gas=False)
        engine.step()

    tolerance = {"rtol": 1e-5, "atol": 1e-7} if precision == "fp32" else {"rtol": 0.3, "atol": 5e-3}
    for name, states in plain_states().items():
        assert set(fragments.state_names(engine, named[name])) == {"fp32", "exp_avg", "exp_avg_sq"}
        for state, expected in states.items():
            torch.testing.assert_close(fragments.get_full(engine, named[name], state), expected, **tolerance)

    # The pieces of all processes are the parameter, each element once (at stage 0: once in each process).
    for parameter in named.values():
        piece = fragments.fragment(engine, parameter, "exp_avg")
        spans: list[Any] = [None] * world_size
        dist.all_gather_object(spans, (piece.start, piece.start + len(piece.values)))
        elements = sorted(e for low, high in spans for e in range(low, high))
        times = world_size if stage == 0 else 1
        assert elements == sorted(list(range(fragments.full_shape(parameter).numel())) * times)

    draw = torch.Generator().manual_seed(7)
    wanted = {
        name: {s: torch.randn(fragments.full_shape(p), generator=draw) for s in fragments.state_names(engine, p)}
        for name, p in named.items()
    }
    wanted["gain"]["fp32"][0] = -0.0
    for name, states in wanted.items():
        for state, value in states.items():
            fragments.set_full(engine, named[name], state, value)
    fragments.publish(engine)
    for name, states in wanted.items():
        for state, value in states.items():
            got = fragments.get_full(engine, named[name], state)
            assert torch.equal(got.view(torch.int32), value.view(torch.int32)), (name, state)
        with deepspeed.zero.GatheredParameters([named[name]], enabled=stage == 3):
            assert torch.equal(named[name].detach(), states["fp32"].to(named[name].dtype)), name
    loss = engine(inputs(0).to(dtype)).detach()
    for p, states in zip((reference := odd_model()).parameters(), wanted.values(), strict=True):
        p.data = states["fp32"]
    torch.testing.assert_close(loss, reference.to(dtype)(inputs(0).to(dtype)).detach(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="shape"):
        fragments.set_full(engine, named["gain"], "fp32", torch.zeros(2))


WHOLE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
SUB_GROUPS = {"zero_optimization": {"stage3_param_persistence_threshold": 8, "sub_group_size": 10}}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
ROUND_ROBIN = {"zero_optimization": {"round_robin_gradients": True}}
ALIGNED = {"zero_optimization": {"parameter_alignment": True}}
ACCUMULATE = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("stage", "precision", "world_size", "extra"),
    [
        (0, "fp32", 2, {}),
        (2, "bf16", 2, {}),
        (3, "fp32", 2, WHOLE),
        (3, "bf16", 2, SUB_GROUPS),
        (1, "bf16", 2, ACCUMULATE),
        (2, "bf16", 2, ROUND_ROBIN),
        *(pytest.param(stage, "fp32", 1, {}, marks=pytest.mark.slow) for stage in range(4)),
        *(pytest.param(stage, "bf16", 1, {}, marks=pytest.mark.slow) for stage in (1, 2, 3)),
        *(pytest.param(stage, "fp32", 2, {}, marks=pytest.mark.slow) for stage in (1, 2, 3)),
        *(pytest.param(stage, "bf16", 2, OFFLOAD, marks=pytest.mark.slow) for stage in (1, 2, 3)),
        *(pytest.param(stage, "bf16", 2, ACCUMULATE, marks=pytest.mark.slow) for stage in (2, 3)),
        *(pytest.param(stage, "bf16", 3, {}, marks=pytest.mark.slow) for stage in (1, 2, 3)),
        pytest.param(2, "fp32", 2, ALIGNED, marks=pytest.mark.slow),
    ],
)
def test_states_are_read_and_written_whole(stage: int, precision: str, world_size: int, extra: dict[str, Any]) -> None:
    values(run_ranks(read_and_write, world_size, stage=stage, precision=precision, extra=extra))
