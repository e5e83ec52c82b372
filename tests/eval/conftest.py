"""A tiny corpus and tiny models for the suites, made once for each test module."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from suites_case import WORDS

from data_pipeline.prepare.plan import plan_preparation
from data_pipeline.prepare.run import prepare
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.training import train_tokenizer
from pretrain.checkpoint.load import unique_weights, weights_hash
from pretrain.config import RunConfig
from pretrain.model import ModelConfig, build_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, size=int(n))) + ".\n" for n in rng.integers(30, 120, size=30)]


@pytest.fixture(scope="module")
def shards(root: Path, texts: list[str]) -> ShardSet:
    source = root / "held-out.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    tokenizer = train_tokenizer(texts, 300)
    return prepare(plan_preparation([str(source)], tokenizer), root / "shards").shards


@pytest.fixture(scope="module")
def export(root: Path, shards: ShardSet) -> Callable[..., Path]:
    """Writes an export folder of a freshly initialised model."""

    def write(name: str, packing: str = "stream", **model: Any) -> Path:
        torch.manual_seed(0)
        settings = {
            "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_landmarks": 8, "segment_length": 8,
            "conv_kernel": 5, "init_std": 0.3,
        }  # fmt: skip
        config = ModelConfig(vocab_size=shards.vocab_size, **(settings | model))
        run = RunConfig.model_validate(
            {
                "name": name,
                "model": config.model_dump(),
                "data": {"train": str(shards.path), "valid": str(shards.path), "packing": packing},
                "curriculum": [{"until_tokens": 1024, "seq_len": 64, "micro_batch": 2}],
                "batch_tokens": 128,
            }
        )
        folder = root / name
        folder.mkdir()
        weights = unique_weights(build_model(config))
        save_file(weights, folder / "model.safetensors")
        (folder / "config.yaml").write_text(run.to_yaml())
        shards.tokenizer().save(folder)
        info = {"weights_hash": weights_hash(weights), "tokens": 1024, "step": 8}
        (folder / "export.json").write_text(json.dumps(info))
        return folder

    return write


@pytest.fixture(scope="module")
def causal(export: Callable[..., Path]) -> Path:
    return export("causal", objective="clm")


@pytest.fixture(scope="module")
def masked(export: Callable[..., Path]) -> Path:
    return export("masked", objective="mlm")


@pytest.fixture(scope="module")
def labelled(root: Path) -> tuple[Path, Path]:
    """Texts whose label is which of two words they hold, among much else."""
    rng = np.random.default_rng(1)
    paths = (root / "train.jsonl", root / "test.jsonl")
    for path, count in zip(paths, (90, 40), strict=True):
        with path.open("w", encoding="utf-8") as file:
            for _ in range(count):
                label = int(rng.random() < 0.4)
                words = [*rng.choice(WORDS[2:], size=int(rng.integers(3, 25))), *[WORDS[label]] * 3]
                file.write(json.dumps({"text": " ".join(rng.permutation(words)), "label": label}) + "\n")
    return paths
