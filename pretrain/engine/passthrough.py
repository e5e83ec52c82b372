"""What a user's ``deepspeed:`` block may hold, and why the rest of DeepSpeed's keys may not be there.

DeepSpeed 0.19.8 accepts unknown top-level keys in silence (``gradient_clippin`` trains without clipping), has keys that
say what the run's own configuration says already, and keys that go wrong in this trainer. Each is refused by name with
the reason. ``zero_optimization`` and the precision blocks are lists of what is let through: a key that nobody tried
here is refused too.
"""

from __future__ import annotations

import difflib
from typing import Any

from data_pipeline.errors import UserError
from pretrain.config import RunConfig

# Keys of DeepSpeed 0.19.8 that act in this trainer as they do anywhere. Inside the blocks DeepSpeed is strict itself.
PASSED_THROUGH = (
    "zero_optimization", "bf16", "fp16", "data_types", "communication_data_type",
    "flops_profiler", "comms_logger", "wall_clock_breakdown", "memory_breakdown", "timers", "dump_state",
    "disable_python_gc", "log_level",
)  # fmt: skip

BLOCKS = ("zero_optimization", "bf16", "fp16", "data_types", "flops_profiler", "comms_logger", "timers")

# Dotted keys that the run's configuration decides, and where it does.
DECIDED_ELSEWHERE = {
    "train_batch_size": "batch_tokens",
    "train_micro_batch_size_per_gpu": "curriculum.N.micro_batch",
    "gradient_accumulation_steps": "it follows from batch_tokens and curriculum.N.micro_batch",
    "managed_gradient_accumulation": "the trainer owns the boundary; DeepSpeed's breaks when the count changes",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "the block optimizer",
    "scheduler": "the block schedule",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "offload_optimizer",
    "zero_optimization.cpu_offload": "offload_optimizer",
    "zero_force_ds_cpu_optimizer": "offload_optimizer; the optimizer is always PyTorch's",
    "bf16.enabled": "precision",
    "bf16.check_grad_overflow": "non-finite gradients are always looked for; see max_bad_steps",
    "fp16.enabled": "precision",
    "fp16.auto_cast": "inputs are token ids",
    "data_types.param_dtype": "precision",
    "activation_checkpointing": "activation_checkpointing, at the top level of the run's configuration",
    "compile": "compile, at the top level of the run's configuration",
    "torch_autocast": "precision",
    "checkpoint": "the block checkpoint",
    "wandb": "telemetry.wandb",
    "tensorboard": "metrics.jsonl and telemetry.wandb",
    "csv_monitor": "metrics.jsonl",
    "comet": "metrics.jsonl and telemetry.wandb",
    "steps_per_print": "telemetry.log_every_steps",
    "curriculum_learning": "the block curriculum",
    "data_efficiency": "the block curriculum",
}

_FILES = "it changes the files of a checkpoint, and resuming and exporting from those was never tried here"
_QUANTIZED = (
    "weights or gradients rounded to 8 bits on the way are not the mathematics that precision asks for, and the "
    "kernels would have to be compiled"
)

# Dotted keys that are known to go wrong in this trainer, and why.
REFUSED = {
    "zero_optimization.offload_param": "weights kept on the host were never tried here; use offload_optimizer, which "
    "moves three quarters of the state",
    "zero_optimization.cpu_offload_param": "weights kept on the host were never tried here; use offload_optimizer",
    "zero_optimization.compute_grad_norm": "the norm is what tells a bad step and what optimizer.grad_clip clips",
    "zero_optimization.load_from_fp32_weights": "a resumed run would begin from weights rounded to 16 bits, "
    "not from those that it stopped with",
    "zero_optimization.elastic_checkpoint": _FILES,
    "zero_optimization.round_robin_gradients": _FILES,
    "zero_optimization.parameter_alignment": _FILES,
    "zero_optimization.zero_quantized_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_gradients": _QUANTIZED,
    "zero_optimization.zero_hpz_partition_size": "a second partition of the weights was never tried here",
    "zero_optimization.zenflow": "it applies gradients some steps late, which no checkpoint here keeps",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "it gathers 16-bit weights on one process at every "
    "checkpoint for a file that nothing here reads; the export has the float32 weights",
    "zero_optimization.gather_16bit_weights_on_model_save": "it gathers 16-bit weights on one process at every "
    "checkpoint for a file that nothing here reads; the export has the float32 weights",
    "bf16.immediate_grad_update": "it belongs to an optimizer that this trainer does not use; accumulation is in "
    "float32 without it",
    "bf16.bf16_master_weights_and_grads": "master weights stay float32: steps below 2^-9 of a weight would be lost",
    "bf16.bf16_optimizer_states": "the optimizer's state stays float32",
    "fp16.fp16_master_weights_and_grads": "master weights stay float32: steps below 2^-12 of a weight would be lost",
    "fp16.loss_scale": "with a fixed scale nothing tells an overflow that halving would cure from a bad step",
    "fp16.min_loss_scale": "overflows count as bad steps once the scale has come down to 1; it must be able to",
}

