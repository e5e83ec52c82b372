"""Training WordPiece and Unigram."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "runs",
    "through",
    "forests",
    "till",
    "rivers",
    "end",
    "Élan",
    "naïve",
]
DOCUMENTS = [" ".join(WORDS[i % 19 : i % 19 + 6] + WORDS[: i % 11]) + ".\n\tend\n" for i in range(200)]
MODELS = ("bpe", "wordpiece", "unigram")
# Raw text with the names of special tokens, alone and inside words, and of Unigram's bytes.
TRAPS = ["<mask>", "a<mask>b", "</s>", "x</s> <s>y", "<pad><pad>", "the<mask>fox <unk>", "<0x41>", "▁</s>", " <mask> "]


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {model: train_tokenizer(DOCUMENTS, 420, model) for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_special_tokens_have_the_first_ids(trained: dict[str, Tokenizer], model: str) -> None:
    t = trained[model]
    assert (t.bos_id, t.pad_id, t.eos_id, t.unk_id, t.mask_id) == t.special_ids == (0, 1, 2, 3, 4)
    assert t.vocab_size <= 420


@pytest.mark.parametrize("model", MODELS)
def test_raw_text_never_becomes_a_special_token(trained: dict[str, Tokenizer], model: str, tmp_path: Path) -> None:
    # Also trained on text that is full of the names, which a trainer could take for words.
    greedy = train_tokenizer(DOCUMENTS + ["<mask> a<mask>b </s>"] * 500, 420, model)
    for t in (trained[model], greedy):
        t.save(tmp_path)
        for tokenizer in (t, Tokenizer.load(tmp_path)):
            for text, ids in zip(TRAPS, tokenizer.encode_batch(TRAPS), strict=True):
                assert ids == tokenizer.encode(text)
                # A character that the alphabet lacks is rightly unknown to WordPiece.
                assert not set(ids) & (set(t.special_ids) - ({t.unk_id} if model == "wordpiece" else set())), text


@pytest.mark.parametrize(
    "text", ["the fox", " the  fox ", "a\n\nb\r\n\tc ", "é 漢字 😀\x00", "", " ", "\n", *TRAPS[:7]]
)
def test_unigram_gives_any_text_back(trained: dict[str, Tokenizer], text: str) -> None:
    t = trained["unigram"]
    assert t.decode(t.encode(text)) == text
    assert t.unk_id not in t.encode(text)


def test_unigram_takes_its_sign_for_a_space_for_one(trained: dict[str, Tokenizer]) -> None:
    t = trained["unigram"]
    assert t.decode(t.encode("a▁b")) == "a b"


def test_unigram_knows_all_bytes(trained: dict[str, Tokenizer]) -> None:
    t = trained["unigram"]
    text = "".join(map(chr, [*range(0x2000), 0x10FFFF, 0xE0001]))
    assert t.decode(t.encode(text)) == text


def test_pieces_of_words_are_learned(trained: dict[str, Tokenizer]) -> None:
    for t in trained.values():
        assert len(t.encode(" the quick")) <= 3


def test_wordpiece_gives_the_words_back(trained: dict[str, Tokenizer]) -> None:
    t = trained["wordpiece"]
    assert t.decode(t.encode("the  quick\n\nfoxes. Élan")) == "the quick foxes. Élan"
    assert t.encode("the 漢 fox") == [*t.encode("the"), 3, *t.encode("fox")]


def test_wordpiece_splits_words_by_the_longest_piece_first(trained: dict[str, Tokenizer]) -> None:
    """Against the algorithm of BERT's paper code: greedy, longest match, from the left."""
    t = trained["wordpiece"]
    vocabulary = t._backend.get_vocab()
    for word in ("forestslazy", "quickrunthe", "rivers", "xthe", "dogs"):
        expected, start = [], 0
        while start < len(word):
            ends = range(len(word), start, -1)
            pieces = [(end, ("##" if start else "") + word[start:end]) for end in ends]
            end, piece = next(((e, p) for e, p in pieces if p in vocabulary), (0, ""))
            if not piece:
                expected, start = [3], len(word)
                break
            expected.append(vocabulary[piece])
            start = end
        assert t.encode(word) == expected


def test_lowercase_removes_case_and_accents() -> None:
    lower = train_tokenizer(DOCUMENTS, 300, "wordpiece", lowercase=True)
    assert lower.encode("THE Fox Élan") == lower.encode("the fox elan")
    assert lower.decode(lower.encode("Naïve")) == "naive"
    kept = train_tokenizer(DOCUMENTS, 300, "wordpiece")
    assert kept.encode("Élan") != kept.encode("elan")


def test_a_large_alphabet_leaves_room_for_words() -> None:
    documents = [*DOCUMENTS, *(" ".join(chr(0x4E00 + 37 * i + j) for j in range(37)) for i in range(60))]
    for model in ("wordpiece", "unigram"):
        t = train_tokenizer(documents, 500, model)
        assert t.vocab_size <= 500
        assert len(t.encode("the quick")) <= 3
    assert t.decode(t.encode("the \u4e01 \u5500")) == "the \u4e01 \u5500"


def test_training_does_not_depend_on_the_process_or_its_threads(trained: dict[str, Tokenizer]) -> None:
    """The library's trainers number characters and add scores in the order of a hash table with a random seed."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_tokenizer_models import DOCUMENTS, MODELS\n"
        "from data_pipeline.tokenization.training import train_tokenizer\n"
        "print(*(train_tokenizer(DOCUMENTS, 420, model).hash for model in MODELS))"
    )
    for threads in ("1", "4"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            env={"RAYON_NUM_THREADS": threads, "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [trained[model].hash for model in MODELS]


def test_refusals() -> None:
    with pytest.raises(UserError, match="choose one of bpe, wordpiece, unigram"):
        train_tokenizer(DOCUMENTS, 1000, "word")
    with pytest.raises(UserError, match="lowercase is for wordpiece; bpe keeps"):
        train_tokenizer(DOCUMENTS, 1000, "bpe", lowercase=True)
    with pytest.raises(UserError, match="unigram needs the 256 bytes and 5 special tokens and 104 letters"):
        train_tokenizer(DOCUMENTS, 300, "unigram")
    with pytest.raises(UserError, match=r"wordpiece needs the 5 special tokens and 104 letters .*, 109 in all"):
        train_tokenizer(DOCUMENTS, 108, "wordpiece")
    for model in MODELS:
        with pytest.raises(UserError, match="no documents"):
            train_tokenizer([], 400, model)
        with (
            pytest.raises(UserError, match="no documents")
            if model == "bpe"
            else pytest.raises(ValueError, match="twice")
        ):
            train_tokenizer(iter([]), 400, model)
