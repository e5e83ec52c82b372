"""SentencePiece's own ``.model`` files give the ids that SentencePiece gives, or are refused."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from prepare_case import TEXTS
from spm_case import (
    CONTROL,
    CONTROLS,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    field,
    model_bytes,
    small_bpe,
    small_unigram,
    write,
)

from data_pipeline.errors import UserError
from data_pipeline.tokenization.sentencepiece import note
from data_pipeline.tokenization.tokenizer import Tokenizer

SAMPLES = ["abc ab", "  a   b ", "", " ", "aaab abab", "x<s>x</s>", "<unk>", "xyz", "a\tb", "a\nb ▁", "cab"]
# As sentencepiece 0.2.3 encodes them with these models.
TRIMMED = [
    *([10, 6], [3, 4], [], [], [3, 11, 5, 6, 5], [14, 0, 17, 16, 18, 0, 17, 0, 16, 18], [14, 17, 0, 18], [14, 0]),
    *([3, 0, 12], [3, 0, 12], [14, 13, 5]),
]
KEPT = [
    *([9, 6], [14, 3, 14, 14, 4, 14], [], [14], [8, 5, 6, 5], [0, 17, 16, 18, 0, 17, 0, 16, 18], [17, 0, 18], [0]),
    *([11, 0, 12], [11, 0, 12, 14, 14], [13, 5]),
]
MODELS = {"bpe": small_bpe(), "bpe kept": small_bpe(normalizer={3: 0, 4: 0}), "unigram": small_unigram()}


@pytest.mark.parametrize(("name", "expected"), [("bpe", TRIMMED), ("bpe kept", KEPT), ("unigram", TRIMMED)])
def test_ids_are_those_of_sentencepiece(name: str, expected: list[list[int]], tmp_path: Path) -> None:
    file = write(tmp_path / "tokenizer.model", MODELS[name])
    for path in (file, tmp_path):
        tokenizer = Tokenizer.load(path)
        assert tokenizer.encode_batch(SAMPLES) == expected
        assert [tokenizer.encode(text) for text in SAMPLES] == expected
    assert tokenizer.roles.as_dict() == {"bos": 1, "pad": 2, "eos": 2, "unk": 0}
    assert tokenizer.special_ids == (0, 1, 2)
    again = Tokenizer.load(tokenizer.save(tmp_path / "saved"))
    assert again.hash == tokenizer.hash
    assert again.encode_batch(SAMPLES) == expected
    assert tokenizer.decode(expected[0]) == "abc ab"
    assert tokenizer.decode(expected[1]) == ("  a   b " if name == "bpe kept" else "a b")


def test_the_literals_here_are_those_of_the_library(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    for name, data in MODELS.items():
        model = library.SentencePieceProcessor(model_file=str(write(tmp_path / "x.model", data)))
        assert model.encode(SAMPLES) == (KEPT if name == "bpe kept" else TRIMMED)


def strange_texts() -> list[str]:
    """Texts that are hard to normalize, and random ones with many marks."""
    draw = random.Random(0)
    texts = [
        *("", " ", "\n", "a\tb", "a\nb\r\nc", "\u3000x", "日本語 ｶﾞ 。", "안녕", unicodedata.normalize("NFD", "안녕")),
        *("नमस्ते दुनिया", "Tiếng Việt", unicodedata.normalize("NFD", "Tiếng Việt đẹp ế ộ"), "ａ\u0300 ﬁ ①", "👍🏽 "),
        *("<s> </s> <unk> <0x41> <0x0A>", "=====aaaaa", "a\u200bb", "x\u0338=", "¨ ´", "▁a ▁▁b", "e\u0302\u0301"),
        *("Größe élève ÀÉÎ", "Привет, мир!", "مرحبا بالعالم", "שלום", "ελληνικά", "！\ufe0f", "ª\u0e33", "\ufeffx"),
        *("👨\u200d👩\u200d👧", "\uffba\uffd2", "\uffb5\uffd5\uff1c"),
    ]  # fmt: skip
    kinds = [(0x20, 0x7F), (0x20, 0x3000), (0x300, 0x370), (0x20, 0x21), (0xFF00, 0xFFF0)]
    for _ in range(600):
        spans = draw.choices(kinds, k=draw.randrange(1, 25))
        texts.append("".join(chr(draw.randrange(*span)) for span in spans))
    return texts


TRAINED: dict[str, dict[str, Any]] = {
    "bpe, the defaults": {"model_type": "bpe"},
    "bpe, bytes": {"model_type": "bpe", "normalization_rule_name": "nfkc_cf", "byte_fallback": True},
    "bpe, as Llama": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
    },
    "bpe, symbols": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<sep>", "[XY]"],
    },
    "bpe, across words": {"model_type": "bpe", "split_by_whitespace": False},
    "unigram, the defaults": {},
    "unigram, bytes and other names": {
        "byte_fallback": True,
        "pad_id": 0,
        "unk_id": 3,
        "eos_piece": "<end>",
        "bos_id": -1,
    },
}


@pytest.mark.parametrize("name", TRAINED)
def test_trained_models_give_the_ids_of_the_library(name: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    sentences = [*TEXTS, "<b>The cat's unkind words: 12, 345 & {more}</b>", "déjà vu, naïve café — “quoted”"] * 2
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(tmp_path / "m"), vocab_size=380, hard_vocab_limit=False,
        minloglevel=2, num_threads=1, **TRAINED[name],
    )  # fmt: skip
    model = library.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    tokenizer = Tokenizer.load(tmp_path / "m.model")
    texts = [*TEXTS[:40], *strange_texts(), "a<sep>b [XY]c", "<end> <pad>"]
    refused = 0
    for text, expected in zip(texts, model.encode(texts), strict=True):
        try:
            assert tokenizer.encode_batch([text])[0] == expected, text
        except UserError:
            refused += 1
            continue
        if "▁" not in text and model.unk_id() not in expected:
            assert tokenizer.decode(expected) == model.decode(expected)
    assert refused < 5
    assert [tokenizer.name_of(i) for i in range(model.get_piece_size())] == model.id_to_piece(
        list(range(model.get_piece_size()))
    )


def test_a_text_that_cannot_be_settled_is_refused(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "m"), vocab_size=200, hard_vocab_limit=False,
        minloglevel=2, model_type="bpe",
    )  # fmt: skip
    tokenizer = Tokenizer.load(tmp_path / "m.model")
    # The ligature becomes two letters, and SentencePiece leaves the accent behind the second alone.
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(UserError, match=r"--normalize nfkc\). It begins 'ﬁ\u0300'"):
            encode("\ufb01\u0300")
    model = library.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert tokenizer.encode(unicodedata.normalize("NFKC", "\ufb01\u0300")) == model.encode("f\u00ec")


PIECES = [*CONTROLS, ("a", -1.0, NORMAL), ("b", -2.0, NORMAL)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (model_bytes(PIECES, model_type=3), "its type is word, and BPE and unigram are read"),
        (model_bytes(PIECES, model_type=4), "its type is char"),
        (model_bytes(PIECES, trainer={24: 1}), "it keeps white space behind words"),
        (model_bytes(PIECES, normalizer={5: 0}), "does not escape it"),
        (model_bytes([*PIECES, ("c", 0.0, UNUSED)]), "it has pieces that are marked as unused"),
        (model_bytes([*PIECES, ("a", -3.0, NORMAL)]), "it has a piece twice"),
        (model_bytes(PIECES[1:]), "it does not have one piece for what it does not know"),
        (model_bytes([*PIECES, ("<x>", 0.0, USER_DEFINED)]), "adds or removes white space around them"),
        (model_bytes([*PIECES, ("<x>", 0.0, USER_DEFINED)], model_type=1), "type unigram and has user-defined symbols"),
        (model_bytes([*PIECES, ("▁▁", 0.0, USER_DEFINED)], normalizer={3: 0, 4: 0}), "symbol with white space"),
        (
            model_bytes(PIECES, normalizer={1: b"user_defined", 2: b"map"}),
            "its normalization 'user_defined' is none of",
        ),
        (model_bytes(PIECES, model_type=1), "the text '<unk>' would be taken for the control symbol"),
    ],
)
def test_what_cannot_be_exact_is_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"x.model: this SentencePiece model cannot be read with the very ids.*{reason}"
    ):
        Tokenizer.load(write(tmp_path / "x.model", data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 40,
        small_bpe()[:-3],
        small_bpe()[:50],
        b"{}",
        field(1, field(1, b"\xff\xfe")),
        field(1, 3),
        b"\x0a",
    ],
)
def test_a_file_that_is_no_model_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.model is not a SentencePiece model, or it is damaged"):
        Tokenizer.load(write(tmp_path / "x.model", data))


def test_several_models_are_refused_and_other_files_count(tmp_path: Path) -> None:
    write(tmp_path / "a.model", small_bpe())
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<s>"}')
    assert Tokenizer.load(tmp_path).pad_id == 1
    write(tmp_path / "b.model", small_bpe())
    with pytest.raises(UserError, match=r"holds several SentencePiece models \(a.model, b.model\): name one"):
        Tokenizer.load(tmp_path)
    assert Tokenizer.load(tmp_path / "b.model").pad_id == 1


def test_a_model_without_an_end_token_needs_a_name_for_it(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0, 2), ("<stop>", 0.0, CONTROL), *PIECES[3:]]
    write(tmp_path / "x.model", model_bytes(pieces))
    with pytest.raises(UserError, match=r"no token that ends a document \(special tokens: <unk>, <stop>\)"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    assert Tokenizer.load(tmp_path).eos_id == 1


def test_unigram_has_a_note(tmp_path: Path) -> None:
    assert note(tmp_path) is None
    assert note(write(tmp_path / "a.model", small_bpe())) is None
    unigram = write(tmp_path / "a.model", small_unigram())
    assert "in 32 bits" in str(note(unigram))
    assert "in 32 bits" in str(note(tmp_path))
    (tmp_path / "tokenizer.json").touch()
    assert note(tmp_path) is None
