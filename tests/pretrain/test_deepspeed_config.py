"""The generated JSON, and what a user may and may not pass through."""

from __future__ import annotations

from typing import Any

import pytest

from data_pipeline.errors import UserError
from pretrain.config import RunConfig
from pretrain.engine.deepspeed_config import build_deepspeed_config, check_device


def config(**changes: Any) -> RunConfig:
    base: dict[str, Any] = {
        "name": "x",
        "model": {"vocab_size": 100},
        "data": {"train": "x"},
        "curriculum": [{"until_tokens": 1000, "seq_len": 16, "micro_batch": 4}],
        "batch_tokens": 64,
    }
    return RunConfig.model_validate({**base, **changes})


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_json_follows_the_run(stage: int, precision: str) -> None:
    json = build_deepspeed_config(config(zero_stage=stage, precision=precision, optimizer={"grad_clip": 0.7}))
    assert json["managed_gradient_accumulation"] is False
    assert json["gradient_accumulation_steps"] == 1
    assert json["zero_optimization"]["stage"] == stage
    assert json["gradient_clipping"] == 0.7
    assert {key for key in ("bf16", "fp16") if json.get(key, {}).get("enabled")} == {precision} - {"fp32"}


def test_stage_0_leaves_clipping_to_the_guard() -> None:
    assert build_deepspeed_config(config(zero_stage=0, precision="fp32"))["gradient_clipping"] == 0.0


def test_blocks_are_merged_and_defaults_give_way() -> None:
    block = {"zero_optimization": {"reduce_bucket_size": 7, "overlap_comm": True}, "comms_logger": {"enabled": True}}
    json = build_deepspeed_config(config(deepspeed=block))
    assert json["zero_optimization"]["stage"] == 2
    assert json["zero_optimization"]["reduce_bucket_size"] == 7
    assert json["zero_optimization"]["overlap_comm"] is True
    assert json["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"gradient_clippin": 1.0}, ["deepspeed.gradient_clippin", "did you mean 'gradient_clipping'"]),
        ({"gradient_clipping": 1.0}, ["deepspeed.gradient_clipping", "optimizer.grad_clip"]),
        ({"train_batch_size": 8}, ["batch_tokens"]),
        ({"gradient_accumulation_steps": 8}, ["micro_batch"]),
        ({"zero_optimization": {"stage": 1}}, ["deepspeed.zero_optimization.stage", "zero_stage"]),
        ({"bf16": {"enabled": False}}, ["precision"]),
        ({"fp16": {"initial_scale_power": 8}}, ["no effect with precision bf16"]),
        ({"optimizer": {"type": "Lamb"}}, ["block optimizer"]),
        ({"curriculum_learning": {}}, ["block curriculum"]),
        ({"zero_optimization": 3}, ["must be a block"]),
        ({"frobnicate": 1}, ["deepspeed.frobnicate", "passed through are"]),
    ],
)
def test_refusals_name_the_key_and_the_way_out(block: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build_deepspeed_config(config(deepspeed=block))
    for word in words:
        assert word in str(error.value)


def test_gradient_accumulation_in_float32_only_where_checkpoints_stay_readable() -> None:
    block = {"data_types": {"grad_accum_dtype": "fp32"}}
    assert build_deepspeed_config(config(zero_stage=2, deepspeed=block))["data_types"] == {"grad_accum_dtype": "fp32"}
    with pytest.raises(UserError, match="zero_stage 2 or 3"):
        build_deepspeed_config(config(zero_stage=1, deepspeed=block))


def test_precision_must_exist_on_the_device() -> None:
    with pytest.raises(UserError, match="needs a GPU"):
        check_device(config(precision="fp16"), "cpu")
    with pytest.raises(UserError, match="use fp16 or fp32"):
        check_device(config(precision="bf16"), "cuda", bf16_supported=False)
    check_device(config(precision="bf16"), "cpu")
    check_device(config(precision="fp16"), "cuda")
