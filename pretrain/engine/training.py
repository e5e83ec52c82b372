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
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from data_pipeline.configuration import faults
from data_pipeline.errors import UserError
from pretrain.config import OptimizerConfig, RunConfig
from pretrain.curriculum.stages import stage_model
from pretrain.distributed import randomness
from pretrain.distributed.world import World
from pretrain.engine.deepspeed_config import build_deepspeed_config, check_device
from pretrain.engine.layers import layer_runner
from pretrain.engine.positions import extend_positions
from pretrain.engine.repairs import (
    forget_gradients,
    grow_scale,
    keep_scale_until_applied,
    zero_optimizer_at_stage_1,
)
from pretrain.engine.state.fragments import MASTER, full_shape, places, set_full, sync_model_weights
from pretrain.engine.state.reshard import group_names, restore, zero_layout
from pretrain.engine.state.saved import GROUPS, SavedStates
from pretrain.engine.state.writing import Writes
from pretrain.heap import return_freed_blocks
from pretrain.model.attention.layout import Layout
from pretrain.optim.kind import CutByZero, Piece
from pretrain.optim.optimizer import apply_hyperparameters, build_optimizer, most_values_kept, set_learning_rate

if TYPE_CHECKING:
    from pretrain.model.config import ModelConfig
    from pretrain.model.transformer import LMOutput, NystromformerLM


class StepResult(NamedTuple):
    """What became of an optimizer step: skipped on all processes alike if the gradient was not finite."""

    applied: bool
    grad_norm: float  # before clipping; inf for a step that was skipped
    loss_scale: float


