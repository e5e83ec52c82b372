"""The DeepSpeed JSON, generated from the run's configuration.

DeepSpeed accepts unknown top-level keys in silence (0.19.8: ``gradient_clippin`` trains without clipping), so the
``deepspeed:`` block that a user passes through is validated here: unknown keys, keys that the run's own configuration
decides, and keys that have no effect in this trainer are refused by name.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

from data_pipeline.errors import UserError
from pretrain.config import RunConfig

# Blocks and keys of DeepSpeed 0.19.8 that act in this trainer as they do anywhere. Inside the blocks DeepSpeed is
# strict itself.
PASSED_THROUGH = (
    "zero_optimization", "bf16", "fp16", "data_types", "communication_data_type", "zero_force_ds_cpu_optimizer",
    "flops_profiler", "comms_logger", "wall_clock_breakdown", "memory_breakdown", "timers", "aio", "dump_state",
    "disable_python_gc", "log_level",
)  # fmt: skip

BLOCKS = ("zero_optimization", "bf16", "fp16", "data_types", "flops_profiler", "comms_logger", "timers", "aio")

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
    "bf16.enabled": "precision",
    "bf16.check_grad_overflow": "non-finite gradients are always looked for; see max_bad_steps",
    "fp16.enabled": "precision",
    "fp16.auto_cast": "inputs are token ids",
    "checkpoint": "the block checkpoint",
    "wandb": "telemetry.wandb",
    "tensorboard": "metrics.jsonl and telemetry.wandb",
    "csv_monitor": "metrics.jsonl",
    "comet": "metrics.jsonl and telemetry.wandb",
    "steps_per_print": "telemetry.log_every_steps",
    "curriculum_learning": "the block curriculum",
    "data_efficiency": "the block curriculum",
}


def build_deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The JSON for ``deepspeed.initialize``, the user's ``deepspeed:`` block merged in.

    Accumulation is unmanaged: ``engine.step()`` is the boundary and gradients are scaled by the trainer, the only way
    that stays exact when the number of micro-batches changes between stages. Raises :class:`UserError` for a key that
    is unknown, decided elsewhere, or known to go wrong.
    """
    stage, precision = config.zero_stage, config.precision
    _check_passthrough(config)
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.curriculum[0].micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Stage 0 hands gradients to plain AdamW, and DeepSpeed's clipping there hides the norm: StepGuard clips
        # instead.
        "gradient_clipping": config.optimizer.grad_clip if stage else 0.0,
        "zero_optimization": {
            "stage": stage,
            # The default, 5e8 elements, would reserve 1 to 2 GB a buffer.
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        # ZeRO asks for it unless the optimizer's exact type is on its list, as torch.optim.AdamW's is. Lion and Muon
        # are tested here, at every stage.
        "zero_allow_untested_optimizer": config.optimizer.kind != "adamw",
        # Lets offload take our optimizers; DeepSpeed's own CPU Adam would be compiled for minutes at the first start.
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision != "fp32":
        generated[precision] = {"enabled": True}
    return _merge(generated, config.deepspeed)


def check_device(config: RunConfig, device_type: str, bf16_supported: bool = True) -> None:
    """Refuse a precision that the device does not have, before anything is built."""
    if config.precision == "fp16" and device_type == "cpu":
        raise UserError("precision fp16 needs a GPU, and this machine has none that PyTorch sees: use bf16 or fp32")
    if config.precision == "bf16" and device_type == "cuda" and not bf16_supported:
        raise UserError("precision bf16 is not supported by this GPU: use fp16 or fp32")


def _check_passthrough(config: RunConfig) -> None:
    block = config.deepspeed
    for key, value in block.items():
        dotted = [key] + [f"{key}.{sub}" for sub in value] if isinstance(value, dict) else [key]
        for name in dotted:
            if name in DECIDED_ELSEWHERE:
                raise UserError(f"deepspeed.{name} is decided by the run's configuration: {DECIDED_ELSEWHERE[name]}")
        if key not in PASSED_THROUGH:
            near = difflib.get_close_matches(key, [*PASSED_THROUGH, *DECIDED_ELSEWHERE], n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"passed through are {', '.join(PASSED_THROUGH)}"
            raise UserError(f"deepspeed.{key} is no key that this trainer passes to DeepSpeed: {hint}")
        if key in BLOCKS and not isinstance(value, dict):
            raise UserError(f"deepspeed.{key} must be a block of keys and values, got {value!r}")
        if key in ("bf16", "fp16") and key != config.precision:
            raise UserError(f"deepspeed.{key} has no effect with precision {config.precision}")
    accumulate = block.get("data_types", {}).get("grad_accum_dtype")
    if accumulate and config.precision != "fp32" and config.zero_stage == 1:
        raise UserError(
            "deepspeed.data_types.grad_accum_dtype at zero_stage 1 writes checkpoints that cannot be consolidated "
            "(DeepSpeed 0.19.8): use zero_stage 2 or 3"
        )


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
