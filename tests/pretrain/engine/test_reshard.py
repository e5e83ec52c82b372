"""What one layout of processes and ZeRO stage wrote, read by another: every state to the bit, and the next step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks, values
from states_case import STEPS, build_engine, join, plain_states, take_step

SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 8, "sub_group_size": 10}}
"""At stage 3: some parameters persist whole, some do not, and a group has several flat tensors."""
ACCUMULATE = {"data_types": {"grad_accum_dtype": "fp32"}}
ROUND_ROBIN = {"zero_optimization": {"round_robin_gradients": True}}
ALIGNED = {"zero_optimization": {"parameter_alignment": True}}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


def all_states(engine: Any) -> dict[str, dict[str, Any]]:
    from pretrain.engine.state import fragments

    return {
        name: {state: fragments.get_full(engine, p, state) for state in fragments.state_names(engine, p)}
        for name, p in engine.module.named_parameters()
    }


def write(folder: str, stages: list[int], precision: str, extra: dict[str, Any]) -> None:
    """Runs in the ranks: some steps at each stage; DeepSpeed's files, and every state as a reference."""
    import torch

    from pretrain.engine.state.reshard import group_names
    from pretrain.engine.state.saved import GROUPS

    rank, world_size = join()
    for stage in stages:
        engine = build_engine(stage, precision, extra)
        for step in range(STEPS):
            take_step(engine, step)
        engine.module.seen.fill_(stage + 1)
        engine.optimizer.param_groups[0]["lr"] = 0.5  # of the groups' saved values the one that a fresh engine lacks
        tag = f"from-{world_size}-{stage}"
        engine.save_checkpoint(folder, tag=tag, client_state={GROUPS: group_names(engine)}, save_latest=False)
        states = all_states(engine)
        if rank == 0:
            torch.save(states, Path(folder, tag + ".pt"))
        engine.destroy()


def read(
    folder: str, stages: list[int], precision: str, extra: dict[str, Any], written: str | None = None
) -> tuple[int, int]:
    """Runs in the ranks: reads what every layout wrote into every stage; ``written`` in another precision, if given.

    Returns in how many cases, and how many of them DeepSpeed's own load could read too.
    """
    import deepspeed
    import torch
    import torch.distributed as dist

    from pretrain.engine.state.reshard import restore, zero_layout
    from pretrain.engine.state.saved import SavedStates

    join()
    after = plain_states(STEPS + 1)
    count = same = 0
    for stage in stages:
        for path in sorted(Path(folder).glob("from-*[0-9]")):
            dist.barrier()
            saved = SavedStates(path)
            engine = build_engine(stage, precision, extra)
            restore(engine, saved)
            expected = torch.load(path.with_name(path.name + ".pt"))
            for name, states in all_states(engine).items():
                assert list(states) == list(expected[name])
                for state, value in states.items():
                    assert torch.equal(value, expected[name][state]), (path.name, stage, name, state)
                    assert torch.equal(saved.full(name, state), value)
            for name, p in engine.module.named_parameters():
                with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
                    assert torch.equal(p.detach(), expected[name]["fp32"].to(p.dtype)), name
            assert torch.equal(engine.module.seen.float(), torch.full((2,), float(path.name[-1]) + 1))
            assert engine.global_steps == STEPS
            # One count for each tensor, of its own: one that is shared would go up several times in a step.
            counts = [state["step"] for state in engine.optimizer.state.values()]
            assert len(counts) == len({own.data_ptr() for own in counts}) > 1
            assert {float(own) for own in counts} == {STEPS}
            groups = {group["name"]: group for group in engine.optimizer.param_groups}
            assert (groups["decay"]["weight_decay"], groups["no_decay"]["weight_decay"]) == (0.5, 0.0)
            assert (groups["decay"]["betas"], groups["no_decay"]["eps"]) == ((0.8, 0.9), 1e-7)
            assert (groups["decay"]["lr"], groups["no_decay"]["lr"]) == (0.5, 0.01)
            groups["decay"]["lr"] = 0.01
            take_step(engine, STEPS)
            ours = all_states(engine)
            if (
                precision == (written or precision) == "fp32"
            ):  # bias correction, decay and averages all went on: it is the plain optimizer's step
                for name, states in ours.items():
                    for state, value in states.items():
                        torch.testing.assert_close(value, after[name][state], rtol=1e-5, atol=1e-7)
            if saved.layout == zero_layout(engine):
                assert stage == saved.layout.zero_stage
                again = build_engine(stage, precision, extra)
                again.load_checkpoint(folder, tag=path.name)
                again.optimizer.param_groups[0]["lr"] = 0.01
                take_step(again, STEPS)
                theirs = all_states(again)
                assert all(torch.equal(ours[n][s], theirs[n][s]) for n in ours for s in ours[n])
                again.destroy()
                same += 1
            engine.destroy()
            count += 1
    return count, same


