"""What an evaluation looks at: loaded weights, a device, held-out shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.results.schema import ModelInfo
from pretrain.curriculum.stages import trained_length
from pretrain.precision import fast_precision

if TYPE_CHECKING:
    from pretrain.checkpoint.load import LoadedModel

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
            attention=config.attention_label,
            parameters=self.model.num_parameters(),
            tokens=self.loaded.tokens,
            config_hash=hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
            tokenizer_hash=self.loaded.tokenizer.hash,
            device=self.device.type,
        )

    def held_out(self) -> ShardSet:
        """The shards; raises :class:`UserError` where the run has none."""
        if self.shards is None:
            named = self.loaded.run_config.data.valid
            what = f"held-out shards {named} (data.valid of the run) are not there"
            raise UserError(
                (what if named else f"run {self.loaded.run_config.name} names no held-out shards (data.valid)")
                + ": say where some are with --data SHARDS (in Python: data=)"
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


def load_subject(checkpoint: str | Path, data: str | Path | None = None, device: str = "auto") -> Subject:
    """Load a run, one of its checkpoints or an export, with the held-out shards ``data`` (default: its data.valid).

    Shards that the run names but are not there leave the subject without any. Raises :class:`UserError` for a
    checkpoint that is not whole, shards of another tokenizer, or a device that cannot be used.
    """
    from pretrain.checkpoint.load import load_model

    if not Path(checkpoint).exists():
        raise UserError(f"checkpoint {checkpoint} does not exist")
    chosen = choose_device(device)
    loaded = load_model(checkpoint)
    loaded.model.to(chosen).eval()
    path = data or loaded.run_config.data.valid
    shards = None
    if path and (data or Path(path).exists()):
        shards = ShardSet.open(path, expect_tokenizer=loaded.tokenizer.hash)
    return Subject(loaded, shards, chosen)


def choose_device(name: str = "auto") -> torch.device:
    """auto: a GPU where there is one; raises :class:`UserError` for a device that cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """auto: "bf16" where the device is fast at it, else "fp32"."""
    return fast_precision(device) if name == "auto" else name


def batches(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` over ``total`` items."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
