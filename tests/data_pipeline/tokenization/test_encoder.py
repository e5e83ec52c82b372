"""The two backends give the same ids, or the fast one is not taken."""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

from data_pipeline.errors import UserError
from data_pipeline.tokenization import encoder as e
from data_pipeline.tokenization.bytepairs import GPT2_PATTERN, NotExpressible, byte_alphabet, byte_pairs
from data_pipeline.tokenization.encoder import (
    CHECK_CHARACTERS,
    CheckedEncoder,
    ParityError,
    StockEncoder,
    TiktokenEncoder,
    choose_encoder,
    make_encoder,
)
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer

tiktoken = pytest.importorskip("tiktoken")

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog's",
    "bones",
    "and",
    "runs",
    "through",
    "the",
    "forest",
    "till",
    "they're",
    "12",
    "345",
    "é",
    "漢字",
]
DOCUMENTS = [" ".join(WORDS[i % 20 : i % 20 + 6] + WORDS[: i % 13]) + "\n\n  ok" * (i % 3) for i in range(300)]
CORNERS = [
    "",
    " ",
    "\x00",
    "a\x00b",
    "a\r\nb\r\n\r\n c",
    "\n\n\n x",
    "it's IT'S they'LL we'd",
    "😀👩‍👩‍👧 e\u0301\u0323 नमस्ते \u200d",
    "<mask> </s><s> a<mask>b <pad>",
    "x\u00a0y\u2003 z\u3000\u1680\u2028\u2029\x85\x1c.\u200b\ufeff",
    "1234567890 ١٢٣ ⅷ ²",
    " " * 5000 + "x" + "\t" * 3000,
    "ab" * 20_000,
    "漢字" * 5000,
    "a" * 100_000,
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(DOCUMENTS, 380)


def changed(bpe: Tokenizer, change: Callable[[tokenizers.Tokenizer], Any]) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(bpe.to_json())
    change(backend)
    return Tokenizer(backend)


def edited(bpe: Tokenizer, edit: Callable[[dict[str, Any]], Any]) -> Tokenizer:
    data = json.loads(bpe.to_json())
    edit(data)
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(data)))


@pytest.fixture(scope="module")
def llama3(bpe: Tokenizer) -> Tokenizer:
    """Cut as Llama 3 is, with all ways to make a token in a row, as its tokenizer.json was converted from tiktoken."""
    pairs = byte_pairs(bpe)
    letters = {byte: character for character, byte in byte_alphabet().items()}
    merges = [
        ["".join(letters[byte] for byte in part) for part in (token[:cut], token[cut:])]
        for token in pairs.ranks
        for cut in range(1, len(token))
        if token[:cut] in pairs.ranks and token[cut:] in pairs.ranks
    ]

    def edit(data: dict[str, Any]) -> None:
        data["model"] |= {"merges": merges, "ignore_merges": True}

    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    after = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return changed(edited(bpe, edit), lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Sequence([split, after])))


@pytest.fixture(scope="module")
def renumbered(bpe: Tokenizer) -> Tokenizer:
    """The same merges under ids in another order, with gaps."""
    ids = list(range(bpe.vocab_size + 100))
    random.Random(0).shuffle(ids)

    def edit(data: dict[str, Any]) -> None:
        data["model"]["vocab"] = {text: ids[id_] for text, id_ in data["model"]["vocab"].items()}
        for token in data["added_tokens"]:
            token["id"] = ids[token["id"]]

    return edited(bpe, edit)


