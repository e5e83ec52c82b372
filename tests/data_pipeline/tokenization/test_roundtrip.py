"""What a tokenizer loses of the text to be prepared is said before the work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from data_pipeline.cli import main
from data_pipeline.tokenization.roundtrip import loss
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer

PLAIN = ["the quick brown fox jumps over it, hello world"] * 20
TEXTS = ["hello 日本 world €", " the fox\n\nover it ", "Élan"]


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """A BPE without bytes and without a token for the unknown, as a SentencePiece model converted badly."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator(PLAIN, trainer)
    return Tokenizer(backend)


def test_lost_characters_are_counted_and_shown(metaspace: Tokenizer) -> None:
    found = loss(metaspace, TEXTS)
    assert found is not None
    assert found.lost == {"\n": 2, "日": 1, "本": 1, "€": 1, " ": 1, "É": 1, "a": 1}
    assert found.characters == sum(map(len, TEXTS))
    assert (found.before, found.after) == ("hello 日本 world €", "hello  world ")
    assert f"of a sample of {found.characters} characters 8 (" in str(found)
    assert "are lost ('\\n' 2, '日' 1, '本' 1, '€' 1, ' ' 1, and 2 others) and 0 are new" in str(found)


def test_changed_case_is_a_loss_and_lossless_models_have_none() -> None:
    for model in ("bpe", "unigram"):
        assert loss(train_tokenizer(PLAIN, 400, model), TEXTS) is None
    lower = loss(train_tokenizer(PLAIN, 150, "wordpiece", lowercase=True), ["the Fox  jumps", "the fox"])
    assert lower is not None
    assert (lower.lost, lower.added) == ({"F": 1, " ": 1}, 1)
    assert (lower.before, lower.after) == ("the Fox  jumps", "the fox jumps")
    assert loss(train_tokenizer(PLAIN, 400, "unigram"), ["a▁b"]).lost == {"▁": 1}  # type: ignore[union-attr]


def test_prepare_says_what_is_lost(
    metaspace: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_tokenizer: Tokenizer
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for tokenizer, name in ((metaspace, "lossy"), (small_tokenizer, "whole")):
        tokenizer.save(tmp_path / name)
        words = ["prepare", "--input", text, "--tokenizer", tmp_path / name, "--out", tmp_path / f"{name} shards"]
        main([*map(str, words), "--backend", "tokenizers", "--workers", "1"])
        said = capsys.readouterr().err
        assert ("8 (21.05%) are lost" in said, "'hello  world '" in said) == (name == "lossy", name == "lossy")
