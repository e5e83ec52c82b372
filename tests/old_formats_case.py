"""What is looked at in artifacts of an earlier version: by the test, and by the script that made them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from data_pipeline.batches.loader import TrainLoader
from data_pipeline.batches.masking import Masking
from data_pipeline.batches.mixture import TrainingData
from data_pipeline.batches.order import Plan, StageSpec
from data_pipeline.shards.shardset import ShardSet


def first_batch_hash(shards: Path) -> str:
    """SHA-256 of ids and labels of the first batch, causal and masked: an order of its own kind changes it."""
    plan = Plan([StageSpec(64, 1024)], block_length=64, batch_tokens=512)
    data = TrainingData.stream(ShardSet.open(shards), plan.block_length)
    digest = hashlib.sha256()
    for objective in ("clm", "mlm"):
        batch = next(iter(TrainLoader(data, plan, objective=objective, seed=5, masking=Masking())))  # type: ignore[arg-type]
        for tensor in (batch.input_ids, batch.labels):
            digest.update(tensor.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def logits_of(run: Path) -> list[list[float]]:
    """Of a row of 48 ids, the logits of the first 20 entries of the vocabulary at every eighth position."""
    import torch

    from pretrain.checkpoint.load import load_model

    with torch.no_grad():
        logits = load_model(run).model(torch.arange(5, 53)[None]).logits
    return logits[0, ::8, :20].tolist()


def losses(run: Path) -> list[float]:
    """The loss of every step that the run has logged."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def resume(config: str, folder: str) -> int:
    """Runs in the ranks: the command itself, in ``folder``, to which the paths of the configuration are relative.

    The kept runs are finished, so that training them further has to be asked for.
    """
    from data_pipeline.errors import run_cli
    from pretrain.cli import main

    os.chdir(folder)
    return run_cli(main, "nystrom train", ["--config", config, "--resume", "extend"])
