"""ListOps: the published grammar, its values, the cache and the published files."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

from data_pipeline.errors import UserError
from eval.tasks.lra import listops
from eval.tasks.lra.listops import Grammar

SHORT = Grammar(max_depth=4, max_args=4, min_symbols=4, max_symbols=20)


def evaluate(source: str) -> int:
    """Another way than the generator's: with a stack, from the text."""
    stack: list[list] = [[]]
    for word in source.split():
        if word.startswith("["):
            stack.append([word])
        elif word == "]":
            operator, *values = stack.pop()
            found = {
                "[MIN": lambda v: sorted(v)[0],
                "[MAX": lambda v: sorted(v)[-1],
                "[MED": lambda v: int(statistics.median(v)),
                "[SM": lambda v: int(str(sum(v))[-1]),
            }[operator](values)
            stack[-1].append(found)
        else:
            stack[-1].append(int(word))
    assert len(stack) == 1
    (value,) = stack[0]
    return value


def published_text(source: str) -> str:
    """As the published generator writes it: every pair in round brackets."""
    stack: list[str] = []
    for word in source.split():
        if word == "]":
            pair = f"( {stack.pop()} ] )"
            stack.append(pair if not stack else f"( {stack.pop()} {pair} )")
        elif word.startswith("[") or not stack:
            stack.append(word)
        else:
            stack.append(f"( {stack.pop()} {word} )")
    (text,) = stack
    return text


@pytest.mark.parametrize(
    ("source", "value", "depth"),
    [
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9, 2),  # Nangia and Bowman 2018, figure 1
        ("[MED 1 2 ]", 1, 1),  # the median 1.5, cut
        ("[MED 9 3 8 ]", 8, 1),
        ("[SM 9 9 [SM 5 5 ] [MED 3 8 9 9 ] ]", 6, 2),
        ("7", 7, 0),
    ],
)
def test_known_values(source: str, value: int, depth: int) -> None:
    tokens = listops.parse(source)
    assert listops.text(tokens) == source
    assert evaluate(source) == value
    assert listops.depth(tokens) == depth
    assert listops.parse(published_text(source)).tolist() == tokens.tolist()
    if depth == 1:
        operator, *digits, _ = source.split()
        assert listops.apply(operator, list(map(int, digits))) == value


def test_published_text_is_that_of_the_published_generator() -> None:
    assert published_text("[MIN 1 2 ]") == "( ( ( [MIN 1 ) 2 ) ] )"
    assert published_text("[MIN [MAX 3 4 ] 2 ]") == "( ( ( [MIN ( ( ( [MAX 3 ) 4 ) ] ) ) 2 ) ] )"


def test_values_of_drawn_expressions_equal_another_evaluator() -> None:
    chunk = listops.generate_chunk(SHORT, 0)
    for tokens, value in list(listops._expressions(chunk))[:400]:
        assert evaluate(listops.text(tokens)) == value
    assert (chunk.lengths.min(), chunk.lengths.max()) == (5, 19)
    assert set(chunk.values.tolist()) == set(range(10))


def test_draws_follow_the_grammar() -> None:
    """Shares of nodes, operators, digits and arguments, and the mean length in closed form."""
    grammar = Grammar(max_depth=3, max_args=6, min_symbols=0, max_symbols=10**6)
    rng = random.Random(5)
    drawn = [listops.draw(rng, grammar) for _ in range(20_000)]
    texts = [listops.text(np.frombuffer(tokens, dtype=np.uint8)).split() for tokens, _ in filter(None, drawn)]
    assert len(texts) == len(drawn)
    # L_D = 1 and L_d = 3/4 + 1/4 (2 + mean arguments * L_{d+1}), symbols below a node at depth d
    expected = 1.0
    for _ in range(grammar.max_depth - 1):
        expected = 0.75 + 0.25 * (2 + 4 * expected)
    lengths = [len(words) for words in texts]
    assert np.mean(lengths) == pytest.approx(expected, abs=4 * np.std(lengths) / np.sqrt(len(lengths)))
    top = np.mean([len(words) > 1 for words in texts])
    assert top == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / len(texts)))
    symbols = [word for words in texts for word in words]
    for group in (listops.SYMBOLS[:10], listops.SYMBOLS[10:14]):
        assert chisquare([symbols.count(symbol) for symbol in group]).pvalue > 1e-3
    flat = [words for words in texts if len(words) > 1 and "[" not in " ".join(words[1:])]
    # All arguments of a flat expression are digits, which has probability (3/4)^n at depth 2.
    weights = np.array([0.75**n for n in range(2, 7)])
    counts = [sum(len(words) - 2 == n for words in flat) for n in range(2, 7)]
    assert chisquare(counts, weights / weights.sum() * len(flat)).pvalue > 1e-3


def length_distribution(grammar: Grammar) -> np.ndarray:
    """P(symbols = n) of a draw for n below ``max_symbols``, exact: p_D(1) = 1 at the greatest depth, and above it
    p_d = 3/4 at 1 and 1/4 the mean over the numbers of arguments k of the k-fold convolution of p_{d+1}, 2 further on.
    """
    size = grammar.max_symbols
    p = np.zeros(size)
    p[1] = 1.0
    for _ in range(grammar.max_depth - 1):
        power, total = p, np.zeros(size)
        for _ in range(2, grammar.max_args + 1):
            power = np.convolve(power, p)[:size]
            total += power / (grammar.max_args - 1)
        p = np.concatenate([np.zeros(2), 0.25 * total[:-2]])
        p[1] += 0.75
    return p