# What is let through of the blocks in which DeepSpeed has more than was tried here.
ALLOWED = {
    "zero_optimization": (
        "reduce_bucket_size", "allgather_bucket_size", "overlap_comm",
        "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
        "stage3_max_live_parameters", "stage3_max_reuse_distance", "log_trace_cache_warnings", "enable_sanity_checks",
    ),
    "bf16": (),
    "fp16": ("initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis"),
    "data_types": ("grad_accum_dtype",),
}  # fmt: skip


def check_passthrough(config: RunConfig) -> None:
    """Raise :class:`UserError` for the first key of ``config.deepspeed`` that must not be there, with the way out."""
    for key, value in config.deepspeed.items():
        _check_decided(key, value)
        if key not in PASSED_THROUGH:
            near = difflib.get_close_matches(key, [*PASSED_THROUGH, *DECIDED_ELSEWHERE], n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"passed through are {', '.join(PASSED_THROUGH)}"
            raise UserError(f"deepspeed.{key} is no key that this trainer passes to DeepSpeed: {hint}")
        if key in BLOCKS and not isinstance(value, dict):
            raise UserError(f"deepspeed.{key} must be a block of keys and values, got {value!r}")
        if key in ALLOWED:
            _check_block(key, value)
        if key in ("bf16", "fp16") and key != config.precision:
            raise UserError(f"deepspeed.{key} has no effect with precision {config.precision}")
    _check_overlap(config)
    _check_types(config)


def _check_decided(key: str, value: Any) -> None:
    for name in [key] + ([f"{key}.{sub}" for sub in value] if isinstance(value, dict) else []):
        if name in DECIDED_ELSEWHERE:
            raise UserError(f"deepspeed.{name} is decided by the run's configuration: {DECIDED_ELSEWHERE[name]}")


def _check_block(key: str, block: dict[str, Any]) -> None:
    for sub in block:
        name = f"{key}.{sub}"
        if name in REFUSED:
            raise UserError(f"deepspeed.{name} is refused: {REFUSED[name]}")
        if sub not in ALLOWED[key]:
            near = difflib.get_close_matches(sub, ALLOWED[key], n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"passed through are {', '.join(ALLOWED[key]) or 'none'}"
            raise UserError(f"deepspeed.{name} is no key that this trainer was tried with: {hint}")


def _check_overlap(config: RunConfig) -> None:
    if config.zero_stage < 2 and config.deepspeed.get("zero_optimization", {}).get("overlap_comm"):
        raise UserError(
            f"deepspeed.zero_optimization.overlap_comm is refused at zero_stage {config.zero_stage}: gradients are "
            "reduced in the step there, after every backward pass, and DeepSpeed 0.19.8 would not reduce them at all; "
            "it works at zero_stage 2 and 3"
        )


def _check_types(config: RunConfig) -> None:
    """Gradients are added up, within a process and over all, in float32 or in the precision of the run."""
    block = config.deepspeed
    fits = ("fp32",) if config.precision == "fp32" else ("fp32", config.precision)
    chosen = {
        "data_types.grad_accum_dtype": block.get("data_types", {}).get("grad_accum_dtype", "fp32"),
        "communication_data_type": block.get("communication_data_type", "fp32"),
    }
    for name, value in chosen.items():
        if value not in fits:
            raise UserError(
                f"deepspeed.{name} is {value!r}; with precision {config.precision} it can be {' or '.join(fits)}"
            )
