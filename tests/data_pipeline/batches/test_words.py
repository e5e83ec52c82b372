"""Word boundaries from ids alone, against pre-tokenizers and against a regular expression over the text."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data_pipeline.batches.words import INSIDE, LETTER, OTHER, SPACE, WordBoundaries, accepts, begins
from data_pipeline.errors import UserError

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
MULTILINGUAL = [
    "The quick brown fox doesn't jump over 12 lazy dogs, it re-reads «Zwölf Boxkämpfer» (vol. 2).",
    "Zażółć gęślą jaźń; příliš žluťoučký kůň. L’été, où est-il ? ¿Dónde está el niño?",
    "Съешь же ещё этих мягких французских булок, да выпей чаю — 100% правда!",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. דג סקרן שט בים מאוכזב. نص حكيم له سر قاطع وذو شأن عظيم",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है। e\u0301cole cafe\u0301",
    "emoji 😂👍🏽 and 👨‍👩‍👧, maths ∑x² ≤ ½, arrows → ← and a\u00a0no-break space\tand tabs\n\n  indented _private",
]
UNSPACED = [
    "日本語のテキストです。東京タワーへ行きました。",
    "我爱自然语言处理，也爱Python代码。",
    "สวัสดีชาวโลก ยินดีต้อนรับ",
]
PYTHON = Path(argparse.__file__).read_text(encoding="utf-8")


@dataclass
class Vocabulary:
    """The three things that boundaries are made from, around a backend."""

    backend: tokenizers.Tokenizer

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> tuple[int, ...]:
        return tuple(i for i, added in self.backend.get_added_tokens_decoder().items() if added.special)

    def to_json(self) -> str:
        return str(self.backend.to_str())


def trained(kind: str, texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    trainer: Any
    if kind == "bytes":
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "unigram":
        backend = tokenizers.Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    else:
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


def boundaries_of(backend: tokenizers.Tokenizer) -> WordBoundaries:
    return WordBoundaries.of(Vocabulary(backend))  # type: ignore[arg-type]


def starts_of(backend: tokenizers.Tokenizer, ids: list[int]) -> list[bool]:
    return boundaries_of(backend).starts(np.array([ids]))[0].tolist()


def is_letter(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "LNM" or category == "Pc" or character in "\u200c\u200d"


def words_of_text(text: str) -> set[int]:
    """Characters of the text at which no word begins though a token might: inside a run of letters, after one space."""
    inside = set()
    for match in re.finditer("x+", "".join("x" if is_letter(c) else " " for c in text)):
        inside.update(range(match.start() + 1, match.end()))
    return inside


def expected_starts(text: str, spans: list[tuple[int, int]]) -> list[bool]:
    """By the text: tokens with character offsets ``spans``, which overlap where a character is cut."""
    inside = words_of_text(text)
    starts, tail = [True], False
    for before, (begin, end) in itertools.pairwise(spans):
        cut = begin < before[1]
        lone_space = text[before[0] : before[1]] == " " and not text[begin].isspace()
        counted_as_letter = tail and is_letter(text[begin])  # what the documentation says of a cut character's end
        starts.append(not (cut or begin in inside or lone_space or counted_as_letter))
        tail = cut and end - begin == 1
    return starts


@pytest.mark.parametrize(("text", "vocab_size"), [(PYTHON, 900), (PYTHON, 4000), ("\n".join(MULTILINGUAL * 3), 600)])
def test_byte_level_words_are_the_runs_of_letters_of_the_text(text: str, vocab_size: int) -> None:
    backend = trained("bytes", [text], vocab_size)
    encoding = backend.encode(text)
    expected = expected_starts(text, encoding.offsets)
    assert starts_of(backend, encoding.ids) == expected
    assert 0.1 < np.mean(expected) < 0.9  # both answers come up


def test_byte_level_words_are_the_pre_tokens_of_a_word_regex() -> None:
    """A pre-tokenizer whose pieces are the words: its word ids change where words begin."""
    backend = tokenizers.Tokenizer(models.BPE())
    pattern = tokenizers.Regex(r" ?[\p{L}\p{N}\p{M}\p{Pc}]+| ?[^\s\p{L}\p{N}\p{M}\p{Pc}]|\s")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    texts = [PYTHON, *MULTILINGUAL[:4] * 3]  # three times: no character there is left cut
    backend.train_from_iterator(texts, trainer)
    for text in texts:
        encoding = backend.encode(text)
        ids = encoding.word_ids
        expected = [True, *(a != b for a, b in itertools.pairwise(ids))]
        assert starts_of(backend, encoding.ids) == expected


@pytest.mark.parametrize("text", [PYTHON, "\n".join(MULTILINGUAL * 3)])
def test_wordpiece_words_are_those_of_its_pre_tokenizer(text: str) -> None:
    backend = trained("wordpiece", [text], 500)
    encoding = backend.encode(text)
    ids = encoding.word_ids
    assert starts_of(backend, encoding.ids) == [True, *(a != b for a, b in itertools.pairwise(ids))]


@pytest.mark.parametrize("text", [PYTHON.replace("\n", " "), " ".join(MULTILINGUAL[:4] * 3)])
def test_unigram_words_are_the_runs_of_letters_of_the_text(text: str) -> None:
    backend = trained("unigram", [text], 400)
    text = "▁" + text.replace(" ", "▁")  # what the model sees; tokens then lie side by side in it
    pieces = [backend.id_to_token(i) for i in backend.encode(text[1:].replace("▁", " ")).ids]
    assert "".join(pieces) == text
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    ids = [backend.token_to_id(piece) for piece in pieces]
    assert starts_of(backend, ids) == expected_starts(text.replace("▁", " "), spans)


def test_scripts_without_spaces_begin_a_word_at_each_token() -> None:
    for text in UNSPACED:
        backend = trained("bytes", UNSPACED * 2, 400)
        encoding = backend.encode(text)
        starts = starts_of(backend, encoding.ids)
        for (begin, end), (previous, _), start in zip(encoding.offsets[1:], encoding.offsets, starts[1:], strict=False):
            token = text[begin:end]
            if begin == previous or unicodedata.category(token[0]).startswith("M"):
                assert not start, token  # a later byte of a character, or a vowel sign
            elif not token.isascii():
                assert start or text[begin - 1] == " ", token


def test_a_character_cut_into_bytes_stays_whole() -> None:
    backend = trained("bytes", ["nothing but ascii text"], 261)
    for text in ("naïve", "日本", "x😂y", "Ünïcödé"):
        encoding = backend.encode(text)
        starts = starts_of(backend, encoding.ids)
        assert len(starts) == len(text.encode())
        characters = [offset for offset, _ in encoding.offsets]
        for i in range(1, len(starts)):
            if characters[i] == characters[i - 1]:
                assert not starts[i], (text, i)
    assert starts_of(backend, backend.encode("Ünïcödé").ids).count(True) == 1
    assert starts_of(backend, backend.encode("日本").ids).count(True) == 2
    assert starts_of(backend, backend.encode("x😂").ids).count(True) == 2


def test_special_tokens_are_words_of_their_own() -> None:
    backend = trained("bytes", [PYTHON], 900)
    letters = backend.encode("aq").ids  # two tokens of one word
    assert len(letters) == 2
    assert starts_of(backend, letters) == [True, False]
    for special in range(5):
        assert starts_of(backend, [letters[0], special, letters[1], letters[1]]) == [True, True, True, False]
    assert starts_of(backend, [0, 1, 1, 2]) == [True] * 4
    backend.add_special_tokens(["END"])  # spelled like a word, and after a space
    end, space = backend.token_to_id("END"), backend.encode(" ").ids[0]
    assert starts_of(backend, [letters[0], end, letters[1], space, end]) == [True] * 5


def test_each_row_begins_a_word_and_rows_do_not_touch() -> None:
    backend = trained("bytes", [PYTHON], 900)
    boundaries = boundaries_of(backend)
    ids = np.array(backend.encode(PYTHON).ids[:6000])
    starts = boundaries.starts(ids.reshape(60, 100))
    assert starts.shape == (60, 100)
    assert starts[:, 0].all()
    whole = boundaries.starts(ids[None])[0].reshape(60, 100)
    np.testing.assert_array_equal(starts[:, 1:], whole[:, 1:])
    assert boundaries.starts(np.empty((0, 8), dtype=np.int64)).shape == (0, 8)
    assert boundaries.starts(np.empty((2, 0), dtype=np.int64)).shape == (2, 0)


@pytest.mark.parametrize(
    ("token", "first", "after"),
    [
        (" the", SPACE, LETTER | INSIDE),
        ("the", LETTER, LETTER | INSIDE),
        ("_x", LETTER, LETTER | INSIDE),
        ("42", LETTER, LETTER | INSIDE),
        (" ", SPACE, LETTER | OTHER | INSIDE),
        ("  ", SPACE, INSIDE),
        ("\n", SPACE, INSIDE),
        ("'s", OTHER, LETTER | INSIDE),
        ("(", OTHER, INSIDE),
        ("e\u0301", LETTER, LETTER | INSIDE),
        ("\u0301", INSIDE, LETTER | INSIDE),
        ("!\u0301", OTHER, INSIDE),
        ("東京", OTHER, INSIDE),
        ("ー", OTHER, INSIDE),
        ("ไม้", OTHER, INSIDE),
        ("한글", LETTER, LETTER | INSIDE),
    ],
)
def test_classes_of_whole_tokens(token: str, first: int, after: int) -> None:
    assert begins(token.encode()) == first
    assert accepts(token.encode()) == after


@pytest.mark.parametrize(
    ("token", "first", "after"),
    [
        (b"\xc3", LETTER, INSIDE),  # most of U+00C0..U+00FF
        (b"\xc2", OTHER, INSIDE),  # most of U+0080..U+00BF
        (b"\xe6\x97", OTHER, INSIDE),  # Han
        (b"\xf0", OTHER, INSIDE),  # most are Han
        (b"\xe0", LETTER, INSIDE),  # the scripts of India outnumber Thai, Lao and Tibetan
        (b"\xf0\x9f\x98", OTHER, INSIDE),  # emoji
        (b"\xa9", INSIDE, LETTER | INSIDE),
        (b"\xa9 (", INSIDE, INSIDE),
        (b" \xd0", SPACE, INSIDE),
        (b"\xff", LETTER, INSIDE),  # never in UTF-8
        (b"\xe6ab", OTHER, LETTER | INSIDE),
        (b"a\x80\x80\x80\x80", LETTER, INSIDE),
        (b"\xed\xa0\x80", LETTER, INSIDE),  # a surrogate
    ],
)
def test_classes_of_cut_characters(token: bytes, first: int, after: int) -> None:
    assert begins(token) == first
    assert accepts(token) == after


def test_the_byte_alphabet_is_the_libraries() -> None:
    """Every byte as one token: a tokenizer without merges spells each byte in its own way."""
    backend = trained("bytes", ["a"], 261)
    text = "".join(map(chr, range(0x80))) + "ÀĀאऀ丟😀"
    decoded = [backend.decode([i]) for i in backend.encode("".join(map(chr, range(0x80)))).ids]
    assert decoded == [chr(i) for i in range(0x80)]
    table = boundaries_of(backend)._table
    for index, byte in zip(backend.encode(text).ids, text.encode(), strict=True):
        assert table[index] == begins(bytes([byte])) | accepts(bytes([byte])) << 4


def definition(model: dict[str, Any], **parts: Any) -> tokenizers.Tokenizer:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return tokenizers.Tokenizer.from_str(
        json.dumps({"version": "1.0", "added_tokens": [], **empty, **parts, "model": model})
    )


def bpe(tokens: list[str], **options: Any) -> dict[str, Any]:
    return {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": [], **options}


def test_marks_of_the_vocabulary_decide() -> None:
    suffix = definition(bpe(["lo", "w</w>", "est</w>", ",</w>"], end_of_word_suffix="</w>"))
    assert starts_of(suffix, [0, 1, 0, 2, 3, 3, 0]) == [True, False, True, False, True, True, True]
    prefix = definition(bpe(["lo", "@@w", ","], continuing_subword_prefix="@@"))
    assert starts_of(prefix, [0, 1, 1, 2, 0, 0]) == [True, False, False, True, True, True]
    whole = definition({"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"})
    assert starts_of(whole, [0, 1, 0]) == [True, True, True]


def test_metaspace_with_byte_fallback() -> None:
    """As in Llama 2: ``▁`` from a normalizer, characters outside the vocabulary as bytes."""
    tokens = ["▁", "▁the", "re", ",", "<0xE2>", "<0x82>", "<0xAC>", "<0xC3>", "<0xA9>", "▁▁", "\n"]
    backend = definition(bpe(tokens, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    assert starts_of(backend, [1, 2, 3, 2]) == [True, False, True, True]
    assert starts_of(backend, [2, 4, 5, 6, 1]) == [True, True, False, False, True]  # re€
    assert starts_of(backend, [2, 7, 8, 2]) == [True, False, False, False]  # reére
    assert starts_of(backend, [0, 2, 0, 3, 9, 2, 10, 2]) == [True, False, True, False, True, True, True, True]


def test_added_tokens_are_spelled_as_they_are() -> None:
    backend = trained("bytes", [PYTHON], 900)
    backend.add_tokens([" return", "é"])
    word, accented = backend.token_to_id(" return"), backend.token_to_id("é")
    letter = backend.encode("q").ids[0]
    assert starts_of(backend, [letter, word, letter, accented, letter]) == [True, True, False, False, False]


def test_a_vocabulary_that_hides_words_is_refused() -> None:
    with pytest.raises(UserError, match=r"BPE tokenizer does not show where words begin .* unit 'token'"):
        boundaries_of(definition(bpe(["a", "b", "ab"])))
