"""Text: held-out loss of a language model on prepared shards, causal or masked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attention_ablation.forms import Objective
from benchmarks.attention_ablation.tasks import DistanceBins, Examples, Far, Ints, Shape
from data_pipeline.batches import IGNORE
from data_pipeline.batches.loader import Batch, TrainLoader, validation_batches
from data_pipeline.batches.masking import Masking
from data_pipeline.batches.mixture import TrainingData
from data_pipeline.batches.order import Plan, StageSpec
from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet

POSITION_BINS = 8
HELD_OUT_SEED = 0


def last_occurrence(inputs: Ints, labels: Ints) -> Ints:
    """(B, N): tokens from each target back to the last place before it in the row that has the same token; 0 for none.

    ``inputs`` and ``labels`` (B, N) of a causal model: ``labels[:, t]`` follows ``inputs[:, t]``.
    """
    found = np.zeros_like(inputs)
    for row, (tokens, last) in enumerate(zip(inputs, labels[:, -1], strict=True)):
        text = np.append(tokens, last)
        order = np.argsort(text, kind="stable")  # places of the same token stand together, in their order
        again = text[order[1:]] == text[order[:-1]]
        later, earlier = order[1:][again], order[:-1][again]
        found[row, later - 1] = later - earlier
    return found


@dataclass(frozen=True)
class Books:
    """Rows of ``nystrom data prepare``'s shards in the order and with the masking of pretraining.

    Causal: the loss is given for eighths of the row, as a form that loses what is far back shows it late in the row.
    It is given, too, by how many windows back the target's token last occurred in the row: recall can help where there
    is an earlier occurrence. Masked: one figure.
    """

    train: ShardSet
    valid: ShardSet
    objective: Objective
    shape: Shape
    tokens: int
    window: int
    """Tokens, the unit of distances."""
    name: str = "books"
    main: str = "loss"

    @classmethod
    def open(
        cls,
        train: str | Path | None,
        valid: str | Path | None,
        objective: Objective,
        shape: Shape,
        tokens: int,
        window: int,
    ) -> Books:
        """Raises :class:`UserError` for shards that are missing, damaged, too short or of two tokenizers."""
        if not train or not valid:
            raise UserError(
                "task books reads shards: --train SHARDS --valid SHARDS (`nystrom data prepare` makes them)"
            )
        if shape.batch_tokens % shape.seq_len:
            raise UserError(f"--batch-tokens {shape.batch_tokens} is not a multiple of --seq-len {shape.seq_len}")
        opened = ShardSet.open(train)
        task = cls(
            opened, ShardSet.open(valid, expect_tokenizer=opened.tokenizer_hash), objective, shape, tokens, window
        )
        task._loader(0)
        next(task.held_out())
        return task

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer."""
        return self.train.vocab_size

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "objective": self.objective,
            "train": self.train.fingerprint,
            "valid": self.valid.fingerprint,
            "held_out_tokens": self.shape.held_out_tokens,
        }

    @property
    def groupings(self) -> dict[str, tuple[str, ...]]:
        if self.objective == "mlm":
            return {}
        bins = self._bins()
        return {
            "position": tuple(
                f"{np.flatnonzero(bins == i).min()}-{np.flatnonzero(bins == i).max()}" for i in np.unique(bins)
            ),
            "windows since the last occurrence": (*self._since.labels, "never"),
        }

    @property
    def far(self) -> Far | None:
        if self.objective == "mlm":
            return None
        count = len(self.groupings["position"])
        return Far("last quarter", "position", tuple(range(count - max(1, count // 4), count)))

    @property
    def chance(self) -> dict[str, float]:
        """The loss of knowing only how frequent each held-out token is."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for batch in self.held_out():
            targets = batch.labels[batch.labels != IGNORE].numpy()
            counts += np.bincount(targets, minlength=len(counts))
        share = counts[counts > 0] / counts.sum()
        return {"unigram entropy": float(-(share * np.log(share)).sum())}

    def train_batches(self, seed: int) -> Iterator[Examples]:
        loader = self._loader(seed)
        try:
            for batch in loader:
                yield Examples(batch.input_ids, batch.labels)
        finally:
            loader.close()

    def measured(self, seed: int) -> Examples:
        return next(self.train_batches(seed))

    def held_out(self) -> Iterator[Examples]:
        batches = validation_batches(
            self.valid,
            objective=self.objective,
            seq_len=self.shape.seq_len,
            rows=self.shape.rows,
            max_tokens=self.shape.held_out_tokens,
            seed=HELD_OUT_SEED,
            masking=Masking(),
        )
        for batch in batches:
            yield Examples(batch.input_ids, batch.labels, self._groups(batch) if self.objective == "clm" else {})

    def _groups(self, batch: Batch) -> dict[str, Ints]:
        since = last_occurrence(batch.input_ids.numpy(), batch.labels.numpy())
        return {
            "position": np.broadcast_to(self._bins(), since.shape),
            "windows since the last occurrence": np.where(since > 0, self._since(since), len(self._since.labels)),
        }

    @property
    def _since(self) -> DistanceBins:
        return DistanceBins(self.window, self.shape.seq_len, factor=4)

    def _bins(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        length = self.shape.seq_len
        count = min(POSITION_BINS, length)
        return np.arange(length, dtype=np.int64) * count // length

    def _loader(self, seed: int) -> TrainLoader:
        length = self.shape.seq_len
        plan = Plan([StageSpec(length, self.tokens)], block_length=length, batch_tokens=self.shape.batch_tokens)
        data = TrainingData.stream(self.train, length)
        return TrainLoader(data, plan, objective=self.objective, seed=seed, masking=Masking())