def test_published_bounds_keep_and_spread_as_computed() -> None:
    """8.28% of the draws are kept, of 1035 symbols on average; the commonest value has 17.4% (30,000 draws kept)."""
    exact = length_distribution(Grammar())[501:]
    kept_share, sizes = exact.sum(), np.arange(501, 2000)
    mean = (exact * sizes).sum() / kept_share
    deviation = np.sqrt((exact * (sizes - mean) ** 2).sum() / kept_share)
    assert (kept_share, mean) == (pytest.approx(0.08276, abs=1e-5), pytest.approx(1035.0, abs=0.1))
    rng = random.Random(0)
    kept, draws = [], 0
    while len(kept) < 600:
        draws += 1
        drawn = listops.draw(rng, Grammar())
        if drawn is not None:
            kept.append(drawn)
    assert len(kept) / draws == pytest.approx(kept_share, abs=3 * np.sqrt(kept_share * (1 - kept_share) / draws))
    lengths = [len(tokens) for tokens, _ in kept]
    assert np.mean(lengths) == pytest.approx(mean, abs=3 * deviation / np.sqrt(600))
    shares = np.bincount([value for _, value in kept], minlength=10) / len(kept)
    assert shares.max() == pytest.approx(0.174, abs=3 * np.sqrt(0.174 * 0.826 / len(kept)))


def test_lengths_of_a_small_grammar_have_the_exact_distribution() -> None:
    grammar = Grammar(max_depth=4, max_args=4, min_symbols=3, max_symbols=20)
    exact = length_distribution(grammar)[4:]
    rng = random.Random(1)
    kept = [len(drawn[0]) for _ in range(20_000) if (drawn := listops.draw(rng, grammar)) is not None]
    counts = np.bincount(kept, minlength=20)[4:]
    possible = exact > 1e-12
    assert not counts[~possible].any()
    assert chisquare(counts[possible], exact[possible] / exact.sum() * counts.sum()).pvalue > 1e-3
    assert len(kept) / 20_000 == pytest.approx(exact.sum(), abs=3 * np.sqrt(exact.sum() / 20_000))


def test_splits_are_distinct_cached_and_the_test_split_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = Grammar(max_depth=3, max_args=3, min_symbols=4, max_symbols=30)
    first = listops.generate(grammar, {"test": 50, "dev": 40, "train": 500}, tmp_path)
    files = sorted(tmp_path.rglob("*.npz"))
    assert files
    everything = [tokens.tobytes() for split in first.values() for tokens in split.columns[0]]
    assert len(set(everything)) == len(everything) == 590
    longer = listops.generate(grammar, {"test": 50, "dev": 40, "train": 1500}, tmp_path)
    assert longer["test"].ids() == first["test"].ids()
    assert longer["train"].ids()[:500] == first["train"].ids()
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[: len(whole) // 2])  # half of a file is not read
    assert listops.generate(grammar, {"test": 50}, tmp_path)["test"].ids() == first["test"].ids()
    assert files[0].read_bytes() == whole

    def never(*_: object) -> None:
        raise AssertionError("generated although it is there")

    monkeypatch.setattr(listops, "generate_chunk", never)
    again = listops.generate(grammar, {"test": 50, "dev": 40, "train": 500}, tmp_path)
    assert [split.ids() for split in again.values()] == [split.ids() for split in first.values()]
    assert again["train"].labels.tolist() == first["train"].labels.tolist()
    with pytest.raises(AssertionError, match="although"):  # another seed has another folder
        listops.generate(Grammar(3, 3, 4, 30, seed=1), {"test": 50}, tmp_path)


def test_impossible_grammars_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the grammar has too few expressions"):
        listops.generate(Grammar(max_depth=2, max_args=2, min_symbols=2, max_symbols=6), {"test": 10_000})
    monkeypatch.setattr(listops, "MOST_DRAWS", 2000)
    with pytest.raises(UserError, match=r"only 0 of 2,000 drawn ListOps expressions have more than 50"):
        listops.generate(Grammar(max_depth=2, max_args=2, min_symbols=50, max_symbols=60), {"test": 10})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose --cache-dir"):
        listops.generate(SHORT, {"test": 10}, tmp_path / "file")


def test_published_files(tmp_path: Path) -> None:
    path = tmp_path / "basic_test.tsv"
    path.write_text("Source\tTarget\r\n( ( ( [MIN 1 ) 2 ) ] )\t1\r\n( ( ( [SM 7 ) 8 ) ] )\t5\r\n")
    split = listops.read_tsv(path, None)
    assert [listops.text(tokens) for tokens in split.columns[0]] == ["[MIN 1 2 ]", "[SM 7 8 ]"]
    assert split.labels.tolist() == [1, 5]
    assert len(listops.read_tsv(path, 1)) == 1
    for text, message in (
        ("Source\tTarget\n( ( [MIN 1 ) ] )\t1\n( FIRST 2 )\t1\n", "line 3: 'FIRST' is no symbol"),
        ("Source\tTarget\n[MIN 1 2 ]\tone\n", "line 2: invalid literal"),
        ("Source\tTarget\n[MIN 1 2 ]\t12\n", "line 2: an expression and a digit"),
        ("[MIN 1 2 ]\t1\n", "no column 'Source'; its columns are"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            listops.read_tsv(path, None)
