"""Every state of every parameter, read and written in pieces at every ZeRO stage, against a plain optimizer."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run_ranks, values
from states_case import STEPS, build_engine, inputs, join, odd_model, plain_states, take_step


def read_and_write(stage: int, precision: str, extra: dict[str, Any]) -> None:
    """Runs in the ranks: trains, compares what is read with the reference, writes, reads again, publishes."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from pretrain.engine.state import fragments

    _, world_size = join()
    engine = build_engine(stage, precision, extra)
    named = dict(engine.module.named_parameters())
    assert all(fragments.state_names(engine, p) == ["fp32"] for p in named.values())
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for step in range(STEPS):
        take_step(engine, step)

    for name, states in plain_states().items():
        assert set(fragments.state_names(engine, named[name])) == {"fp32", "exp_avg", "exp_avg_sq", "ema"}
        with deepspeed.zero.GatheredParameters([named[name]], enabled=stage == 3):
            assert torch.equal(named[name].detach(), fragments.get_full(engine, named[name], "fp32").to(dtype))
        for state, expected in states.items() if precision == "fp32" else ():
            got = fragments.get_full(engine, named[name], state)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)

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
    fragments.sync_model_weights(engine)
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
