"""Overlap of evaluation text with shards, against sets of tuples of words."""

from __future__ import annotations

import gzip
import json
import random
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from processes_case import family, start_python, survivors, wait_until

from data_pipeline.cli import main
from data_pipeline.errors import UserError
from data_pipeline.prepare.plan import Settings, plan_preparation
from data_pipeline.prepare.run import prepare
from data_pipeline.quality.contamination import EvaluationGrams, _hash, contamination, words_of
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.sources.reading import Reading
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer

WORDS = ["River", "stone", "été", "Straße", "42", "moon", "ΣΊΣΥΦΟΣ", "cloud", "tree", "iron", "x9", "wind"]


def some_text(rng: random.Random, words: int) -> str:
    """Words with punctuation and line ends between them; few words, so that grams repeat."""
    return "".join(rng.choice(WORDS) + rng.choice([" ", ", ", ".\n", " - ", "_", "'"]) for _ in range(words))


def make_shards(folder: Path, texts: list[str], name: str) -> ShardSet:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if not (folder / "tokenizer").exists():
        main(["tokenizer", "--input", str(path), "--vocab-size", "300", "--out", str(folder / "tokenizer")])
    words = ["prepare", "--input", str(path), "--tokenizer", str(folder / "tokenizer"), "--out", str(folder / name)]
    main([*words, "--shard-tokens", "2000"])
    return ShardSet.open(folder / name)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    rng = random.Random(0)
    return [some_text(rng, rng.choice([0, 1, 5, 30, 200])) + "end" for _ in range(80)]


