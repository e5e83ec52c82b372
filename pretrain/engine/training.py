"""DeepSpeed's engine behind the few calls that training needs, with what 0.19.8 gets wrong kept out of reach.

The trainer sees: a loss that is differentiated with a scale, a step that says whether it was applied and how long the
gradient was, and files. Everything that depends on the ZeRO stage is in this module.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from data_pipeline.errors import UserError
from pretrain.config import OptimizerConfig, RunConfig
from pretrain.distributed import randomness
from pretrain.distributed.world import World
from pretrain.engine.deepspeed_config import build_deepspeed_config, check_device
from pretrain.engine.layers import layer_runner
from pretrain.engine.repairs import (
    forget_gradients,
    grow_scale,
    keep_scale_until_applied,
    zero_optimizer_at_stage_1,
)
from pretrain.model.attention.layout import Layout
from pretrain.optim.optimizer import apply_hyperparameters, build_optimizer, set_learning_rate

if TYPE_CHECKING:
    from pretrain.model.transformer import LMOutput, NystromformerLM


class StepResult(NamedTuple):
    """What became of an optimizer step: skipped on all processes alike if the gradient was not finite."""

    applied: bool
    grad_norm: float  # before clipping; inf for a step that was skipped
    loss_scale: float


def import_deepspeed(verbose: bool = False) -> Any:
    """Import DeepSpeed without its start-up notes, its compiled operators and their leftovers.

    ``deepspeed_shm_comm`` would be compiled for minutes at a first start and leaves 69 MB a process in /dev/shm for
    ever; gloo takes its place. It must be off before DeepSpeed's communication is initialised.
    """
    # Otherwise it goes looking, and warns on a machine without a GPU.
    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.INFO if verbose else logging.ERROR)
    for handler in logger.handlers:
        handler.setLevel(logger.level)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class TrainingEngine:
    """A model, its AdamW and DeepSpeed's engine around both."""

    def __init__(self, config: RunConfig, world: World, verbose: bool = False) -> None:
        """Build everything from a configuration whose ``model.vocab_size`` is set.

        The weights depend on the seed only; afterwards each process draws (for dropout) from a stream of its own.
        """
        from pydantic import ValidationError

        from pretrain.model.transformer import build_model

        on_gpu = world.device.type == "cuda"
        check_device(config, world.device.type, not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False))
        deepspeed = import_deepspeed(verbose)
        from deepspeed.runtime.config import DeepSpeedConfigError

        self.config, self.world = config, world
        self.zero_stage = config.zero_stage
        self.deepspeed_config = build_deepspeed_config(config, pin_memory=on_gpu)
        randomness.seed_everything(config.seed)
        self.model: NystromformerLM = build_model(config.model)
        self.model.run_layer = layer_runner(config.activation_checkpointing, config.compile)
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        optimizer = build_optimizer(self.model, config.optimizer)
        self._guard = StepGuard(optimizer, config.optimizer) if self.zero_stage == 0 else None
        try:
            with zero_optimizer_at_stage_1():
                self._engine, _, _, _ = deepspeed.initialize(
                    model=self.model, optimizer=optimizer, config=copy.deepcopy(self.deepspeed_config)
                )
        except (DeepSpeedConfigError, ValidationError) as error:
            faults = str(error)
            if isinstance(error, ValidationError):
                faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UserError(f"DeepSpeed refuses what the block deepspeed: passes to it: {faults}") from None
        if config.precision == "fp16":
            keep_scale_until_applied(self._engine.optimizer)
        randomness.seed_everything(config.seed + 1 + world.rank)

    def backward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, scale: float, document_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its loss sum, detached, float32 scalar on the device.

        ``input_ids`` and ``labels`` are (B, L) int64 on the device. ``document_ids`` (B, L) integers on the CPU tell
        the documents of packed rows apart, -1 at padding; without them each row is one sequence. The gradient added is
        that of ``loss_sum * scale``.
        """
        layout = None if document_ids is None else Layout.from_documents(document_ids)
        loss_sum = self._engine(input_ids, labels=labels, layout=layout).loss_sum
        # DeepSpeed averages gradients over processes; the product with their number makes that the sum we want. A loss
        # that is not finite may have finite gradients (a target of probability 0 under fp16); the factor NaN makes
        # certain that ZeRO's own check of the reduced gradient, the only one that all processes share for free, sees
        # it.
        factor = torch.where(torch.isfinite(loss_sum.detach()), scale * self.world.world_size, math.nan)
        self._engine.backward(loss_sum * factor, scale_wrt_gas=False)
        return loss_sum.detach()

    def step(self, lr: float) -> StepResult:
        """Apply the accumulated gradients at this learning rate, or drop them if any process's are not finite."""
        engine = self._engine
        set_learning_rate(engine.optimizer, lr)
        engine.step()
        if self._guard is not None:
            return StepResult(self._guard.applied, self._guard.grad_norm, 1.0)
        optimizer = engine.optimizer
        if self.config.precision == "fp16" and not optimizer.overflow:
            grow_scale(optimizer)
        scale = float(optimizer.loss_scale) if self.config.precision == "fp16" else 1.0
        if optimizer.overflow:
            forget_gradients(optimizer)
            return StepResult(False, math.inf, scale)
        return StepResult(True, float(engine.get_global_grad_norm()), scale)

    @torch.no_grad()
    def evaluate(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **options: Any) -> LMOutput:
        """Forward without gradients, in evaluation mode; under ZeRO-3 all processes must call it alike."""
        self._engine.eval()
        try:
            return self._engine(input_ids, labels=labels, **options)
        finally:
            self._engine.train()

    def train(self) -> None:
        """Put the model into training mode."""
        self._engine.train()

    @property
    def state_device(self) -> torch.device:
        """Where the optimizer's state is kept."""
        return torch.device("cpu") if self.config.offload_optimizer else self.world.device

    def missing_state_bytes(self) -> int:
        """Bytes of AdamW's two float32 moments that this process has still to make, in its first step."""
        zero = self._engine.optimizer
        partitions = {0: "", 1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
        name = partitions.get(self.zero_stage, "fp32_partitioned_groups_flat")
        weights = list(self.model.parameters()) if not name else getattr(zero, name)
        return sum(8 * weight.numel() for weight in weights if not zero.state.get(weight))

    def save(self, folder: Path, tag: str) -> None:
        """Write DeepSpeed's files below ``folder/tag``. No pointer, no commit: that is ``checkpoint/store.py``'s."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Read DeepSpeed's files of ``folder/tag`` into a fresh engine; the configuration's hyper-parameters stay."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise UserError(f"DeepSpeed could not read the checkpoint {folder / tag}")
        apply_hyperparameters(self._engine.optimizer, self.config.optimizer)

    def close(self) -> None:
        """Let go of DeepSpeed's engine."""
        self._engine.destroy()


class StepGuard:
    """Clipping, norm and the non-finite check for ZeRO stage 0, where DeepSpeed steps AdamW directly and does none.

    It runs as AdamW's pre-hook: by then the gradients are summed over processes, hence equal on all of them, and so is
    the decision. A gradient that is not finite is dropped; AdamW passes over parameters without one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
        self.applied, self.grad_norm = True, 0.0
        self._max_norm = config.grad_clip or math.inf
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, *_: Any) -> None:
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm))
        self.applied = math.isfinite(norm)
        self.grad_norm = norm if self.applied else math.inf
        if not self.applied:
            for parameter in self._parameters:
                parameter.grad = None
