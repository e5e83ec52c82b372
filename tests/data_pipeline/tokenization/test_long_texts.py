"""Long texts are encoded in pieces, with the ids of the whole and bounded memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from data_pipeline.errors import UserError
from data_pipeline.tokenization import long_texts
from data_pipeline.tokenization.encoder import make_encoder
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer

WORDS = ["the", "quick", "brown", "Fox's", "<mask>", "1234567", "x" * 40, "Élan", "naïve", "漢字かな", "日本語。", "é"]
WORDS += ["e\u0301", "don't", "😀😀", "a_b", "!!!", "...", "(the)", "\u2581", "İ", "ﬁ", "two words", "ΣΊΣ", "\u3000"]
GAPS = [" "] * 9 + ["", "  ", "\n", "\n\n", "\r\n", " \n", "\t", ". ", "。", "\u00a0"]
LLAMA3 = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)


def some_text(seed: int, words: int) -> str:
    rng = random.Random(seed)
    gaps = GAPS if seed % 3 else ["", "", "", "\n", "。"]  # every third has no spaces
    return "".join(rng.choice(WORDS) + rng.choice(gaps) for _ in range(words))


DOCUMENTS = [some_text(seed, 60) for seed in range(60)]


def changed(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    """The tokenizer with other parts around its model."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    for name, part in parts.items():
        setattr(backend, name, part)
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def kinds() -> dict[str, Tokenizer]:
    bpe, unigram = train_tokenizer(DOCUMENTS, 500, "bpe"), train_tokenizer(DOCUMENTS, 600, "unigram")
    wordpiece = train_tokenizer(DOCUMENTS, 400, "wordpiece")
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    metaspace = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    specials = ["<unk>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    metaspace.train_from_iterator(DOCUMENTS, trainer)
    first = Tokenizer(metaspace)
    suffix = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    suffix.pre_tokenizer, suffix.normalizer = pre_tokenizers.BertPreTokenizer(), normalizers.Lowercase()
    suffix.train_from_iterator(
        DOCUMENTS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=500, special_tokens=specials, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    added = tokenizers.Tokenizer.from_str(bpe.to_json())
    added.add_tokens(["two words", tokenizers.AddedToken("quick", lstrip=True, rstrip=True), "the quick"])
    return {
        "bpe": bpe,
        "unigram": unigram,
        "wordpiece": wordpiece,
        "lowercase": train_tokenizer(DOCUMENTS, 400, "wordpiece", lowercase=True),
        "llama 3": changed(bpe, pre_tokenizer=pre_tokenizers.Sequence([split, byte_level])),
        "prefix space": changed(bpe, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "normal forms": changed(bpe, normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])),
        "digits": changed(bpe, pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), bpe_cut()])),
        "metaspace": first,
        "metaspace first": changed(first, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")),
        "metaspace unigram": changed(unigram, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always")),
        "end of word": Tokenizer(suffix),
        "added tokens": Tokenizer(added),
        # These have no place to cut: the model sees all, or it depends on the beginning of the text.
        "no cut: whole": changed(unigram, pre_tokenizer=None, decoder=decoders.ByteFallback()),
        "no cut: not at spaces": changed(unigram, pre_tokenizer=pre_tokenizers.Metaspace(split=False)),
        "no cut: by number": changed(bpe, pre_tokenizer=pre_tokenizers.Split(Regex(r"[\s\S]{1,4}"), "isolated")),
        "no cut: prepended": changed(
            bpe, normalizer=normalizers.Prepend("x"), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)
        ),
    }


def bpe_cut() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


NAMES = (
    *("bpe", "unigram", "wordpiece", "lowercase", "llama 3", "prefix space", "normal forms", "digits", "metaspace"),
    *("metaspace first", "metaspace unigram", "end of word", "added tokens"),
    *("no cut: whole", "no cut: not at spaces", "no cut: by number", "no cut: prepended"),
)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_have_the_ids_of_the_whole(
    name: str, kinds: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = kinds[name]
    texts = [some_text(seed, 600) for seed in range(12)]
    whole = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(long_texts, "PIECE", 300)
    monkeypatch.setattr(long_texts, "_SEARCH", 200)
    monkeypatch.setattr(long_texts, "_WINDOW", 64)
    counts = []
    encoder = make_encoder(tokenizer, "tokenizers", "uint32")
    for text, ids, array in zip(texts, whole, encoder.encode_batch(texts), strict=True):
        pieces = tokenizer.pieces(text)
        assert "".join(pieces) == text
        assert tokenizer.encode(text) == ids == tokenizer.encode_batch([text, "a"])[0] == array.tolist()
        counts.append(len(pieces))
    assert (max(counts) == 1) if name.startswith("no cut") else (sum(counts) > 60), counts


def test_tiktoken_takes_the_same_pieces(kinds: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tiktoken")
    texts = [some_text(seed, 600) for seed in range(12)]
    for name in ("bpe", "llama 3"):
        whole = [kinds[name].encode(text) for text in texts]
        with monkeypatch.context() as patch:
            patch.setattr(long_texts, "PIECE", 300)
            for ids, expected in zip(
                make_encoder(kinds[name], "tiktoken", "uint32").encode_batch(texts), whole, strict=True
            ):
                np.testing.assert_array_equal(ids, expected)


def test_a_huge_text_without_a_place_to_cut_is_refused(
    kinds: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_texts, "PIECE", 300)
    monkeypatch.setattr(long_texts, "LONGEST", 5000)
    kinds["bpe"].encode("the fox " * 1000)
    for tokenizer, text in ((kinds["no cut: whole"], "the fox " * 1000), (kinds["bpe"], "x" * 8000)):
        with pytest.raises(UserError, match=r"8,000 characters in which .* no place to cut.*--text-unit line"):
            tokenizer.encode(text)
    assert len(kinds["bpe"].pieces("x" * 4000)) == 1


@pytest.mark.parametrize("backend", ["tokenizers", "tiktoken"])
def test_memory_of_a_long_document_is_bounded(backend: str, kinds: dict[str, Tokenizer], tmp_path: Path) -> None:
    """12 MB took 1.7 GB more than a short text does with the `tokenizers` library."""
    if backend == "tiktoken":
        pytest.importorskip("tiktoken")
    kinds["bpe"].save(tmp_path)
    code = """
import json, resource, sys
from data_pipeline.tokenization.encoder import make_encoder
from data_pipeline.tokenization.tokenizer import Tokenizer
encoder = make_encoder(Tokenizer.load(sys.argv[1]), sys.argv[2], "uint16")
encoder.encode_batch(["the quick brown fox jumps " * 40_000] * 2)
text = "the quick brown fox jumps " * 460_000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids = encoder.encode_batch([text])[0]
print(json.dumps([len(text), len(ids), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), backend],
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=True,
    )
    characters, tokens, kilobytes = json.loads(done.stdout)
    assert characters > 11_000_000
    assert tokens > 2_000_000
    assert kilobytes * 1024 < 15 * characters
