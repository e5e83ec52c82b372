"""Filters: every statistic against a slow plain reference, every rule on both sides of its threshold, and the specs."""

from __future__ import annotations

import pickle
import random
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.quality.filters import Filters
from data_pipeline.quality.rules import BUNDLES, RULES
from data_pipeline.quality.statistics import (
    ELLIPSES,
    SCRIPTS,
    STOP_WORDS,
    Statistics,
    WordGrams,
    character_classes,
    repeats,
    script_table,
)

ENGLISH = (
    "The river runs to the sea, and the people of the valley live with it. They have fields that need its water. "
    "In spring the floods come early; in summer there is hardly enough. A dam would be of help, but nobody can pay.\n"
    "Last year the council met seven times to talk about money.\n\nNothing was decided. The minutes record that each "
    "of the members left before the end, and that two fell asleep!\n"
)
ALPHABET = "ab é ñ1 9#.…-•\t\n\r\x0b\x1c\x85\u2028\u3000 Ωж漢かカ한ا अे\U00010400\U0001f600\ud800"


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randrange(60))) for _ in range(count)] + ["", " ", "\n\n", "x"]


def reasons(spec: str, *texts: str) -> list[str | None]:
    filters = Filters.parse([spec])
    return [filters.reason(text) for text in texts]


# Statistics against plain Python


def test_word_statistics_equal_those_of_str_split() -> None:
    for text in [*random_texts(500, 0), ENGLISH]:
        words, statistics = text.split(), Statistics(text)
        assert statistics.num_words == len(words)
        assert statistics.mean_word_length == pytest.approx(sum(map(len, words)) / max(1, len(words)))
        with_letter = sum(any(character.isalpha() for character in word) for word in words)
        assert statistics.alphabetic_words == pytest.approx(with_letter / max(1, len(words)))


def test_character_classes_equal_the_methods_of_str_for_every_code_point() -> None:
    everything = "".join(map(chr, range(0x30000)))
    for text in (everything, everything[:128]):
        found = character_classes(text)
        expected = [character.isspace() + 2 * character.isalpha() for character in text]
        assert np.array_equal(found, expected)


def test_line_statistics_equal_a_count_over_stripped_lines() -> None:
    for text in random_texts(500, 1):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        statistics = Statistics(text)
        assert statistics.lines == lines
        total = max(1, len(lines))
        assert statistics.bullet_lines == pytest.approx(sum(line[0] in "-•" for line in lines) / total)
        assert statistics.ellipsis_lines == pytest.approx(sum(line.endswith(ELLIPSES) for line in lines) / total)
        assert statistics.short_lines(5) == pytest.approx(sum(len(line) < 5 for line in lines) / total)


@pytest.mark.parametrize("least", range(9))
def test_stop_words_are_counted_once_each_in_either_case_as_whole_words(least: int) -> None:
    for text in ("The theme, OF (and) of", "to-do: be with that have the of and", "bee tofu offal", ""):
        present = sum(word in re.findall(r"\w+", text.lower()) for word in STOP_WORDS)
        assert Statistics(text).has_stop_words(least) == (present >= least)


def covered_share(words: list[str], starts: list[int], n: int) -> float:
    inside = {start + i for start in starts for i in range(n)}
    return sum(len(words[i]) for i in inside) / max(1, sum(map(len, words)))


def test_repeated_ngrams_equal_brute_force() -> None:
    rng = random.Random(2)
    for _ in range(300):
        words = rng.choices(["a", "bb", "ccc", "dd"][: rng.randint(1, 4)], k=rng.randrange(40))
        grams = WordGrams(words)
        for n in rng.sample(range(1, 8), 7):  # in any order: levels are built when asked for
            tuples = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            again = [i for i, gram in enumerate(tuples) if gram in tuples[:i]]
            assert grams.repeated(n) == pytest.approx(covered_share(words, again, n))
            counts = Counter(tuples)
            most = max(counts.values(), default=0)
            tops = [gram for gram, count in counts.items() if count == most > 1]
            longest = max((len("".join(gram)) for gram in tops), default=0)
            shares = [
                covered_share(words, [i for i, other in enumerate(tuples) if other == gram], n)
                for gram in tops
                if len("".join(gram)) == longest
            ]
            assert any(grams.top(n) == pytest.approx(share) for share in shares or [0.0])


def test_repeats_count_every_occurrence_after_the_first() -> None:
    assert repeats(["ab", "c", "ab", "ab"]) == pytest.approx((2 / 4, 4 / 7))
    assert repeats([]) == (0, 0)


