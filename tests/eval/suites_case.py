"""What the tests of the suites share beside the fixtures of conftest.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from data_pipeline.shards.shardset import ShardSet
from eval.subject import Subject
from pretrain.checkpoint.load import load_model

WORDS = ["river", "stone", "cloud", "münster", "lamp", "orange", "quiet", "seven", "window", "paper", "ghost", "violin"]


def subject_of(path: Path, shards: ShardSet | None) -> Subject:
    return Subject(load_model(path), shards)


def no_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)