@pytest.fixture(params=["bpe", "llama3", "renumbered"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def same(tokenizer: Tokenizer, texts: list[str]) -> None:
    expected = tokenizer.encode_batch(texts)
    for name in ("tokenizers", "tiktoken"):
        arrays = make_encoder(tokenizer, name, np.uint16).encode_batch(texts)
        assert all(array.dtype == np.uint16 and array.ndim == 1 for array in arrays)
        for text, array, ids in zip(texts, arrays, expected, strict=True):
            assert array.tolist() == ids, (name, text[:50])


def test_odd_texts(tokenizer: Tokenizer) -> None:
    same(tokenizer, CORNERS)
    assert make_encoder(tokenizer, "tiktoken", np.uint32).encode_batch([]) == []


@pytest.mark.parametrize("name", ["bpe", "llama3"])
def test_every_assigned_character(request: pytest.FixtureRequest, name: str) -> None:
    """Two engines of regular expressions with tables of their own. Each character beside a letter, a space, a digit."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    characters = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in ("Cs", "Co", "Cn")]
    assert len(characters) > 140_000
    texts = ["".join(f"a{c} {c}1" for c in characters[i : i + 600]) for i in range(0, len(characters), 600)]
    arrays = TiktokenEncoder(tokenizer, np.uint16).encode_batch(texts)
    assert [array.tolist() for array in arrays] == tokenizer.encode_batch(texts)


def test_random_mixtures(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    pool = [*" \n\t\r.,'abcesTRE12\u00a0\u3000é漢😀\u0301", "the", " the", "'s", "  ", "\r\n", "<mask>"]
    same(tokenizer, ["".join(rng.choices(pool, k=rng.randrange(200))) for _ in range(400)])


def test_runs_of_white_space_too_long_for_tiktoken_go_to_the_library(
    bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fast = TiktokenEncoder(bpe, np.uint16)
    texts = [" " * 1_100_000, "x" + " \n" * 600_000 + "y", "a" * 300_000]
    for text, array in zip(texts, fast.encode_batch(texts), strict=True):
        assert array.tolist() == bpe.encode(text)
    assert capfd.readouterr().err == ""  # a panic of tiktoken's prints a page, also where it is caught

    class PanicException(BaseException):
        """As PyO3's, raised for a panic in Rust."""

    def panic(text: str) -> list[int]:
        raise KeyboardInterrupt if text == "stop" else PanicException("called `Result::unwrap()`")

    monkeypatch.setattr(fast, "_encoding", type("Encoding", (), {"encode_ordinary": staticmethod(panic)}))
    assert fast.encode_batch(["the fox"])[0].tolist() == bpe.encode("the fox")
    with pytest.raises(KeyboardInterrupt):
        fast.encode_batch(["stop"])


def test_the_pattern_is_the_one_inside_byte_level() -> None:
    pieces = pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in [*DOCUMENTS[:20], *CORNERS[:11]]:
        places = [span for _, span in pieces.pre_tokenize_str(text)]
        assert places == [span for _, span in byte_level.pre_tokenize_str(text)]


def test_auto_takes_the_fast_one_where_it_agrees(tokenizer: Tokenizer) -> None:
    choice = choose_encoder(tokenizer, "auto", DOCUMENTS[:20], np.uint16)
    assert choice.encoder.name == "tiktoken"
    assert choice.reason == "same ids as the tokenizers library on 20 texts of the sample"
    assert isinstance(choice.encoder, CheckedEncoder)
    asked = choose_encoder(tokenizer, "tokenizers", DOCUMENTS[:20], np.uint16)
    assert (asked.encoder.name, asked.reason) == ("tokenizers", "asked for")


def two_ways(data: dict[str, Any]) -> None:
    pairs = [list(pair) for pair in data["model"]["merges"]]
    known = data["model"]["vocab"]
    long = next(p for p in pairs if len("".join(p)) == 3 and "".join(p)[1:] in known and len(p[0]) == 2)
    text = "".join(long)
    data["model"]["merges"] = [*pairs, [text[0], text[1:]]]


def without_a_byte(data: dict[str, Any]) -> None:
    vocabulary = data["model"]["vocab"]
    vocabulary["unused"] = vocabulary.pop("Ā")


REFUSED: dict[str, tuple[Callable[[Tokenizer], Tokenizer], str]] = {
    "unigram": (lambda t: train_tokenizer(DOCUMENTS, 400, "unigram"), "the model is Unigram, not byte-level BPE"),
    "normalizer": (
        lambda t: changed(t, lambda b: setattr(b, "normalizer", normalizers.NFC())),
        r"text is normalised first \(NFC\)",
    ),
    "added": (lambda t: changed(t, lambda b: b.add_tokens(["  "])), "tokens were added that are found in raw text"),
    "prefix": (
        lambda t: changed(t, lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))),
        "a space is put before each text",
    ),
    "uncut": (
        lambda t: changed(t, lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Whitespace())),
        "not cut by a ByteLevel pre-tokenizer",
    ),
    "twice cut": (
        lambda t: changed(
            t,
            lambda b: setattr(
                b,
                "pre_tokenizer",
                pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            ),
        ),
        "other pre-tokenizers than one regular expression",
    ),
    "two ways": (lambda t: edited(t, two_ways), "two merges of different rank make the same token"),
    "no byte": (lambda t: edited(t, without_a_byte), "the byte 0x00 is not in the vocabulary"),
    "whole words": (
        lambda t: edited(t, lambda d: d["model"].update(ignore_merges=True, merges=d["model"]["merges"][:-1])),
        "takes whole words that no merges make",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_tiktoken_cannot_express_is_left_to_the_library(bpe: Tokenizer, case: str) -> None:
    make, match = REFUSED[case]
    tokenizer = make(bpe)
    with pytest.raises(NotExpressible, match=match):
        byte_pairs(tokenizer)
    choice = choose_encoder(tokenizer, "auto", DOCUMENTS[:5], np.uint16)
    assert choice.encoder.name == "tokenizers"
    assert choice.reason.startswith("tiktoken cannot be used: ")
    with pytest.raises(UserError, match=f"tiktoken cannot be used: .*{match}"):
        choose_encoder(tokenizer, "tiktoken", DOCUMENTS[:5], np.uint16)


def test_without_tiktoken(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    choice = choose_encoder(bpe, "auto", DOCUMENTS[:5], np.uint16)
    assert choice.encoder.name == "tokenizers"
    assert "tiktoken is not installed (pip install 'nystrom-pretrain[fast]')" in choice.reason
    with pytest.raises(UserError, match="tiktoken is not installed"):
        choose_encoder(bpe, "tiktoken", DOCUMENTS[:5], np.uint16)
    with pytest.raises(UserError, match="choose one of auto, tokenizers, tiktoken"):
        choose_encoder(bpe, "fastest", DOCUMENTS[:5], np.uint16)


def test_a_difference_on_the_sample_decides(bpe: Tokenizer) -> None:
    """A pattern that does not match everything: the library keeps what lies between the matches, tiktoken drops it."""
    split = pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated")
    after = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    odd = changed(bpe, lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Sequence([split, after])))
    choice = choose_encoder(odd, "auto", ["fox", "fox fox"], np.uint16)
    assert choice.encoder.name == "tokenizers"
    assert "tiktoken and tokenizers differ from token" in choice.reason
    assert "begins 'fox fox'" in choice.reason
    with pytest.raises(UserError, match="differ from token"):
        choose_encoder(odd, "tiktoken", ["fox fox"], np.uint16)
    # A sample that does not show it: the check of the work itself does.
    checked = choose_encoder(odd, "auto", ["fox"], np.uint16).encoder
    assert checked.name == "tiktoken"
    with pytest.raises(ParityError, match="begins 'a, b'"):
        checked.encode_batch(["a, b"])


def test_every_512th_text_is_checked_and_a_unit_begins_anew(bpe: Tokenizer) -> None:
    class Wrong:
        """Right but for one text."""

        name = "wrong"

        def encode_batch(self, texts: Any) -> list[np.ndarray]:
            return [np.array([7] if text == "bad" else bpe.encode(text), dtype=np.uint16) for text in texts]

    def passes(place: int, batch: int) -> bool:
        checked.reset()
        texts = ["bad" if i == place else "the" for i in range(place + 1)]
        try:
            for i in range(0, len(texts), batch):
                checked.encode_batch(texts[i : i + batch])
        except ParityError:
            return False
        return True

    checked = CheckedEncoder(Wrong(), bpe, np.uint16)
    assert checked.name == "wrong"
    for batch in (1, 100, 512, 2000):
        assert [place for place in (0, 1, 511, 512, 513, 1023, 1024) if not passes(place, batch)] == [0, 512, 1024]
    short = CheckedEncoder(Wrong(), bpe, np.uint16, every=1)
    with pytest.raises(ParityError, match=r"wrong and tokenizers differ from token 0 on \(\[7\] and \[.*'bad'"):
        short.encode_batch(["the", "bad"])


def test_of_a_long_text_only_the_beginning_is_checked(bpe: Tokenizer) -> None:
    seen: list[int] = []

    class Counting(StockEncoder):
        def encode_batch(self, texts: Any) -> list[np.ndarray]:
            seen.extend(len(text) for text in texts)
            return super().encode_batch(texts)

    long = "the " * CHECK_CHARACTERS
    assert CheckedEncoder(Counting(bpe, np.uint16), bpe, np.uint16).encode_batch([long])[0].size > CHECK_CHARACTERS
    assert seen == [CHECK_CHARACTERS, len(long)]


def test_arrays_of_the_library(bpe: Tokenizer) -> None:
    for dtype in (np.uint16, np.uint32, np.int64):
        arrays = StockEncoder(bpe, dtype).encode_batch(DOCUMENTS[:5])
        assert [array.tolist() for array in arrays] == bpe.encode_batch(DOCUMENTS[:5])
        assert {array.dtype for array in arrays} == {np.dtype(dtype)}
    assert e.StockEncoder(bpe, np.uint16).encode_batch([""])[0].shape == (0,)


def test_tokenizers_saved_and_loaded_are_expressed_alike(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    again = byte_pairs(Tokenizer.load(tmp_path))
    assert again.ranks == byte_pairs(bpe).ranks
    assert again.pattern == GPT2_PATTERN
