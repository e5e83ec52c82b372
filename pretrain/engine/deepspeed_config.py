"""The DeepSpeed JSON, generated from the run's configuration.

What a user may add to it in the block ``deepspeed:`` is decided in ``passthrough.py``.
"""

from __future__ import annotations

import copy
from typing import Any

from data_pipeline.errors import UserError
from pretrain.config import RunConfig
from pretrain.engine.passthrough import check_passthrough


def build_deepspeed_config(config: RunConfig, *, pin_memory: bool = False) -> dict[str, Any]:
    """The JSON for ``deepspeed.initialize``, the user's ``deepspeed:`` block merged in.

    Accumulation is unmanaged: ``engine.step()`` is the boundary and gradients are scaled by the trainer, the only way
    that stays exact when the number of micro-batches changes between stages. ``pin_memory``: offloaded state goes to
    page-locked memory, for a GPU to read without a copy. Raises :class:`UserError` for a key that is unknown, decided
    elsewhere, or known to go wrong, and ``ValueError`` for a precision that is still ``auto``.
    """
    stage, precision = config.zero_stage, config.precision
    if precision == "auto":
        raise ValueError("precision auto is not settled: pretrain.precision does that")
    check_passthrough(config)
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
            # At stage 3 the next weights are gathered meanwhile; the end of every backward pass waits for both streams.
            # Below stage 2 it would lose gradients (see passthrough.py).
            "overlap_comm": stage == 3,
        },
        # ZeRO asks for it unless the optimizer's exact type is on its list, as torch.optim.AdamW's is. Lion and Muon
        # are tested here, at every stage.
        "zero_allow_untested_optimizer": config.optimizer.kind != "adamw",
        # Lets offload take our optimizers; DeepSpeed's own CPU Adam would be compiled for minutes at the first start.
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.compile and stage == 3:
        # Measured: 14 graphs and 50 s for one shape of a model of two layers, with no backend at all.
        raise UserError(
            "compile is refused at zero_stage 3: weights are gathered and let go around every module, where a compiled "
            "layer is cut to pieces, and nothing becomes faster: use zero_stage 2, with offload_optimizer if need be"
        )
    if config.offload_optimizer:
        if stage == 0:
            raise UserError(
                "offload_optimizer needs zero_stage 1, 2 or 3: at zero_stage 0 the optimizer has no state of its own "
                "that could be kept apart from the weights"
            )
        generated["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    if precision != "fp32":
        generated[precision] = {"enabled": True}
        # Sums of many small gradients: over micro-batches and over processes. 16 bits would round after each addition
        # (bfloat16 to 8 bits: of 256 equal micro-batches every further one is lost).
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
        generated["communication_data_type"] = "fp32"
    return _merge(generated, config.deepspeed)


def check_device(config: RunConfig, device_type: str, bf16_supported: bool = True) -> None:
    """Refuse a precision that the device does not have, before anything is built."""
    if config.precision == "fp16" and device_type == "cpu":
        raise UserError("precision fp16 needs a GPU, and this machine has none that PyTorch sees: use bf16 or fp32")
    if config.precision == "bf16" and device_type == "cuda" and not bf16_supported:
        raise UserError("precision bf16 is not supported by this GPU: use fp16 or fp32")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