def import_deepspeed(verbose: bool = False, timeout: timedelta | None = None) -> Any:
    """Import DeepSpeed without its start-up notes, its compiled operators and their leftovers.

    ``deepspeed_shm_comm`` would be compiled for minutes at a first start and leaves 69 MB a process in /dev/shm for
    ever; gloo takes its place. It must be off before DeepSpeed's communication is initialised. ``timeout`` is that of
    ZeRO's process groups, to which DeepSpeed passes none, whatever ``init_distributed`` was given.
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
    if timeout is not None:
        from deepspeed.comm.torch import TorchBackend

        TorchBackend.new_group = lambda self, ranks: torch.distributed.new_group(ranks, timeout=timeout)
    return deepspeed


class TrainingEngine:
    """A model, its optimizer and DeepSpeed's engine around both."""

    def __init__(self, config: RunConfig, world: World, verbose: bool = False) -> None:
        """Build everything from a configuration whose ``model.vocab_size`` is set.

        The weights depend on the seed only; afterwards each process draws (for dropout) from a stream of its own.
        """
        from pydantic import ValidationError

        from pretrain.model.transformer import build_model

        on_gpu = world.device.type == "cuda"
        check_device(config, world.device.type, not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False))
        if config.activation_checkpointing and not on_gpu:
            return_freed_blocks()  # memory for time once more: without it a CPU would give back little of what is saved
        deepspeed = import_deepspeed(verbose, world.timeout)
        from deepspeed.runtime.config import DeepSpeedConfigError

        self.config, self.world = config, world
        self.zero_stage = config.zero_stage
        self.deepspeed_config = build_deepspeed_config(config, pin_memory=on_gpu)
        randomness.seed_everything(config.seed)
        self.model: NystromformerLM = build_model(stage_model(config, 0))
        self.model.run_layer = layer_runner(config.activation_checkpointing, config.compile)
        self.model.z_loss, self.model.document_loss = config.z_loss > 0, config.document_loss > 0
        self._added_sums: dict[str, torch.Tensor] = {}
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        optimizer = build_optimizer(self.model, config.optimizer)
        self._guard = StepGuard(optimizer, config.optimizer) if self.zero_stage == 0 else None
        try:
            with zero_optimizer_at_stage_1():
                self._engine, _, _, _ = deepspeed.initialize(
                    model=self.model, optimizer=optimizer, config=copy.deepcopy(self.deepspeed_config)
                )
        except (DeepSpeedConfigError, ValidationError) as error:
            text = "; ".join(faults(error, None)) if isinstance(error, ValidationError) else str(error)
            raise UserError(f"DeepSpeed refuses what the block deepspeed: passes to it: {text}") from None
        if config.precision == "fp16":
            keep_scale_until_applied(self._engine.optimizer)
        if isinstance(optimizer, CutByZero) and self.zero_stage:
            pieces = [
                (place.owner, Piece(tuple(full_shape(parameter)), place.start, place.numel, place.offset))
                for parameter, place in places(self._engine).items()
            ]
            optimizer.cut(pieces, self._engine.optimizer.dp_process_group, world.device)
        randomness.seed_everything(config.seed + 1 + world.rank)

    def backward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, scale: float, document_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its cross entropy's sum, detached, float32 scalar on the
        device.

        ``input_ids`` and ``labels`` are (B, L) int64 on the device. ``document_ids`` (B, L) integers on the CPU tell
        the documents of packed rows apart, -1 at padding; without them each row is one sequence. The gradient added is
        that of ``scale`` times the loss and what the run adds to it, ``z_loss`` and ``document_loss`` times their sums.
        :meth:`take_added_sums` returns these, and the loss is without them.
        """
        layout = None if document_ids is None else Layout.from_documents(document_ids)
        out = self._engine(input_ids, labels=labels, layout=layout)
        total = loss_sum = out.loss_sum
        for name, weight, added in (
            ("z_loss", self.config.z_loss, out.z_sum),
            ("document_loss", self.config.document_loss, out.document_sum),
        ):
            if added is not None:
                total = total + weight * added
                self._added_sums[name] = self._added_sums.get(name, 0.0) + added.detach().double()
        # DeepSpeed averages gradients over processes; the product with their number makes that the sum we want. A loss
        # that is not finite may have finite gradients (a target of probability 0 under fp16). The factor NaN makes
        # certain that ZeRO's own check of the reduced gradient sees it, the only check that all processes share for
        # free.
        factor = torch.where(torch.isfinite(total.detach()), scale * self.world.world_size, math.nan)
        self._engine.backward(total * factor, scale_wrt_gas=False)
        return loss_sum.detach()

    def take_added_sums(self) -> dict[str, torch.Tensor]:
        """By the run's key, the sums over this process's targets of what is added to the loss, without its weight,
        since the last call: float64 scalars on the device."""
        sums, self._added_sums = self._added_sums, {}
        return sums

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

    def on_forward(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Call ``before`` and ``after`` around every forward pass of training, not of evaluation."""
        # On DeepSpeed's engine and not on the model, where torch.compile would trace them.
        self._engine.register_forward_pre_hook(lambda module, _: before() if module.training else None)
        self._engine.register_forward_hook(lambda module, *_: after() if module.training else None)

    @torch.no_grad()
    def evaluate(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **options: Any) -> LMOutput:
        """Forward without gradients, in evaluation mode; under ZeRO-3 all processes must call it alike."""
        self._engine.eval()
        try:
            return self._engine(input_ids, labels=labels, **options)
        finally:
            self._engine.train()

    def enter_stage(self, model: ModelConfig, extend_from: int | None = None) -> None:
        """Let the model compute what it does in a stage (:func:`pretrain.curriculum.stages.stage_model`).

        ``extend_from``: also copy learned positions, of which so many are trained, to all that the stage trains: where
        the stage begins, and nowhere else. All processes must call it alike.
        """
        self.model.set_positions(model)
        if extend_from is not None:
            extend_positions(self._engine, self.model, extend_from)

    def set_weights(self, value_of: Callable[[str], torch.Tensor | None]) -> None:
        """Put float32 weights into a fresh engine, into the master weights themselves, to the bit.

        ``value_of`` a parameter's name: its whole value, or None to leave it. All processes must call it alike. Not
        into the model before the engine is built: DeepSpeed makes the masters from weights in bf16 or fp16.
        """
        for name, parameter in self.model.named_parameters():
            value = value_of(name)
            if value is not None:
                set_full(self._engine, parameter, MASTER, value)
        sync_model_weights(self._engine)

    def train(self) -> None:
        """Put the model into training mode."""
        self._engine.train()

    @property
    def state_device(self) -> torch.device:
        """Where the optimizer's state is kept."""
        return torch.device("cpu") if self.config.offload_optimizer else self.world.device

    def missing_state_bytes(self) -> int:
        """Bytes of the optimizer's float32 state that this process has still to make, in its first step."""
        zero = self._engine.optimizer
        partitions = {0: "", 1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
        name = partitions.get(self.zero_stage, "fp32_partitioned_groups_flat")
        weights = list(self.model.parameters()) if not name else getattr(zero, name)
        return 4 * most_values_kept(self.config.optimizer) * sum(w.numel() for w in weights if not zero.state.get(w))

    def save(self, folder: Path, tag: str) -> None:
        """Write DeepSpeed's files below ``folder/tag``, durable. No pointer, no commit: those are the store's.

        Raises ``OSError`` if this process could not write, and only after the collectives inside, so that no other
        waits for it.
        """
        writes = Writes()
        with writes.replace(self._engine):
            state = {GROUPS: group_names(self._engine)}
            self._engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
        writes.check()

    def checkpoint_bytes(self) -> float:
        """About what this process's share of a checkpoint takes: weights, master weights, optimizer state.

        Of one process, or at stages 1 and 2 the weights of the first, beside each one's part of the rest.
        """
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())  # 0 where ZeRO-3 parted them
        state = sum(
            value.numel() * value.element_size()
            for values in self._engine.basic_optimizer.state.values()
            for value in values.values()
            if torch.is_tensor(value)
        )
        if self.zero_stage == 0:
            return float(weights + state if self.world.is_first else 0)
        master = 4 * self.num_parameters / self.world.world_size
        return (weights if self.world.is_first else 0) + master + state

    def load(self, folder: Path, tag: str) -> bool:
        """Read DeepSpeed's files of ``folder/tag`` into a fresh engine; the configuration's hyper-parameters stay.

        Whatever processes and ZeRO stage wrote them; returns whether those were others, so that the states were cut
        anew. Where nothing has changed DeepSpeed's own load does it, to the bit.
        """
        saved = SavedStates(folder / tag)
        anew = saved.layout != zero_layout(self._engine)
        if anew:
            restore(self._engine, saved)
        elif self._engine.load_checkpoint(str(folder), tag=tag)[0] is None:
            raise UserError(f"DeepSpeed could not read the checkpoint {folder / tag}")
        apply_hyperparameters(self._engine.optimizer, self.config.optimizer)
        return anew

    def close(self) -> None:
        """Let go of DeepSpeed's engine."""
        self._engine.destroy()


class StepGuard:
    """Clipping, norm and the non-finite check for ZeRO stage 0, where DeepSpeed steps the optimizer and does none.

    It runs as the optimizer's pre-hook: by then the gradients are summed over processes, hence equal on all of them,
    and so is the decision. A gradient that is not finite is dropped; optimizers pass over parameters without one.

    The norm is taken in float64, as DeepSpeed does at stages 1 to 3. PyTorch's float32 norm on a CPU adds in long runs:
    of 3.1M random values it is 6e-5 too small, of 24.6M (the embeddings of a base model) 1.4e-3.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
        self.applied, self.grad_norm = True, 0.0
        self._max_norm = config.grad_clip or math.inf
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, *_: Any) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        total = torch.linalg.vector_norm(torch.stack(norms)).float() if norms else torch.zeros(())
        torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_norm, total)
        norm = float(total)
        self.applied = math.isfinite(norm)
        self.grad_norm = norm if self.applied else math.inf
        if not self.applied:
            for parameter in self._parameters:
                parameter.grad = None
