"""Tiny folders of ``nystrom convert to-hf``, and a place for the modules that transformers copies out of them."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from training_case import settings

from data_pipeline.tokenization.training import train_tokenizer
from pretrain.checkpoint.load import LoadedModel, unique_weights, weights_hash
from pretrain.config import parse_config
from pretrain.convert.own import write_own
from pretrain.model.transformer import build_model

if TYPE_CHECKING:
    from data_pipeline.tokenization.tokenizer import Tokenizer

TOPICS = {
    "sea": ["ship", "wave", "sail", "harbour", "tide", "anchor"],
    "farm": ["cow", "hay", "barn", "field", "plough", "seed"],
}
FILLERS = ["the", "old", "a", "under", "small", "and", "near", "his", "grey", "over"]


def sentences(count: int, *, seed: int = 0, words: tuple[int, int] = (4, 18)) -> list[tuple[str, int]]:
    """Texts of unequal lengths with the number of their topic: one word in three is of it."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        topic = draw.randrange(len(TOPICS))
        own = list(TOPICS.values())[topic]
        length = draw.randint(*words)
        text = " ".join(draw.choice(own if draw.random() < 0.33 or i == 0 else FILLERS) for i in range(length))
        found.append((text, topic))
    return found


def tiny_model(objective: str, *, seed: int = 5, **model: Any) -> LoadedModel:
    """A model that nobody trained, with a tokenizer of its own; 16 wide, 2 layers. Keyword: keys of ``model``."""
    changes = {"objective": objective, **model}
    corpus = {"train": "none"}
    config = parse_config({**settings(Path("none"), Path("none"), model=changes), "data": corpus}, where="test")
    tokenizer: Tokenizer = train_tokenizer([text for text, _ in sentences(200)], 300)
    network = config.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
    torch.manual_seed(seed)
    built = build_model(network).float().eval()
    digest = weights_hash(unique_weights(built))
    return LoadedModel(built, network, config, tokenizer, digest, 2048, Path("none"), None)


def write_tiny(folder: Path, objective: str, *, dtype: str = "fp32", **model: Any) -> Path:
    """``nystrom convert to-hf`` of :func:`tiny_model` into ``folder``, which it makes."""
    folder.mkdir(parents=True)
    write_own(tiny_model(objective, **model), folder, dtype=dtype)
    return folder


@contextmanager
def modules_in(folder: Path) -> Iterator[None]:
    """transformers copies the code of a folder below ``folder``, and not into the user's cache.

    It reads HF_MODULES_CACHE and HF_HOME when it is imported, which another test may have done before. So its constant
    is replaced for the time; the modules loaded meanwhile are forgotten.
    """
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.setattr(sys, "path", list(sys.path))
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
                del sys.modules[name]
