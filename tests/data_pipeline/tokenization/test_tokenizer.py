"""The byte-level BPE tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.tokenization.roles import SPECIAL_TOKENS
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "runs",
    "through",
    "the",
    "forest",
    "till",
    "the",
    "river",
]
DOCUMENTS = [" ".join(WORDS[i % 17 : i % 17 + 5] + WORDS[: i % 11]) + "\n" for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(DOCUMENTS, 320)


def test_special_tokens_have_their_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    vocabulary = json.loads(tokenizer.to_json())["model"]["vocab"]
    assert [vocabulary[token] for token in SPECIAL_TOKENS] == list(tokenizer.special_ids)
    assert tokenizer.vocab_size == 320 == len(vocabulary)


@pytest.mark.parametrize(
    "text",
    ["", " ", "the fox", "  two  spaces\n\n\ttab ", "é ß 漢字 😀 \u200d\x00\x7f", "<s> <pad></s><unk><mask> [MASK]"],
)
def test_any_text_comes_back_and_holds_no_special_token(tokenizer: Tokenizer, tmp_path: Path, text: str) -> None:
    tokenizer.save(tmp_path)
    for t in (tokenizer, Tokenizer.load(tmp_path)):
        ids = t.encode(text)
        assert t.decode(ids) == text
        assert not set(ids) & set(t.special_ids)  # a literal <mask> stays text
        assert t.encode_batch([text, "x", text]) == [ids, t.encode("x"), ids]


def test_all_bytes_are_in_the_alphabet(tokenizer: Tokenizer) -> None:
    text = "".join(chr(i) for i in range(0x2000))  # every lead byte below E2 and every continuation byte
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.unk_id not in tokenizer.encode(text)


def test_decoding_skips_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fox")
    assert tokenizer.decode([0, *ids, 4, 2, 1]) == "the fox"


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    again = train_tokenizer(iter(DOCUMENTS), 320)
    assert again.hash == tokenizer.hash
    assert train_tokenizer(DOCUMENTS, 300).hash != tokenizer.hash


def test_frequent_words_become_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" the")) == 1
    assert len(tokenizer.encode(" qzx")) == 4


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path / "new" / "folder")
    for given in (path, path.parent, str(path.parent)):
        loaded = Tokenizer.load(given)
        assert (loaded.hash, loaded.vocab_size) == (tokenizer.hash, tokenizer.vocab_size)
        assert loaded.encode("the quick fox") == tokenizer.encode("the quick fox")
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    assert Tokenizer.load(path).hash == tokenizer.hash  # the hash is of the contents, not of the spelling


def test_too_little_text_gives_a_smaller_vocabulary() -> None:
    small = train_tokenizer(["aa aa aa"], 1000)
    assert 261 < small.vocab_size < 1000
    assert small.decode(small.encode("aa")) == "aa"


def test_refusals(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bpe needs the 256 bytes and 5 special tokens, 261 in all"):
        train_tokenizer(DOCUMENTS, 260)
    with pytest.raises(UserError, match="no documents"):
        train_tokenizer([], 300)
    with pytest.raises(UserError, match=r"no tokenizer at .*none"):
        Tokenizer.load(tmp_path / "none")
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_training_with_exactly_the_bytes() -> None:
    assert train_tokenizer(DOCUMENTS, 261).vocab_size == 261


def test_jobs_that_start_together_may_save_to_one_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        for saved in [pool.submit(tokenizer.save, tmp_path) for _ in range(200)]:
            saved.result()
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
