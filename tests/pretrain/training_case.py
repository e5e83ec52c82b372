"""A corpus and a run small enough to be trained in a second, and ways to look at what became of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

STAGES = [
    {"until_tokens": 1024, "seq_len": 32, "micro_batch": 3},
    {"until_tokens": 2048, "seq_len": 64, "micro_batch": 2},
]
"""Batches of 256 tokens: 4 steps of 8 rows, then 4 of 4. Micro-batches are uneven on purpose."""

EPS = 1e-3
"""AdamW's epsilon in the tests: a seventh of a usual gradient here. With the default of 1e-8 the rounding error of a
gradient that is zero but for it, as a key bias's is (softmax does not see it), becomes a step of the learning rate, and
where on which CPU is chance: weights of two orders of summation differed by up to 4e-5 after 20 steps, and differ by
4e-7 now. Besides, the steps depend on the size of the gradients, so that a wrong scale shows."""


def write_corpus(folder: Path) -> None:
    """Shards ``train`` and ``valid`` below ``folder``: a few hundred documents of made-up words."""
    import random

    from data_pipeline.prepare.plan import plan_preparation
    from data_pipeline.prepare.run import prepare
    from data_pipeline.tokenization.training import train_tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(60)]
    documents = [" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(150)]
    tokenizer = train_tokenizer(documents, 300)
    for name, part in (("train", documents[:120]), ("valid", documents[120:])):
        text = folder / f"{name}.jsonl"
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in part))
        prepare(plan_preparation([text], tokenizer), folder / name)


def settings(corpus: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """A run's configuration as a dictionary; ``changes`` replace top-level keys, or are merged into blocks."""
    base: dict[str, Any] = {
        "name": "run",
        "output_dir": str(runs),
        "seed": 3,
        "model": {
            "objective": "mlm",
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "num_landmarks": 8,
            "segment_length": 8,
            "conv_kernel": 5,
            "init_std": 0.2,
        },
        "data": {"train": str(corpus / "train")},
        "curriculum": STAGES,
        "batch_tokens": 256,
        "precision": "fp32",
        "zero_stage": 0,
        "optimizer": {"lr": 0.01, "grad_clip": 0.5, "eps": EPS},
        "schedule": {"kind": "wsd", "warmup_tokens": 512},
        "telemetry": {"wandb": "disabled", "log_every_steps": 1},
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    if base["zero_stage"] == 3:  # below the default threshold nothing of so small a model would be partitioned
        base["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return base


def write_config(path: Path, config: dict[str, Any]) -> str:
    """Write the configuration as YAML; returns the path."""
    path.write_text(yaml.safe_dump(config))
    return str(path)


def metrics(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def numbers(run: Path) -> list[tuple[Any, ...]]:
    """Of every training and validation line, what must not depend on when the run was interrupted."""
    keys = ("kind", "step", "tokens", "loss", "lr", "grad_norm", "seq_len", "accuracy")
    return [tuple(row.get(key) for key in keys) for kind in ("train", "valid") for row in metrics(run, kind)]


def events(run: Path) -> list[str]:
    """Names of the run's events, in order."""
    return [row["event"] for row in metrics(run, "event")]


def weights_hash(run: Path) -> str:
    """The hash that the run's export was written with."""
    return json.loads((run / "export" / "export.json").read_text())["weights_hash"]