def test_paragraphs_are_parted_by_blank_lines() -> None:
    found = Statistics("one\ntwo\n \t\none\ntwo\n\n\n\nthree\n").repeated_paragraphs
    assert found == pytest.approx((1 / 3, 7 / 19))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_agree_with_the_regex_library(name: str) -> None:
    regex = pytest.importorskip("regex")
    # Left out are modifier letters (Lm), whose names do not begin with their script. A few others remain: KELVIN SIGN.
    letters = [chr(code) for code in range(0x30000) if unicodedata.category(chr(code)) in ("Lu", "Ll", "Lt", "Lo")]
    pattern = regex.compile(rf"\p{{Script={name}}}")
    expected = {letter for letter in letters if pattern.match(letter)}
    table = script_table((name,))
    found = {letter for letter in letters if table[ord(letter)]}
    assert expected
    assert len(expected ^ found) <= 0.004 * len(expected) + 1, sorted(expected ^ found)


def test_c4_sentences_are_those_of_the_lines_that_c4_keeps() -> None:
    def sentences(text: str) -> int:
        return Statistics(text).c4_sentences

    assert sentences("One two three four five. Six! Really?\n") == 3
    assert sentences("She said: 'one two three four.'\n") == 0  # a single quotation mark is no end mark
    assert sentences("She said “one two three four.”\nAll of the five words said") == 1
    assert sentences("Only four words here.\n") == 0
    assert sentences("One two three four and so on...\n") == 0
    assert sentences("One two three four five.[12]\n") == 1
    assert sentences("Please enable Javascript to see this page.\n") == 0
    assert sentences("By using it you accept our Privacy Policy.\n") == 0
    assert sentences("Version 1.2 has been out for long.\n") == 1


# Rules

BOTH_SIDES: dict[str, tuple[str, str, str]] = {
    # filter: (spec, a document that stays, one that is dropped)
    "min-chars": ("min-chars=3", "äöü", "äö"),
    "max-chars": ("max-chars=3", "äöü", "äöüx"),
    "min-words": ("min-words", "w " * 50, "w " * 49),
    "max-words": ("max-words", "w " * 100_000, "w " * 100_001),
    "mean-word-length": ("mean-word-length", "abc 1234567890", "ab cde"),
    "symbols": ("symbols", "#" + " w" * 10, "## " + "w " * 10),
    "bullets": ("bullets", "- a\n" * 9 + "b", "• a\n" * 10 + "\n\n"),
    "ellipsis-lines": ("ellipsis-lines", "a...\n" * 3 + "b\n" * 7, "a…\n" * 4 + "b\n" * 6),
    "alphabetic": ("alphabetic", "a b c d 5", "a b c 4 5"),
    "stop-words": ("stop-words", "The end OF all", "the the the"),
    "duplicate-lines": ("duplicate-lines", "a\n" * 4 + "".join(f"{i}\n" for i in range(6)), "a\n" * 2 + "b\n" * 2),
    "duplicate-paragraphs": ("duplicate-paragraphs", "a\n\nb\n\nc\n\na", "a\n\na"),
    "duplicate-line-chars": ("duplicate-line-chars", "aa\naa\n12345678", "aaaa\naaaa\n12345678"),
    "duplicate-paragraph-chars": ("duplicate-paragraph-chars", "aa\n\naa\n\n12345678", "aaaa\n\naaaa\n\n12345678"),
    "top-2-gram": ("top-2-gram", "a b " * 2 + "123456789 1234567", "a b " * 2 + "1234567 12345678"),
    "top-3-gram": ("top-3-gram", "a b c " * 2 + "1" * 30, "a b c " * 2 + "1" * 20),
    "top-4-gram": ("top-4-gram", "a b c d " * 2 + "1" * 42, "a b c d " * 2 + "1" * 41),
    **{
        f"duplicate-{n}-grams": (
            f"duplicate-{n}-grams",
            " ".join([*map(str, range(n)), "x" * 200, *map(str, range(n))]),
            " ".join([*map(str, range(n)), "x" * 4, *map(str, range(n))]),
        )
        for n in range(5, 11)
    },
    "c4-lorem-ipsum": ("c4-lorem-ipsum", "lorem and ipsum", "Lorem Ipsum dolor"),
    "c4-curly": ("c4-curly", "a } b", "a { b"),
    "c4-min-sentences": ("c4-min-sentences", "This is a sentence here. " * 3, "This is a sentence here. " * 2),
    "terminal-punctuation": ("terminal-punctuation=0.5", "a.\nb", "a.\nb\nc"),
    "short-lines": ("short-lines=0.5", "a\n" + "b" * 30, "a\n" + "b" * 29),
    "script": ("script=greek+latin:0.75", "aβγж 12", "aжжβ 12"),
}


def test_every_rule_has_an_example_of_both_sides() -> None:
    assert set(BOTH_SIDES) == set(RULES)


@pytest.mark.parametrize("name", BOTH_SIDES)
def test_a_rule_drops_beyond_its_threshold_and_keeps_at_it(name: str) -> None:
    spec, stays, dropped = BOTH_SIDES[name]
    assert reasons(spec, stays, dropped) == [None, name]


@pytest.mark.parametrize(("name", "threshold"), [(f"duplicate-{n}-grams", 0.20 - 0.01 * n) for n in range(5, 11)])
def test_ngram_thresholds_are_those_of_table_a1(name: str, threshold: float) -> None:
    assert RULES[name].default == pytest.approx(threshold)