@pytest.mark.parametrize(
    ("writers", "readers", "stages", "precision", "extra"),
    [
        ([2], 1, [0, 3], "fp32", SMALL),
        ([2], 2, [0, 2], "fp32", {}),
        ([2], 2, [1, 3], "bf16", SMALL),
        pytest.param([1, 2], 2, [0, 1, 2, 3], "fp32", SMALL, marks=pytest.mark.slow),
        pytest.param([1, 2], 2, [1, 2, 3], "bf16", {}, marks=pytest.mark.slow),
        pytest.param([1, 2, 3], 1, [0, 1, 2, 3], "fp32", {}, marks=pytest.mark.slow),
        pytest.param([1, 2, 3], 3, [0, 1, 2, 3], "fp32", SMALL, marks=pytest.mark.slow),
        pytest.param([1, 3], 2, [1, 2, 3], "bf16", ACCUMULATE, marks=pytest.mark.slow),
        pytest.param([2, 3], 2, [1, 2], "bf16", ROUND_ROBIN, marks=pytest.mark.slow),
        pytest.param([2, 3], 2, [1, 2], "fp32", ALIGNED, marks=pytest.mark.slow),
        pytest.param([2], 3, [1, 2, 3], "bf16", OFFLOAD, marks=pytest.mark.slow),
    ],
)
def test_every_layout_reads_every_other(
    tmp_path: Path, writers: list[int], readers: int, stages: list[int], precision: str, extra: dict[str, Any]
) -> None:
    case = {"folder": str(tmp_path), "stages": stages, "precision": precision, "extra": extra}
    for world_size in writers:
        values(run_ranks(write, world_size, **case))
    counts = values(run_ranks(read, readers, **case))
    assert counts == [(len(stages) ** 2 * len(writers), len(stages) * (readers in writers))] * readers


@pytest.mark.parametrize(
    ("written", "precision", "stages", "extra"),
    [
        ("bf16", "fp32", [1, 2, 3], ACCUMULATE),
        ("fp32", "bf16", [1, 2, 3], {}),
        pytest.param("bf16", "fp32", [1, 2, 3], SMALL, marks=pytest.mark.slow),
        pytest.param("fp32", "bf16", [1, 2, 3], SMALL, marks=pytest.mark.slow),
        pytest.param("fp32", "bf16", [1, 2, 3], OFFLOAD, marks=pytest.mark.slow),
    ],
)
def test_another_precision_takes_over_every_state_to_the_bit(
    tmp_path: Path, written: str, precision: str, stages: list[int], extra: dict[str, Any]
) -> None:
    """Also the same processes and stage, where DeepSpeed's own load would have tried."""
    case = {"folder": str(tmp_path), "stages": stages, "extra": extra}
    values(run_ranks(write, 2, precision=written, **case))
    counts = values(run_ranks(read, 2, precision=precision, written=written, **case))
    assert counts == [(len(stages) ** 2, 0)] * 2


def other_groups(folder: str, stage: int, extra: dict[str, Any]) -> None:
    """Runs in the ranks: the same processes and stage, but a matrix that is not decayed any more."""
    import torch

    from pretrain.engine.state.reshard import restore, zero_layout
    from pretrain.engine.state.saved import SavedStates

    _, world_size = join()
    path = Path(folder, f"from-{world_size}-{stage}")
    saved = SavedStates(path)
    engine = build_engine(stage, "fp32", extra, not_decayed="first.weight")
    assert saved.layout != zero_layout(engine)
    restore(engine, saved)
    expected = torch.load(path.with_name(path.name + ".pt"))
    for name, states in all_states(engine).items():
        for state, value in states.items():
            assert torch.equal(value, expected[name][state]), (name, state)


def unnamed_stage_0(folder: str) -> None:
    """Runs in a rank: a checkpoint without the names of its parameters, as they were before there were names."""
    import torch

    from pretrain.engine.state.saved import GROUPS, SavedStates

    path = Path(folder, "from-1-0")
    (file,) = path.glob("*model_states.pt")
    body = torch.load(file, weights_only=False)
    assert [len(names) for names in body.pop(GROUPS)] == [3, 4]
    torch.save(body, file)
    saved = SavedStates(path)
    for name, states in torch.load(path.with_name("from-1-0.pt")).items():
        assert all(torch.equal(saved.full(name, state), value) for state, value in states.items()), name


