"""The generated JSON, and what a user may and may not pass through."""

from __future__ import annotations

from typing import Any

import pytest

from data_pipeline.errors import UserError
from pretrain.config import RunConfig
from pretrain.engine.deepspeed_config import build_deepspeed_config, check_device
from pretrain.engine.passthrough import ALLOWED, REFUSED


def config(**changes: Any) -> RunConfig:
    base: dict[str, Any] = {
        "name": "x",
        "model": {"vocab_size": 100},
        "data": {"train": "x"},
        "curriculum": [{"until_tokens": 1000, "seq_len": 16, "micro_batch": 4}],
        "batch_tokens": 64,
        "precision": "bf16",
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
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["run's configuration: offload_optimizer"]),
        ({"zero_optimization": {"reduce_bucket_sise": 1}}, ["did you mean 'reduce_bucket_size'"]),
        ({"data_types": {"param_dtype": "fp32"}}, ["deepspeed.data_types.param_dtype", "precision"]),
        ({"activation_checkpointing": {}}, ["activation_checkpointing, at the top level"]),
        ({"compile": {"deepcompile": True}}, ["compile, at the top level"]),
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


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_gradients_are_added_up_in_float32_unless_asked_otherwise(stage: int, precision: str) -> None:
    json = build_deepspeed_config(config(zero_stage=stage, precision=precision))
    assert json["data_types"] == {"grad_accum_dtype": "fp32"}
    assert json["communication_data_type"] == "fp32"
    block = {"data_types": {"grad_accum_dtype": precision}, "communication_data_type": precision}
    json = build_deepspeed_config(config(zero_stage=stage, precision=precision, deepspeed=block))
    assert json["data_types"] == {"grad_accum_dtype": precision}
    assert json["communication_data_type"] == precision
    other = {"bf16": "fp16", "fp16": "bf16"}[precision]
    with pytest.raises(UserError, match=f"deepspeed.communication_data_type is '{other}'.*can be fp32 or {precision}"):
        build_deepspeed_config(
            config(zero_stage=stage, precision=precision, deepspeed={"communication_data_type": other})
        )


def test_float32_is_not_added_up_in_less() -> None:
    json = build_deepspeed_config(config(precision="fp32"))
    assert "data_types" not in json
    with pytest.raises(UserError, match="grad_accum_dtype is 'bf16'; with precision fp32 it can be fp32"):
        build_deepspeed_config(config(precision="fp32", deepspeed={"data_types": {"grad_accum_dtype": "bf16"}}))


@pytest.mark.parametrize(("stage", "default"), [(0, False), (1, False), (2, False), (3, True)])
def test_communication_overlaps_where_gradients_are_reduced_in_the_backward_pass(stage: int, default: bool) -> None:
    values = {"zero_stage": stage, "precision": "fp32"}
    assert build_deepspeed_config(config(**values))["zero_optimization"]["overlap_comm"] is default
    block = {"zero_optimization": {"overlap_comm": True}}
    if stage >= 2:
        assert build_deepspeed_config(config(**values, deepspeed=block))["zero_optimization"]["overlap_comm"] is True
    else:
        with pytest.raises(UserError, match=f"overlap_comm is refused at zero_stage {stage}: gradients are reduced in"):
            build_deepspeed_config(config(**values, deepspeed=block))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_known_to_go_wrong_is_refused_by_name_and_reason(name: str) -> None:
    block, key = name.split(".")
    precision = block if block in ("bf16", "fp16") else "bf16"
    with pytest.raises(UserError) as error:
        build_deepspeed_config(config(precision=precision, deepspeed={block: {key: 1}}))
    assert str(error.value) == f"deepspeed.{name} is refused: {REFUSED[name]}"


def test_every_key_of_zero_that_deepspeed_knows_is_let_through_or_refused() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for key in [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]:
        block = {"zero_optimization": {key: 7}}
        if key in ALLOWED["zero_optimization"]:
            assert build_deepspeed_config(config(deepspeed=block))["zero_optimization"][key] == 7
        else:
            with pytest.raises(UserError, match=rf"deepspeed.zero_optimization.{key} is "):
                build_deepspeed_config(config(deepspeed=block))


def test_precision_must_exist_on_the_device() -> None:
    with pytest.raises(UserError, match="needs a GPU"):
        check_device(config(precision="fp16"), "cpu")
    with pytest.raises(UserError, match="use fp16 or fp32"):
        check_device(config(precision="bf16"), "cuda", bf16_supported=False)
    check_device(config(precision="bf16"), "cpu")
    check_device(config(precision="fp16"), "cuda")
