"""What a run works on: its configuration, its plan and its data, as the checks have found them."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.batches.mixture import TrainingData
from data_pipeline.batches.order import Plan
from data_pipeline.shards.shardset import ShardSet
from pretrain.config import RunConfig


@dataclass(frozen=True)
class Inputs:
    """A configuration with nothing left open but the precision, and the data it names, opened."""

    config: RunConfig  # model.vocab_size is set; precision may be auto until all processes have met
    plan: Plan
    train: TrainingData
    fingerprint: str  # of the training data
    valid: ShardSet | None
