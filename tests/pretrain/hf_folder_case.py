"""Tiny models and the folders that transformers loads, for the tests of conversion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_case import settings

from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer
from pretrain.checkpoint.load import LoadedModel, unique_weights, weights_hash
from pretrain.config import parse_config
from pretrain.convert.folder import write_folder
from pretrain.convert.own import write_own
from pretrain.curriculum.stages import model_at
from pretrain.model import build_model

TOKENS = 4096
_CACHES: list[str] = []
TEXT = ["the king of the sea and the old man", "it was a dark night, and the sea was still", "a man and a king"]


def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXT * 3, 300)


def loaded_model(seed: int = 0, **model: Any) -> LoadedModel:
    """A model of two layers with every weight random, gates and biases too."""
    torch.manual_seed(seed)
    tiny = tokenizer()
    network = {"vocab_size": tiny.vocab_size, "init_std": 0.3, **model}
    run = parse_config(settings(Path("corpus"), Path("runs"), model=network), where="test")
    config = model_at(run, TOKENS)
    net = build_model(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    digest = weights_hash(unique_weights(net))
    return LoadedModel(net, config, run, tiny, digest, TOKENS, Path("run"), None)


def export(loaded: LoadedModel, folder: Path, **options: Any) -> Path:
    """The folder that ``nystrom convert to-hf`` writes of it."""
    write_folder(folder, lambda out: write_own(loaded, out, **options), overwrite=False)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache_of_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies the code of a folder into a cache, and imports it from there: not the one of the user.

    Each module of tests that imports this has a fixture of its own. They share one cache: Python finds the package of
    all folders' code in the first.
    """
    found = pytest.importorskip("transformers").dynamic_module_utils
    with pytest.MonkeyPatch.context() as patch:
        if not _CACHES:
            _CACHES.append(str(tmp_path_factory.mktemp("modules")))
        patch.setattr(found, "HF_MODULES_CACHE", _CACHES[0])
        yield