def another_model(folder: str) -> str:
    """Runs in a rank: tries to read the states of a model of another width."""
    from data_pipeline.errors import UserError
    from pretrain.engine.state.reshard import restore
    from pretrain.engine.state.saved import SavedStates

    join()
    with pytest.raises(UserError) as refusal:
        restore(build_engine(0, "fp32", {}, width=9), SavedStates(Path(folder, "from-1-0")))
    return str(refusal.value)


def missing_file(folder: str) -> str:
    """Runs in a rank: a checkpoint that lacks what one process wrote."""
    from data_pipeline.errors import UserError
    from pretrain.engine.state.saved import SavedStates

    next(Path(folder, "from-2-2").glob("*rank_1_*optim_states.pt")).unlink()
    with pytest.raises(UserError) as refusal:
        SavedStates(Path(folder, "from-2-2"))
    return str(refusal.value)


@pytest.mark.slow
def test_parameters_that_changed_their_group_are_found_by_name(tmp_path: Path) -> None:
    for stage in (0, 2, 3):
        case = {"folder": str(tmp_path), "extra": SMALL}
        values(run_ranks(write, 2, stages=[stage], precision="fp32", **case))
        values(run_ranks(other_groups, 2, stage=stage, **case))


def test_what_is_no_checkpoint_of_this_model_is_refused(tmp_path: Path) -> None:
    case = {"folder": str(tmp_path), "precision": "fp32", "extra": {}}
    values(run_ranks(write, 1, stages=[0], **case))
    values(run_ranks(write, 2, stages=[2], **case))
    (message,) = values(run_ranks(another_model, 1, folder=str(tmp_path)))
    assert "first.bias has the shape (7,), wanted is the shape (9,)" in message
    (message,) = values(run_ranks(missing_file, 1, folder=str(tmp_path)))
    assert "written by 2 processes and has the optimizer states of 1" in message
    values(run_ranks(unnamed_stage_0, 1, folder=str(tmp_path)))


def fp16(folder: str, stage: int, reading: bool) -> tuple[float, float, int]:
    """Runs in the ranks: overflows lower the loss scale; what reads it continues with it. CPUs have float16 kernels."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from pretrain.engine.state.reshard import restore
    from pretrain.engine.state.saved import SavedStates

    get_accelerator().is_fp16_supported = lambda: True
    join()
    block = {"fp16": {"initial_scale_power": 24, "hysteresis": 1}}
    engine = build_engine(stage, "fp16", block)
    fresh = float(engine.optimizer.loss_scale)
    if reading:
        (path,) = Path(folder).glob("step*")
        restore(engine, SavedStates(path))
    else:
        for step in range(12):
            take_step(engine, step)
        assert engine.optimizer.loss_scale < fresh
        engine.save_checkpoint(folder, tag="step", save_latest=False)
    assert next(engine.module.parameters()).dtype == torch.float16
    return fresh, float(engine.optimizer.loss_scale), engine.optimizer.loss_scaler.cur_iter


def without_scaler(folder: str) -> None:
    """Runs in a rank: fp16's loss scale stays behind in bf16, and bf16's scale of 1 where fp16 begins."""
    from deepspeed.accelerator import get_accelerator

    from pretrain.engine.state.reshard import restore
    from pretrain.engine.state.saved import SavedStates

    get_accelerator().is_fp16_supported = lambda: True
    join()
    for written, precision in (("fp16", "bf16"), ("bf16", "fp16")):
        engine = build_engine(1, written, {})
        take_step(engine, 0)
        engine.save_checkpoint(folder, tag=written, save_latest=False)
        other = build_engine(2, precision, {})
        fresh = float(other.optimizer.loss_scale)
        assert (fresh == 1) == (precision == "bf16")
        saved = SavedStates(Path(folder, written))
        assert saved.layout.precision == written
        restore(other, saved)
        assert (float(other.optimizer.loss_scale), other.optimizer.loss_scaler.dynamic) == (fresh, precision == "fp16")


def test_only_fp16_has_a_loss_scale(tmp_path: Path) -> None:
    values(run_ranks(without_scaler, 1, folder=str(tmp_path)))


@pytest.mark.parametrize(("writer", "reader"), [((2, 1), (1, 3)), pytest.param((1, 3), (2, 2), marks=pytest.mark.slow)])
def test_the_loss_scale_of_fp16_goes_along(tmp_path: Path, writer: tuple[int, int], reader: tuple[int, int]) -> None:
    case = {"folder": str(tmp_path)}
    written = values(run_ranks(fp16, writer[0], stage=writer[1], reading=False, **case))
    assert values(run_ranks(fp16, reader[0], stage=reader[1], reading=True, **case)) == [written[0]] * reader[0]
