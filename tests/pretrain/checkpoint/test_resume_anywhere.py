"""Stopped after every single step and started again, a run is the uninterrupted one to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks, values
from test_run import resumable, train, train_until
from training_case import metrics, numbers, weights_hash, write_config

STAGES = [
    {"until_tokens": 1024, "seq_len": 32, "micro_batch": 3},
    {"until_tokens": 2048, "seq_len": 64, "micro_batch": 2},
    {"until_tokens": 4096, "seq_len": 128, "micro_batch": 1},
]
STEPS = 16


@pytest.mark.parametrize(
    ("objective", "zero_stage", "precision", "packing", "every"),
    [
        ("mlm", 0, "fp32", "stream", 3),
        pytest.param("mlm", 2, "bf16", "documents", 1, marks=pytest.mark.slow),
        pytest.param("clm", 3, "bf16", "stream", 2, marks=pytest.mark.slow),
        pytest.param("clm", 1, "fp32", "documents", 2, marks=pytest.mark.slow),
    ],
)
def test_stopped_at_every_step(
    corpus: Path, tmp_path: Path, objective: str, zero_stage: int, precision: str, packing: str, every: int
) -> None:
    """Across both edges of the curriculum and the edges of an epoch: the small shards hold less than the run."""
    common = {
        "model": {"dropout": 0.2, "objective": objective},
        "zero_stage": zero_stage,
        "precision": precision,
        "data": {
            "train": str(corpus / "valid"),
            "valid": str(corpus / "valid"),
            "packing": packing,
            "max_padding": 0.1,
        },
        "curriculum": STAGES,
    }
    whole = write_config(tmp_path / "whole.yaml", resumable(corpus, tmp_path, name="whole", **common))
    parts = write_config(tmp_path / "parts.yaml", resumable(corpus, tmp_path, name="parts", **common))
    assert values(run_ranks(train, 2, config=whole)) == [0, 0]
    epochs = [row["epoch"] for row in metrics(tmp_path / "whole")]
    assert epochs[0] < 1 < epochs[-1]  # there is an edge between epochs
    stops = list(range(every, STEPS, every))
    for _ in stops:
        assert values(run_ranks(train_until, 2, config=parts, step=every, how="step")) == [75, 75]
    assert values(run_ranks(train, 2, config=parts)) == [0, 0]
    resumes = [row["step"] for row in metrics(tmp_path / "parts", "event") if row["event"] == "resume"]
    assert resumes == stops
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert weights_hash(tmp_path / "parts") == weights_hash(tmp_path / "whole")
