"""What an evaluation looks at: loaded weights, a device, held-out shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.results import ModelInfo
from pretrain.curriculum.stages import trained_length

if TYPE_CHECKING:
    from pretrain.checkpoint.store import LoadedModel

# Float32 logits held at once: 2^25 values are 128 MiB. Rows per forward pass follow from it.
LOGIT_BUDGET = 2**25
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Subject:
    """The loaded model on its device, and the held-out shards where there are some."""

    loaded: LoadedModel
    shards: ShardSet | None = None
    device: torch.device = CPU

    @property
    def model(self) -> Any:
        """The network, in evaluation mode."""
        return self.loaded.model

    @property
    def causal(self) -> bool:
        """Whether it predicts the next token (else masked ones)."""
        return self.loaded.model_config.objective == "clm"

    @property
    def trained_length(self) -> int:
        """The longest sequence length of the stages that the weights have been in, in tokens."""
        return trained_length(self.loaded.run_config, self.loaded.tokens)

    def info(self) -> ModelInfo:
        """What the results say about the model."""
        config = self.loaded.model_config
        return ModelInfo(
            weights_hash=self.loaded.weights_hash,
            run=self.loaded.run_config.name,
            objective=config.objective,
            attention=config.attention,
            parameters=self.model.num_parameters(),
            tokens=self.loaded.tokens,
        )

    def held_out(self) -> ShardSet:
        """The shards; raises :class:`UserError` where the run has none."""
        if self.shards is None:
            raise UserError(
                f"run {self.loaded.run_config.name} names no held-out shards (data.valid): give some with --data SHARDS"
            )
        return self.shards

    def check_length(self, length: int, option: str) -> int:
        """``length`` if the model can read that many tokens, else :class:`UserError`."""
        config = self.loaded.model_config
        if length < 2:
            raise UserError(f"{option} {length} is too short: at least 2 tokens")
        if config.positions == "learned" and length > config.max_positions:
            raise UserError(
                f"{option} {length} is longer than the {config.max_positions} learned positions of the model "
                f"(model.max_positions): use at most {config.max_positions}"
            )
        return length

    def rows(self, length: int) -> int:
        """Rows of ``length`` tokens whose float32 logits fit the budget."""
        return max(1, LOGIT_BUDGET // (length * (self.loaded.model_config.vocab_size or 1)))

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, layout: Any = None) -> Tensor:
        """Logits (B, N, V) in float32 of ``input_ids`` (B, N)."""
        return self.model(input_ids.to(self.device), layout=layout).logits.float()

    @torch.inference_mode()
    def target_logits(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Logits (T, V) in float32 where ``targets`` (B, N) bool is set: the head runs on those positions only."""
        hidden = self.model(input_ids.to(self.device), hidden=True).hidden
        return self.model.head(hidden[targets.to(self.device)]).float()


def batches(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` over ``total`` items."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
