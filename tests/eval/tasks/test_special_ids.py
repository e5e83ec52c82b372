"""Vocabularies whose special tokens are not the first ids, or lack a mask."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.tokenization.training import train_tokenizer
from eval.tasks.validity.probe import different, ordinary_ids, random_ids
from pretrain.checkpoint.load import _loaded


def subject(vocab_size: int | None, special_ids: tuple[int, ...]) -> Any:
    tokenizer = SimpleNamespace(special_ids=special_ids)
    return SimpleNamespace(
        loaded=SimpleNamespace(model_config=SimpleNamespace(vocab_size=vocab_size), tokenizer=tokenizer)
    )


def test_special_tokens_may_lie_anywhere() -> None:
    some = subject(12, (3, 7, 11))
    assert ordinary_ids(some).tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    drawn = random_ids(some, 500, seed=1)
    assert set(drawn.tolist()) == set(ordinary_ids(some).tolist())
    tokens = torch.arange(12).repeat(100)
    others = different(tokens, some, seed=2)
    assert set(others.tolist()) == set(ordinary_ids(some).tolist())
    assert (others != tokens).all()


def test_vocabulary_withoutordinary_ids_tokens() -> None:
    for vocab_size in (None, 4):
        with pytest.raises(UserError, match="has no two ordinary tokens"):
            ordinary_ids(subject(vocab_size, (0, 1, 3)))
    assert ordinary_ids(subject(4, (0, 3, 9))).tolist() == [1, 2]  # 9: beyond the model's vocabulary


def test_a_masked_model_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    train_tokenizer(["the fox"], 300).save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"<mask>"', "null"))
    run: Any = SimpleNamespace(model=SimpleNamespace(objective="mlm"))
    with pytest.raises(UserError, match="masked language modelling needs a mask token"):
        _loaded({}, run, tmp_path, 0, tmp_path, None)