def test_bundles_keep_plain_english_and_drop_what_they_are_for() -> None:
    bundles = "gopher-quality,gopher-repetition,c4,fineweb"
    menu = "Home\nNews\nContact\nSign in\n" * 30
    spam = "cheap watches and the best of cheap watches with free delivery " * 20
    code = "\n".join(f"if (x[{i}] == 0x{i:04x}) {{ f(&y, {i}); }} // -> {i}" for i in range(40))
    assert reasons(bundles, ENGLISH) == [None]
    assert reasons("gopher-quality", menu) == ["stop-words"]
    assert reasons("gopher-repetition", menu, spam) == ["duplicate-lines", "top-2-gram"]
    assert reasons("c4", code) == ["c4-curly"]
    assert reasons("gopher-quality", code) == ["alphabetic"]
    assert reasons("fineweb", menu) == ["terminal-punctuation"]


@pytest.mark.parametrize("text", ["", " \n", "\ud800", "\x00", "...", "#"])
def test_degenerate_documents_have_a_verdict_from_every_rule(text: str) -> None:
    for name in RULES:
        assert reasons(BOTH_SIDES[name][0], text)[0] in (None, name)


# Specs


def test_equal_meaning_gives_equal_specs_and_equal_filters() -> None:
    one = Filters.parse([" min-words = 5e1 ", "symbols=.10,script=latin+greek:.8", "mean-word-length"])
    two = Filters.parse(["min-words", "symbols", "script= Greek+LATIN+greek:0.80", "mean-word-length=3:10.0"])
    assert one == two
    assert one.specs == ("min-words=50", "symbols=0.1", "script=greek+latin:0.8", "mean-word-length=3:10")
    assert Filters.parse(one.specs) == one


def test_bundles_expand_in_their_order_and_later_specs_replace_in_place() -> None:
    filters = Filters.parse(["c4", "gopher-quality,min-words=20", "c4-curly=off", "max-chars=100"])
    names = [spec.partition("=")[0] for spec in filters.specs]
    assert names == ["c4-lorem-ipsum", "c4-min-sentences", *BUNDLES["gopher-quality"], "max-chars"]
    assert "min-words=20" in filters.specs
    assert Filters.parse(["fineweb", "gopher-repetition"]).specs[1] == "duplicate-line-chars=0.2"
    assert Filters.parse(["gopher-repetition", "fineweb"]).specs[1] == "duplicate-line-chars=0.1"
    assert Filters.parse(["c4", "min-words", "c4=off"]).specs == ("min-words=50",)


def test_the_reason_is_the_first_filter_in_order() -> None:
    assert reasons("min-words,min-chars=9", "a") == ["min-words"]
    assert reasons("min-chars=9,min-words", "a") == ["min-chars"]


def test_filters_are_false_only_when_empty_and_survive_pickling() -> None:
    assert not Filters.parse([])
    assert Filters.parse([]).reason("") is None
    filters = Filters.parse([*BUNDLES, "script=han:0.5"])
    assert filters
    assert pickle.loads(pickle.dumps(filters)) == filters


def test_known_lists_every_filter_and_bundle_with_a_default_that_parses() -> None:
    known = Filters.known()
    assert [entry.name.partition("=")[0] for entry in known] == [*RULES, *BUNDLES]
    for entry in known:
        name = entry.name.partition("=")[0]
        if entry.default and name in RULES:
            assert Filters.parse([f"{name}={entry.default}"]) == Filters.parse([name])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("min-word", r"there is no filter 'min-word' \(nearest: min-words\)\. Known: min-chars, .*fineweb"),
        ("zzz", r"there is no filter 'zzz'\. Known"),
        ("", "there is no filter ''"),
        ("min-words=many", "'many' is not a number; write min-words=COUNT or min-words alone"),
        ("min-words=2.5", "not a whole number"),
        ("min-words=-1", "at least 0"),
        ("min-words=", "'' is not a number"),
        ("symbols=nan", "finite"),
        ("max-chars=inf", "finite"),
        ("bullets=1.1", "between 0 and 1"),
        ("min-chars", "has no published threshold, write min-chars=COUNT"),
        ("mean-word-length=3", "LOW:HIGH"),
        ("mean-word-length=10:3", "low end 10 lies above the high end 3"),
        ("c4-curly=1", "takes no value"),
        ("c4=3", "is a bundle and takes no value. It holds c4-lorem-ipsum"),
        ("script=latin", "for example latin:0.8"),
        ("script=latn:0.8", r"there is no script 'latn' \(nearest: latin\)\. Known: arabic"),
        ("script=latin:80", "between 0 and 1"),
        ("min-words=off,gopher-quality", "min-words is not switched on before this"),
        ("min-words=10,max-words=5", "leave no document"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Filters.parse([spec])


def test_one_string_in_place_of_a_sequence_is_an_error_of_the_caller() -> None:
    with pytest.raises(TypeError, match="sequence"):
        Filters.parse("c4")