@pytest.fixture(scope="module")
def shards(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    made = make_shards(tmp_path_factory.mktemp("made"), documents, "train")
    assert len(made.manifest.shards) > 3
    return made


@pytest.fixture(scope="module")
def texts(documents: list[str]) -> list[str]:
    """Copies of all lengths, copies with a word changed, copies across two documents, others."""
    rng = random.Random(1)
    out = ["", "River stone", some_text(rng, 7), some_text(rng, 8), some_text(rng, 300), "River " * 40, "new " * 40]
    for document in documents[::3]:
        words = document.split()
        start, length = rng.randrange(len(words)), rng.choice([7, 8, 12, 13, 14, 60])
        out.append(" ".join(words[start : start + length]).upper())
        out.append(" ".join([*words[start : start + 20], "unseen", *words[start + 20 : start + 50]]))
    out.append(documents[4] + " " + documents[5])
    return out


def reference(documents: list[str], texts: list[str], n: int) -> list[tuple[int, int, int]]:
    """Grams, grams found and words of the longest found stretch of each text, by sets of tuples."""

    def split(text: str) -> list[str]:
        return [word for word in re.split(r"[\W_]+", text.casefold()) if word]

    known: set[tuple[str, ...]] = set()
    for document in documents:
        words = split(document)
        for size in range(1, n + 1):
            known |= {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
    out = []
    for text in texts:
        words = split(text)
        size = min(n, len(words)) if len(words) >= min(8, n) else 0
        flags = [tuple(words[i : i + size]) in known for i in range(len(words) - size + 1)] if size else []
        runs = [len(run) for run in "".join("x" if flag else " " for flag in flags).split()]
        out.append((len(flags), sum(flags), max(runs) + size - 1 if runs else 0))
    return out


@pytest.mark.parametrize("n", [1, 3, 8, 9, 13])
def test_every_text_has_the_numbers_that_sets_give(
    n: int, shards: ShardSet, documents: list[str], texts: list[str]
) -> None:
    found = contamination(shards, texts, n)
    expected = reference(documents, texts, n)
    assert list(zip(found.grams.tolist(), found.found.tolist(), found.longest.tolist(), strict=True)) == expected
    assert found.too_short == sum(grams == 0 for grams, _, _ in expected) > 0
    assert found.with_hits == sum(hits > 0 for _, hits, _ in expected) > 5
    shares = [hits / grams if grams else 0.0 for grams, hits, _ in expected]
    assert found.share.tolist() == pytest.approx(shares)
    assert found.at_least(0.5) == sum(share >= 0.5 for share in shares)


def test_batches_and_processes_change_nothing(
    shards: ShardSet, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contamination(shards, texts)
    monkeypatch.setattr("data_pipeline.quality.contamination._BATCH_TOKENS", 150)
    tokens: list[int] = []
    for found in (
        contamination(shards, texts, on_tokens=tokens.append),
        contamination(shards, texts, workers=2, on_tokens=tokens.append),
    ):
        np.testing.assert_array_equal(found.found, expected.found)
        np.testing.assert_array_equal(found.longest, expected.longest)
        assert found.examples == expected.examples
    assert sum(tokens) == 2 * shards.num_tokens


def test_case_punctuation_and_composition_make_no_difference(tmp_path: Path) -> None:
    text = "The café, on Große Straße 5: it was “the best” of times; it was the worst of times."
    shards = make_shards(tmp_path, [text, "nothing of the kind"], "train")
    same = [
        "THE CAFÉ ON GROSSE STRASSE 5 IT WAS THE BEST OF TIMES IT WAS THE WORST OF TIMES",
        "the cafe\u0301 on große straße 5\n\nit_was the-best of times!it was...the worst of times",
    ]
    other = ["The cafe on Große Straße 5: it is the best of times, it is the worst of times, it is over and done."]
    found = contamination(shards, same + other)
    assert found.share.tolist() == [1, 1, 0]
    assert found.longest.tolist() == [18, 18, 0]


LOSSY = (
    "The Café on Große Straße, naïve ÉLAN: 漢字 and かな between 日本語, the €uro ☃ snow; "
    "it was the best of times, it was the WORST of Times, ﬁne ½ x² end."
)


def lossy_tokenizer(kind: str) -> Tokenizer:
    plain = ["the cafe on grosse strasse naive elan and between euro snow it was best of times worst fine x end"] * 9
    if kind != "metaspace":  # no Han, no €, no accents
        return train_tokenizer(plain, 150, "wordpiece", lowercase=kind == "lowercase wordpiece")
    # A BPE without bytes and without a token for the unknown drops characters in silence.
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=80, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator(plain, trainer)
    return Tokenizer(backend)


def prepared(folder: Path, tokenizer: Tokenizer, texts: list[str], **reading: Any) -> ShardSet:
    folder.mkdir()
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    outcome = prepare(plan_preparation([path], tokenizer, Settings(Reading(**reading))), folder / "shards")
    assert outcome.shards is not None
    return outcome.shards


@pytest.mark.parametrize("kind", ["lowercase wordpiece", "wordpiece", "metaspace"])
def test_identical_text_is_found_whatever_the_tokenizer_loses(kind: str, tmp_path: Path) -> None:
    tokenizer = lossy_tokenizer(kind)
    assert words_of(tokenizer.decode(tokenizer.encode(LOSSY))) != words_of(LOSSY)
    others = ["nothing of the kind " * 5, f"The beginning. {LOSSY} The end."]
    shards = prepared(tmp_path / "a", tokenizer, others)
    unlike = "it was the best of times on grosse strasse and it was the end of the cafe between x"
    cased = LOSSY.replace("best of", "BEST of") if kind == "lowercase wordpiece" else LOSSY
    found = contamination(shards, [LOSSY, unlike, cased])
    assert found.grams.min() > 3
    assert found.share.tolist() == [1, 0, 1]
    assert found.examples[0].document == 1


def test_a_normal_form_that_was_asked_for_makes_no_difference(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    shards = prepared(tmp_path / "a", small_tokenizer, ["other", LOSSY], normalize="nfkd")
    assert contamination(shards, [LOSSY]).share.tolist() == [1]


def test_folders_whose_tokenizers_lose_different_things_are_judged_each_by_its_own(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    whole = prepared(tmp_path / "whole", small_tokenizer, ["other words", "filler"])
    lossy = prepared(tmp_path / "lossy", lossy_tokenizer("lowercase wordpiece"), ["other words", "filler", LOSSY])
    exact = prepared(tmp_path / "exact", small_tokenizer, [LOSSY])
    for sets, folder, document in (([whole, lossy], lossy, 2), ([lossy, whole], lossy, 2), ([whole, exact], exact, 0)):
        tokens: list[int] = []
        found = contamination(sets, [LOSSY, "none of it " * 9], on_tokens=tokens.append)
        assert found.share.tolist() == [1, 0]
        assert (found.examples[0].shards, found.examples[0].document) == (folder.path, document)
        assert sum(tokens) == sum(shards.num_tokens for shards in sets)  # each folder is read once


def test_text_with_the_same_words_in_another_order_is_disjoint(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(200)]
    shards = make_shards(tmp_path, [" ".join(words)], "train")
    rng = random.Random(3)
    shuffled = [" ".join(rng.sample(words, 100)) for _ in range(50)]
    swapped = [" ".join([*words[i : i + 5], words[i + 6], words[i + 5], *words[i + 7 : i + 13]]) for i in range(150)]
    found = contamination(shards, shuffled + swapped)
    assert found.with_hits == 0
    assert found.grams.sum() == 50 * 88 + 150
    assert not found.examples


def test_a_gram_does_not_run_from_one_document_into_the_next(tmp_path: Path) -> None:
    first, second = ("a b c d e f g h i j k l m", "n o p q r s t u v w x y z")
    shards = make_shards(tmp_path, [first, second], "train")
    found = contamination(shards, [f"{first} {second}"])
    assert found.grams.tolist() == [14]
    assert found.found.tolist() == [2]
    assert found.longest.tolist() == [13]


def test_examples_say_where_a_text_was_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.quality.contamination._BATCH_TOKENS", 10)  # every document a batch
    planted = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    one = make_shards(tmp_path, [f"some beginning {i}" for i in range(400)], "one")
    two = make_shards(tmp_path, ["other", "text", f"before {planted} after", planted], "two")
    found = contamination([one, two], ["not there at all, " * 9, f"Then: {planted.title()}!"], examples=3)
    (example,) = found.examples
    assert (example.text, example.shards, example.document, example.source) == (1, two.path, 2, "two.jsonl")
    assert example.words == planted
    assert example.share == pytest.approx(2 / 3)
    again = contamination([two, one, two], [planted]).examples[0]
    assert (again.shards, again.document) == (two.path, 2)


def test_nothing_to_judge_reads_nothing(shards: ShardSet) -> None:
    tokens: list[int] = []
    found = contamination(shards, ["too short", ""], on_tokens=tokens.append)
    assert found.too_short == 2
    assert not tokens
    assert len(contamination(shards, []).grams) == 0
    with pytest.raises(ValueError, match="n must be at least 1"):
        contamination(shards, ["a"], 0)


def test_keys_are_the_multilinear_hash_of_the_words() -> None:
    words = [f"w{i}" for i in range(13)]
    grams = EvaluationGrams([" ".join(words)], 13)
    expected = sum((_hash(f"place {i}") | 1) * _hash(word) for i, word in enumerate(words)) % 2**64
    (table,) = grams._tables.values()
    assert table.keys.tolist() == [expected]


def test_words_are_runs_of_letters_and_digits() -> None:
    assert words_of("Don't_stop: 3.5 km/h — ÉTÉ, naïve!") == ["don", "t", "stop", "3", "5", "km", "h", "été", "naïve"]


def test_the_command_counts_by_file(
    shards: ShardSet, documents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = max(documents, key=len)
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"body": text}) + "\n" for text in ["short", "none of these words is there " * 5, long])
    )
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "other words than those of any document " * 3}) + "\n")
    out = tmp_path / "result" / "c.json"
    words = ["contamination", "--shards", shards.path, "--eval", tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    words += ["--text-field", "body", "--out", out, "--workers", 1]
    assert not main([str(word) for word in words])
    said = capsys.readouterr().out
    assert "a.jsonl: 3 texts (1 of them too short to judge)" in said
    assert "1 (50.00%) share a 13-gram with the shards" in said
    assert "1 (50.00%) share at least 50% of theirs" in said
    assert re.search(r"text 3: 100% of its grams, \d+ words in a row, in .*train, document \d+ \(train.jsonl\)", said)
    assert "b.jsonl: 1 texts\n  0 (0.00%) share a 13-gram" in said
    assert re.search(r" KiB of text, searched in [\d.]+ s, [\d.]+ \w+/s", said)
    result = json.loads(out.read_text())
    assert result["shards"] == [{"folder": str(shards.path), "fingerprint": shards.fingerprint}]
    (hit,) = result["files"][0]["hits"]
    assert (hit["text"], hit["share"], hit["found"]) == (3, 1.0, hit["grams"])
    assert (hit["source"], hit["record"]) == ("a.jsonl", 3)
    assert result["files"][0]["examples"][0]["words"] == " ".join(words_of(long))
    assert result["files"][1]["with_hits"] == 0


@pytest.mark.parametrize("packed", [False, True])
def test_hits_name_file_and_line_whatever_lies_between(
    shards: ShardSet, documents: list[str], tmp_path: Path, packed: bool
) -> None:
    """Records without text have no number, so that numbers are no lines."""
    copy = json.dumps({"text": max(documents, key=len)}) + "\n"
    other = json.dumps({"text": "none of these words is there " * 5}) + "\n"
    for name, lines in (("a", ['{"text": null}\n', copy, "\n", other]), ("b", [other, '{"text": ""}\n', "\n", copy])):
        data = "".join(lines).encode()
        (tmp_path / f"{name}.jsonl{'.gz' if packed else ''}").write_bytes(gzip.compress(data) if packed else data)
    out = tmp_path / "c.json"
    words = ["contamination", "--shards", shards.path, "--eval", tmp_path / "*.jsonl*", "--out", out, "--workers", 1]
    assert not main([str(word) for word in words])
    hits = json.loads(out.read_text())["files"][0]["hits"]
    ending = ".gz" if packed else ""
    expected = [(1, f"a.jsonl{ending}", 2), (4, f"b.jsonl{ending}", 4)]
    assert [(hit["text"], hit["source"], hit["record"]) for hit in hits] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval", "none.jsonl"], "none.jsonl does not exist"),
        (["--eval", "empty.jsonl"], "empty.jsonl has no text in 'text'"),
        (["--eval", "a.jsonl", "--n", "0"], "--n 0: a gram has at least 1 word"),
        (["--eval", "a.jsonl", "--threshold", "1.5"], "a share above 0 and at most 1"),
        (["--eval", "a.jsonl", "--workers", "0"], "--workers 0: at least 1"),
        (["--eval", "a.jsonl", "--examples", "-1"], "--examples -1: 0 or more"),
        (["--eval", "a.jsonl", "--out", "."], "is a folder: name the file"),
    ],
)
def test_mistakes_are_told(
    words: list[str], message: str, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a b c"}\n')
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(UserError, match=message):
        main(["contamination", "--shards", str(shards.path), *words])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_nobody_outlives_a_search_that_is_ended(
    shards: ShardSet, texts: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = f"""
import json, time
from data_pipeline.quality.contamination import EvaluationGrams, _search
from data_pipeline.shards.shardset import ShardSet
grams = EvaluationGrams(json.load(open("texts.json")), 13)
if __name__ == "__main__":
    search = _search([(ShardSet.open({str(shards.path)!r}), 0)], grams, 2, lambda tokens: None)
    next(search)  # its processes are there, and soon wait for more
    open("ready", "w").close()
    time.sleep(600)
"""
    top = start_python(code, tmp_path)
    wait_until((tmp_path / "ready").exists, top)
    children = family(top)
    assert len(children) >= 2
    top.send_signal(number)
    top.wait(60)
    assert survivors(children) == []
