"""What a stage changes, as pure functions of the configuration and the position."""

from __future__ import annotations

from typing import Any

import pytest
from training_case import settings

from data_pipeline.errors import UserError
from pretrain.config import RunConfig, parse_config
from pretrain.curriculum.plan import build_plan, check_world_size, validation_tokens
from pretrain.curriculum.stages import (
    describe_changes,
    model_at,
    stage_maskings,
    stage_model,
    stage_settings,
    trained_length,
)


def run_of(lengths: list[int], model: dict[str, Any] | None = None, **stages: list[Any]) -> RunConfig:
    """A run with a stage for each length, each 1024 tokens long; ``stages`` are lists of a key's values, None for
    none."""
    from pathlib import Path

    curriculum = [
        {"until_tokens": 4096 * (i + 1), "seq_len": length, "micro_batch": 1}
        | {key: values[i] for key, values in stages.items() if values[i] is not None}
        for i, length in enumerate(lengths)
    ]
    changes = {"curriculum": curriculum, "model": model or {}}
    return parse_config(settings(Path("x"), Path("x"), **changes))


def rotary(run: RunConfig) -> list[tuple[float, float]]:
    models = [stage_model(run, i) for i in range(len(run.curriculum))]
    return [(model.rope_theta, model.rope_position_scale) for model in models]


