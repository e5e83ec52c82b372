"""Duplicates: exact against a dict, near against brute-force Jaccard, and nothing depends on units or memory."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.quality import minhash
from data_pipeline.quality.duplicates import Dedup, Duplicates, duplicate_groups, find_duplicates
from data_pipeline.quality.signatures import SignatureFiles

EXACT = Dedup("exact")
NEAR = Dedup("near")
needs_datasketch = pytest.mark.skipif(find_spec("datasketch") is None, reason="datasketch is not installed")


def save(folder: Path, texts: Sequence[str], dedup: Dedup, cuts: Sequence[int] = ()) -> list[Path]:
    """Sign ``texts`` in units that end at ``cuts``, one file each."""
    folder.mkdir(exist_ok=True)
    paths = []
    for unit, (start, end) in enumerate(pairwise([0, *cuts, len(texts)])):
        paths.append(folder / f"{unit}.npy")
        np.save(paths[-1], dedup.sign(texts[start:end]))
    return paths


def even_cuts(count: int, units: int) -> list[int]:
    return [count * unit // units for unit in range(1, units)]


def dropped(found: Duplicates) -> list[bool]:
    return [bool(drop) for unit in found.drop for drop in unit]


def repetitive_corpus(count: int, kinds: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"document {rng.randrange(kinds)}" for _ in range(count)]


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    n = min(n, len(words))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(one: str, two: str) -> float:
    a, b = shingles(one), shingles(two)
    return len(a & b) / len(a | b)


def similar_pair(rng: random.Random, changes: int, words: int = 400) -> tuple[str, str]:
    """Two documents of ``words`` random words that differ in the middle words of ``changes`` stretches."""
    first = [f"w{rng.randrange(10**6)}" for _ in range(words)]
    second = first.copy()
    for i in range(changes):
        second[(2 * i + 1) * words // (2 * changes)] = f"x{rng.randrange(10**6)}"
    return " ".join(first), " ".join(second)


# Exact


def test_exact_keeps_the_first_of_equal_texts_as_a_dict_would(tmp_path: Path) -> None:
    texts = repetitive_corpus(2000, 700)
    found = duplicate_groups(save(tmp_path, texts, EXACT, even_cuts(2000, 5)), EXACT)
    first: dict[str, int] = {}
    expected = [first.setdefault(text, number) for number, text in enumerate(texts)]
    assert found.kept.tolist() == expected
    assert found.dropped == found.exact_copies == 2000 - len(first)
    sizes = sorted((size for size in np.bincount(expected).tolist() if size > 1), reverse=True)
    assert found.group_sizes().tolist() == sizes


def test_exact_is_exact(tmp_path: Path) -> None:
    texts = ["a", "A", "a ", "a\n", "a", "é", "e\u0301", "\ud800", "\ud801", "", " "]
    [drop] = find_duplicates(save(tmp_path, texts, EXACT), EXACT)
    assert np.flatnonzero(drop).tolist() == [4]


def test_equal_first_halves_of_hashes_are_no_duplicates(tmp_path: Path) -> None:
    rows = np.array([[7, 1], [7, 2], [7, 1], [8, 1], [7, 2], [1 << 63, 0], [1 << 63, 0]], dtype=np.uint64)
    np.save(tmp_path / "0.npy", rows)
    for max_bytes in (1, 1 << 30):
        found = duplicate_groups([tmp_path / "0.npy"], EXACT, max_bytes)
        assert found.kept.tolist() == [0, 1, 0, 3, 1, 5, 5]


@pytest.mark.parametrize("units", [1, 2, 7])
@pytest.mark.parametrize("max_bytes", [1, 1000, 20_000, 64 * 3000, 1 << 30])
def test_neither_units_nor_memory_change_the_result(tmp_path: Path, units: int, max_bytes: int) -> None:
    texts = repetitive_corpus(300, 100, seed=1)
    found = duplicate_groups(save(tmp_path, texts, EXACT, even_cuts(300, units)), EXACT, max_bytes)
    assert dropped(found) == [text in texts[:number] for number, text in enumerate(texts)]
    assert [len(unit) for unit in found.drop] == list(found.files.counts)


def test_units_without_documents_have_empty_answers(tmp_path: Path) -> None:
    paths = save(tmp_path, ["a", "b", "a"], EXACT, [0, 2, 2, 3])
    drops = find_duplicates(paths, EXACT)
    assert [drop.tolist() for drop in drops] == [[], [False, False], [], [True], []]
    assert [drop.tolist() for drop in find_duplicates(paths[:1], EXACT)] == [[]]
    assert find_duplicates([], EXACT) == []


def test_examples_name_unit_and_row_of_dropped_and_kept(tmp_path: Path) -> None:
    found = duplicate_groups(save(tmp_path, ["a", "b", "c", "b", "a", "a"], EXACT, [2, 2]), EXACT)
    assert found.examples(10) == [((2, 1), (0, 1)), ((2, 2), (0, 0)), ((2, 3), (0, 0))]
    assert found.examples(1) == [((2, 1), (0, 1))]
    assert found.examples(0) == []


# Near


@needs_datasketch
def test_signatures_estimate_the_jaccard_index_of_word_ngrams() -> None:
    rng = random.Random(3)
    errors, deviations = [], []
    for changes in range(1, 41):
        one, two = similar_pair(rng, changes)
        values = minhash.sign([one, two], 128, 5)
        true = jaccard(one, two)
        errors.append(float((values[0] == values[1]).mean()) - true)
        deviations.append((true * (1 - true) / 128) ** 0.5)
    assert abs(sum(errors)) < 4 * float(np.linalg.norm(deviations))  # no bias over 40 independent pairs
    assert max(abs(error) / deviation for error, deviation in zip(errors, deviations, strict=True)) < 4.5


@needs_datasketch
def test_signatures_are_those_of_datasketch() -> None:
    from datasketch import MinHash

    text = "  ".join(f"Word{i}, and!" for i in range(900))  # more than one batch of n-grams
    expected = MinHash(num_perm=64, seed=minhash.SEED, scheme="affine32", hashfunc=int)
    for value in minhash.ngram_hashes(text, 3).tolist():
        expected.update(value)
    assert np.array_equal(minhash.sign([text], 64, 3)[0], expected.hashvalues)


def test_equal_ngrams_have_equal_hashes_and_different_ones_different() -> None:
    words = random.Random(4).choices("abcdef", k=3000)
    hashes = minhash.ngram_hashes(" ".join(words), 3).tolist()
    by_gram: dict[tuple[str, ...], set[int]] = {}
    for i, value in enumerate(hashes):
        by_gram.setdefault(tuple(words[i : i + 3]), set()).add(value)
    assert len(hashes) == 2998
    assert all(len(values) == 1 for values in by_gram.values())
    assert len(set(hashes)) == len(by_gram) == 6**3
    assert 0 <= min(hashes) <= max(hashes) < 1 << 32


@needs_datasketch
def test_near_finds_the_similar_and_leaves_the_different(tmp_path: Path) -> None:
    rng = random.Random(5)
    pairs = [similar_pair(rng, changes) for changes in [2] * 150 + [46] * 150]
    for one, two in pairs[:150]:
        assert 0.94 < jaccard(one, two) < 0.96
    for one, two in pairs[150:]:
        assert 0.25 < jaccard(one, two) < 0.35
    texts = [one for one, _ in pairs] + [two for _, two in pairs]
    found = duplicate_groups(save(tmp_path, texts, NEAR, even_cuts(600, 3)), NEAR)
    # 1 - (1 - .95^8)^16 misses one in 10^7; the estimate would have to err by 7 standard deviations
    assert found.kept.tolist() == [*range(300), *range(150), *range(450, 600)]
    assert found.exact_copies == 0


@needs_datasketch
def test_near_decides_by_estimated_similarity_alone(tmp_path: Path) -> None:
    """Of pairs of every similarity those are dropped whose signatures agree enough, but for the few that bands miss."""
    rng = random.Random(6)
    pairs = [similar_pair(rng, 1 + number % 25) for number in range(300)]
    texts = [text for pair in pairs for text in pair]
    drop = np.concatenate(find_duplicates(save(tmp_path, texts, NEAR), NEAR))
    values = minhash.sign(texts, 128, 5)
    estimates = (values[::2] == values[1::2]).mean(axis=1)
    bands, rows = minhash.bands(0.8, 128)
    agrees = values.reshape(300, 2, 128)[:, :, : bands * rows].reshape(300, 2, bands, rows)
    candidates = (agrees[:, 0] == agrees[:, 1]).all(axis=2).any(axis=1)
    assert not drop[::2].any()
    assert np.array_equal(drop[1::2], candidates & (estimates >= 0.8))
    assert candidates[estimates >= 0.8].mean() > 0.95


@needs_datasketch
@pytest.mark.parametrize("units", [1, 2, 7])
def test_near_depends_on_neither_units_nor_memory(tmp_path: Path, units: int) -> None:
    rng = random.Random(7)
    texts = [text for number in range(60) for text in similar_pair(rng, 1 + number % 20, words=100)]
    texts += texts[::3]
    rng.shuffle(texts)
    expected = duplicate_groups(save(tmp_path / "whole", texts, NEAR), NEAR).kept
    assert 40 < np.count_nonzero(expected != np.arange(len(texts))) < 120
    paths = save(tmp_path / "cut", texts, NEAR, even_cuts(len(texts), units))
    for max_bytes in (1, 3000, 64 * 160 * 3, 1 << 30):
        assert duplicate_groups(paths, NEAR, max_bytes).kept.tolist() == expected.tolist()


@needs_datasketch
def test_similarity_is_passed_on_and_the_first_document_stays(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(300)]
    chain = []
    for step in range(4):  # each like the one before it, the last not like the first
        chain.append(" ".join(words))
        words[step * 70 : step * 70 + 20] = [f"x{step}{i}" for i in range(20)]
    other = similar_pair(random.Random(8), 1)[0]
    texts = [chain[3], other, chain[1], chain[0], chain[2], other + "!", chain[3]]
    assert jaccard(chain[0], chain[3]) < 0.7
    found = duplicate_groups(save(tmp_path, texts, NEAR), NEAR)
    assert found.kept.tolist() == [0, 1, 0, 0, 0, 1, 0]
    assert found.exact_copies == 1  # other and other! have equal n-grams but are not the same text
    assert found.group_sizes().tolist() == [5, 2]


@needs_datasketch
def test_short_documents_are_alike_only_with_all_their_words_alike(tmp_path: Path) -> None:
    texts = ["a b c", "A, b; c.", "a b", "a b c d", "!!!", "???", "!!!", ""]
    [drop] = find_duplicates(save(tmp_path, texts, NEAR), NEAR)
    assert np.flatnonzero(drop).tolist() == [1, 6]


@needs_datasketch
def test_near_of_an_empty_corpus(tmp_path: Path) -> None:
    assert [drop.tolist() for drop in find_duplicates(save(tmp_path, [], NEAR), NEAR)] == [[]]
    assert find_duplicates([], NEAR) == []


@needs_datasketch
def test_signatures_are_equal_in_another_process() -> None:
    text = "Some words, to be signed: ünïcode as well."
    code = (
        "from data_pipeline.quality.duplicates import Dedup;"
        f"print(Dedup('near').sign([{text!r}, 'b']).tolist(), Dedup('exact').sign([{text!r}]).tolist())"
    )
    environment = {"PYTHONHASHSEED": "7", "PATH": ""}
    root = Path(__file__).parents[3]
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    expected = f"{NEAR.sign([text, 'b']).tolist()} {EXACT.sign([text]).tolist()}\n"
    assert found.stdout == expected


def test_the_exact_signature_is_xxh3_128_high_half_first() -> None:
    import xxhash

    [[high, low]] = EXACT.sign(["é"]).tolist()
    assert (high << 64) + low == xxhash.xxh3_128_intdigest("é".encode())


# Specs and rejection


@needs_datasketch
def test_equal_settings_give_equal_specs() -> None:
    assert Dedup.parse(" exact ").spec == "exact"
    full = "near:threshold=0.8,permutations=128,ngram=5"
    assert Dedup.parse("near").spec == Dedup.parse("near:").spec == Dedup.parse(full).spec == full
    assert Dedup.parse("near: ngram=5, threshold=.80") == Dedup.parse("near") == NEAR
    other = Dedup.parse("near:permutations=64,threshold=0.7,ngram=3")
    assert other == Dedup("near", 0.7, 64, 3) == Dedup.parse(other.spec)
    assert (EXACT.width, NEAR.width, other.width) == (2, 66, 34)
    assert [dedup.sign([]).shape for dedup in (EXACT, NEAR, other)] == [(0, 2), (0, 66), (0, 34)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "write exact, near, or near:"),
        ("fuzzy", "write exact, near, or near:"),
        ("exact:", "write exact"),
        ("near:treshold=0.8", r"no setting 'treshold' \(nearest: threshold\)\. Known: threshold, permutations, ngram"),
        ("near:0.8", "no setting '0.8'"),
        ("near:threshold=1", "between 0 and 1"),
        ("near:threshold=x", "between 0 and 1"),
        ("near:threshold=nan", "between 0 and 1"),
        ("near:permutations=8", "from 16 to 1024, got '8'"),
        ("near:permutations=33", "even"),
        ("near:permutations=", "from 16 to 1024"),
        ("near:ngram=0", "from 1 to 100"),
        ("near:ngram=5.0", "whole number"),
        ("near:ngram=5,ngram=6", "ngram is given twice"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Dedup.parse(spec)


def test_near_without_datasketch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match=r"pip install 'nystrom-pretrain\[dedup\]'"):
        Dedup.parse("near")


def test_damaged_and_foreign_signature_files_are_refused(tmp_path: Path) -> None:
    good = save(tmp_path, ["a", "b"], EXACT)[0]
    torn = tmp_path / "torn.npy"
    torn.write_bytes(good.read_bytes()[:-1])
    empty = tmp_path / "empty.npy"
    empty.write_bytes(b"")
    other = tmp_path / "other.npy"
    np.save(other, np.zeros((3, 66), dtype=np.uint64))
    floats = tmp_path / "floats.npy"
    np.save(floats, np.zeros((3, 2)))
    for path in (torn, empty, tmp_path / "absent.npy"):
        with pytest.raises(UserError, match=f"{path.name}: not a whole signature file"):
            find_duplicates([good, path], EXACT)
    for path in (other, floats):
        with pytest.raises(UserError, match=f"{path.name}: signatures of other settings"):
            find_duplicates([good, path], EXACT)
    with pytest.raises(ValueError, match="max_bytes"):
        find_duplicates([good], EXACT, max_bytes=0)


def test_signature_files_read_as_one_array(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    arrays = [rng.integers(0, 9, (rows, 3), dtype=np.uint64) for rows in (3, 0, 5, 1, 0)]
    paths = [tmp_path / f"{unit}.npy" for unit in range(5)]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array)
    files, whole = SignatureFiles(paths, 3), np.concatenate(arrays)
    for rows in (1, 2, 100):
        blocks = list(files.blocks(rows))
        assert max(len(block) for _, block in blocks) <= rows
        assert np.array_equal(np.concatenate([block for _, block in blocks]), whole)
        assert all(np.array_equal(whole[start : start + len(block)], block) for start, block in blocks)
    numbers = np.array([8, 0, 3, 3, 7])
    assert np.array_equal(files.gather(numbers), whole[numbers])
    assert [files.locate(number) for number in (0, 2, 3, 7, 8)] == [(0, 0), (0, 2), (2, 0), (2, 4), (3, 0)]
