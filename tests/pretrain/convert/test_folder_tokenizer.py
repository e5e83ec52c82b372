"""The tokenizer of a folder for transformers: what begins a text, and the way back to the tokenizer of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer
from pretrain.convert.own import token_ids
from pretrain.convert.tokenizer import CONFIG, restored, tokenizer_files


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the king of the sea and the old man"] * 3, 290)


def test_a_causal_text_begins_with_the_end_of_another(tokenizer: Tokenizer) -> None:
    """lm-eval puts bos_token before a text: of a token that no training text has, the model knows nothing."""
    assert tokenizer.bos_id != tokenizer.eos_id
    files, _ = tokenizer_files(tokenizer, causal=True, max_length=64)
    assert json.loads(files[CONFIG])["bos_token"] == json.loads(files[CONFIG])["eos_token"] == "</s>"
    assert token_ids(tokenizer, causal=True)["bos_token_id"] == tokenizer.eos_id
    files, _ = tokenizer_files(tokenizer, causal=False, max_length=64)
    assert json.loads(files[CONFIG])["bos_token"] == "<s>"
    assert token_ids(tokenizer, causal=False)["bos_token_id"] == tokenizer.bos_id


@pytest.mark.parametrize("causal", [True, False])
def test_the_tokenizer_of_the_run_comes_back(tokenizer: Tokenizer, causal: bool, tmp_path: Path) -> None:
    files, changes = tokenizer_files(tokenizer, causal=causal, max_length=64)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert Tokenizer.load(tmp_path).hash != tokenizer.hash  # the mask's space, and with causal models bos_token
    for name, data in restored(files, json.loads(json.dumps(changes))).items():
        (tmp_path / name).write_bytes(data)
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash == changes["hash"]