@pytest.mark.parametrize(
    ("total", "every", "expected"),
    [
        (1_048_576, None, 52_416),  # two stages: a tenth of the run in two validations, in whole rows of 64
        (1_048_576, 131_072, 10_432),  # and at 8 positions
        (1_048_576, 1024, 8_192),  # no fewer
        (1 << 30, 1 << 20, 104_640),
        (1 << 30, None, 131_072),  # no more
    ],
)
def test_validations_read_a_tenth_of_the_run_together(total: int, every: int | None, expected: int) -> None:
    from pathlib import Path

    stages = [{"until_tokens": total // n, "seq_len": 64 // n, "micro_batch": 1} for n in (2, 1)]
    run = parse_config(settings(Path("x"), Path("x"), curriculum=stages, validation={"every_tokens": every}))
    assert validation_tokens(run, build_plan(run)) == expected


def test_a_validation_reads_at_least_a_row() -> None:
    from pathlib import Path

    stages = [{"until_tokens": 32_768, "seq_len": 16_384, "micro_batch": 1}]
    run = parse_config(settings(Path("x"), Path("x"), curriculum=stages, batch_tokens=16_384))
    assert validation_tokens(run, build_plan(run)) == 16_384


def test_rotary_rules() -> None:
    lengths = [16, 32, 64, 32, 128]
    width = 8  # of a head in these models: 16 over 2
    assert rotary(run_of(lengths)) == [(1e4, 1.0)] * 5
    growth = [1, 2, 4, 4, 8]  # a shorter stage does not go back
    ntk = rotary(run_of(lengths, {"rope_scaling": "ntk"}))
    assert ntk == [(1e4 * g ** (width / (width - 2)), 1.0) for g in growth]
    for (theta, _), g in zip(ntk, growth, strict=True):  # the slowest angle is slowed by the growth, the fastest is 1
        assert theta ** (-(width - 2) / width) == pytest.approx(1e4 ** (-(width - 2) / width) / g)
    assert rotary(run_of(lengths, {"rope_scaling": "linear"})) == [(1e4, 1 / g) for g in growth]
    assert rotary(run_of(lengths, {"rope_scaling": "linear", "rope_position_scale": 0.5})) == [
        (1e4, 0.5 / g) for g in growth
    ]


def test_rules_hold_for_the_layers_that_have_positions() -> None:
    run = run_of([16, 64], {"positions": ["none", "rotary"], "rope_scaling": "linear"}, rope_theta=[None, 2e4])
    assert rotary(run) == [(1e4, 1.0), (2e4, 0.25)]
    assert stage_settings(run, 1)["rope_position_scale"] == 0.25


def test_a_stages_own_base_wins_and_is_where_the_rule_goes_on_from() -> None:
    lengths, own = [16, 32, 64, 128], [None, 5e4, None, None]
    assert [theta for theta, _ in rotary(run_of(lengths, rope_theta=own))] == [1e4, 5e4, 5e4, 5e4]
    ntk = rotary(run_of(lengths, {"rope_scaling": "ntk"}, rope_theta=own))
    assert [theta for theta, _ in ntk] == [1e4, 5e4, 5e4 * 2 ** (8 / 6), 5e4 * 4 ** (8 / 6)]
    linear = rotary(run_of(lengths, {"rope_scaling": "linear"}, rope_theta=own))
    assert linear == [(1e4, 1.0), (5e4, 0.5), (5e4, 0.25), (5e4, 0.125)]


def test_learned_positions_have_a_table_for_every_stage_from_the_start() -> None:
    run = run_of([16, 64, 32, 128], {"positions": "learned", "max_positions": 48})
    models = [stage_model(run, i) for i in range(4)]
    assert [(model.max_positions, model.trained_positions) for model in models] == [
        (128, 16), (128, 64), (128, 64), (128, 128),
    ]  # fmt: skip
    assert stage_model(run_of([16], {"positions": "learned", "max_positions": 48}), 0).max_positions == 48
    roomy = parse_config(run.model_dump() | {"data": {"train": "x", "block_length": 256}})
    assert stage_model(roomy, 0).max_positions == 256  # so long may the stages become that a resume adds


def test_nothing_else_of_the_model_changes() -> None:
    for model in ({}, {"positions": "learned"}, {"positions": "none"}):
        run = run_of([16, 64], model)
        fields = {"rope_theta", "rope_position_scale", "trained_positions", "max_positions"}
        for i in (0, 1):
            assert stage_model(run, i).model_dump(exclude=fields) == run.model.model_dump(exclude=fields)
    assert stage_model(run, 1) == run.model


def test_the_model_at_a_position_is_that_of_the_last_step() -> None:
    run = run_of([16, 64, 128], {"rope_scaling": "ntk"})
    ends = [stage.end_tokens for stage in build_plan(run).stages]
    expected = {0: 0, 1: 0, ends[0]: 0, ends[0] + 1: 1, ends[1]: 1, ends[1] + 1: 2, ends[2]: 2, 10 * ends[2]: 2}
    for tokens, stage in expected.items():
        assert model_at(run, tokens) == stage_model(run, stage)
        assert trained_length(run, tokens) == [16, 64, 128][stage]


def test_batches_and_masking_of_the_stages() -> None:
    run = run_of([16, 64], batch_tokens=[None, 512], masking_rate=[0.3, None], rope_theta=[None, 2e4])
    assert [stage.batch_tokens for stage in build_plan(run).stages] == [256, 512]
    first, second = stage_maskings(run)
    assert (first.rate, second) == (0.3, run.data.masking.build())
    assert first.unit == second.unit
    assert stage_settings(run, 0) == {
        "batch_tokens": 256, "masking_rate": 0.3, "rope_theta": 1e4, "rope_position_scale": 1.0,
    }  # fmt: skip
    assert stage_settings(run, 1)["batch_tokens"] == 512
    assert describe_changes(run) == [
        "Masked in the stages: 30.0%, 15.0% (in validation 15.0%).",
        "Rotary base in the stages: 10,000; 20,000 (rule none).",
    ]
    learned = run_of([16, 64], {"positions": "learned"})
    assert describe_changes(learned)[0].startswith("Learned positions in the stages: 16, 64;")
    assert describe_changes(run_of([16, 64])) == []
    linear = run_of([16, 64], {"rope_scaling": "linear"})
    assert describe_changes(linear) == ["Rotary base in the stages: 10,000; 10,000 and positions x 0.25 (rule linear)."]


def test_the_stage_whose_rows_cannot_be_shared_is_named() -> None:
    run = run_of([16, 64], batch_tokens=[512, 192])
    with pytest.raises(UserError, match=r"stage 1 has 3 rows of 64 tokens .* use 1 processes, or batch_tokens 256 in"):
        check_world_size(build_plan(run), 4)
