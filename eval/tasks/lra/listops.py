"""ListOps: nested operations on lists of digits (Nangia and Bowman 2018, arXiv 1804.06028), as in Long Range Arena.

The grammar is that of the published generator (google-research/long-range-arena, lra_benchmarks/data/listops.py). A
node above ``max_depth`` is an expression with probability 1/4. It has 2 to ``max_args`` arguments under one of MIN,
MAX, MED (the median, cut to an integer) and SM (the sum modulo 10), all equally likely. Any other node is a digit, all
equally likely. Expressions of more than ``min_symbols`` and fewer than ``max_symbols`` symbols are kept, none twice.

Symbols are the tokens: ten digits, the four operators with their opening bracket, and the closing bracket. The round
brackets of the published files only show how their generator nests pairs; LRA's input pipeline drops them too
(lra_benchmarks/listops/input_pipeline.py). Its first release also lost the closing brackets to a tokenizer of words,
which leaves expressions ambiguous; the later one keeps them (as ``X``), and so does this.

The draws are cut into chunks with a random state of their own, kept on disk as soon as they are done.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from data_pipeline.sources.reading import Quotes
from data_pipeline.sources.records import read_records
from eval.shared.progress import Progress
from eval.tasks.lra.examples import Split

SYMBOLS = (*map(str, range(10)), "[MIN", "[MAX", "[MED", "[SM", "]")
"""The vocabulary, in the order of the token ids."""
CLOSE = SYMBOLS.index("]")
FIRST_OPERATOR = 10
EXPRESSION_SHARE = 0.25
CHUNK = 2000
# A grammar that keeps none of so many draws is not worth waiting for: the published one keeps one of twelve.
MOST_DRAWS = 1_000_000


@dataclass(frozen=True)
class Grammar:
    """Which expressions there are, and the seed of the draws."""

    max_depth: int = 10
    max_args: int = 10
    min_symbols: int = 500
    max_symbols: int = 2000
    seed: int = 0

    def hash(self) -> str:
        """Names the folder of the chunks."""
        text = json.dumps(asdict(self) | {"chunk": CHUNK, "version": 1}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Chunk:
    """Kept expressions end to end (ids, uint8), their lengths, their values, and how many draws it took."""

    tokens: np.ndarray
    lengths: np.ndarray
    values: np.ndarray
    draws: int


class _TooLong(Exception):
    """An expression has reached the length at which it is thrown away."""


def draw(rng: random.Random, grammar: Grammar) -> tuple[bytes, int] | None:
    """One draw of the grammar, as (token ids, value), or None if its length is not wanted.

    It is given up as soon as it is too long: what is kept is distributed as if it had been finished.
    """
    tokens = bytearray()
    try:
        value = _node(rng.random, 1, grammar, tokens)
    except _TooLong:
        return None
    return (bytes(tokens), value) if grammar.min_symbols < len(tokens) < grammar.max_symbols else None


def _node(uniform: Callable[[], float], depth: int, grammar: Grammar, tokens: bytearray) -> int:
    if len(tokens) >= grammar.max_symbols:
        raise _TooLong
    if depth >= grammar.max_depth or uniform() > EXPRESSION_SHARE:
        digit = int(uniform() * 10)
        tokens.append(digit)
        return digit
    place = len(tokens)
    operator = int(uniform() * 4)
    tokens.append(FIRST_OPERATOR + operator)
    count = 2 + int(uniform() * (grammar.max_args - 1))
    values = [_node(uniform, depth + 1, grammar, tokens) for _ in range(count)]
    tokens.append(CLOSE)
    return apply(SYMBOLS[tokens[place]], values)


def apply(operator: str, values: list[int]) -> int:
    """The value of an operator on digits."""
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[SM":
        return sum(values) % 10
    ordered, n = sorted(values), len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) // 2


def depth(tokens: np.ndarray) -> int:
    """How deep operators are nested; 0 for a digit."""
    steps = (tokens >= FIRST_OPERATOR).astype(np.int64)
    steps[tokens == CLOSE] = -1
    return int(np.cumsum(steps).max(initial=0))


def text(tokens: np.ndarray) -> str:
    """The expression as it is written, without round brackets."""
    return " ".join(SYMBOLS[int(token)] for token in tokens)


def parse(source: str) -> np.ndarray:
    """Token ids of an expression as written in the published files; raises ValueError for another symbol."""
    return np.array([_IDS[word] for word in source.split() if word not in ("(", ")")], dtype=np.uint8)


class _Ids(dict[str, int]):
    def __missing__(self, word: str) -> int:
        raise ValueError(f"'{word}' is no symbol of ListOps")


_IDS = _Ids((symbol, number) for number, symbol in enumerate(SYMBOLS))


def generate_chunk(grammar: Grammar, number: int) -> Chunk:
    """Draw until :data:`CHUNK` expressions are kept; the same for the same grammar and number."""
    rng = random.Random(f"listops {grammar.seed} {number}")
    kept: list[tuple[bytes, int]] = []
    draws = 0
    while len(kept) < CHUNK:
        draws += 1
        drawn = draw(rng, grammar)
        if drawn is not None:
            kept.append(drawn)
        elif draws >= MOST_DRAWS and len(kept) < CHUNK // 100:
            raise UserError(
                f"only {len(kept)} of {draws:,} drawn ListOps expressions have more than {grammar.min_symbols} and "
                f"fewer than {grammar.max_symbols} symbols: widen --min-symbols and --max-symbols, or change "
                "--max-depth or --max-args"
            )
    tokens = np.frombuffer(b"".join(expression for expression, _ in kept), dtype=np.uint8)
    lengths = np.array([len(expression) for expression, _ in kept], dtype=np.int64)
    return Chunk(tokens, lengths, np.array([value for _, value in kept], dtype=np.int64), draws)


def obtain_chunk(grammar: Grammar, number: int, cache: Path | None) -> Chunk:
    """The chunk from the cache, or generated and put there."""
    path = cache / f"listops-{grammar.hash()}" / f"{number:05d}.npz" if cache is not None else None
    if path is not None and path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                return Chunk(file["tokens"], file["lengths"], file["values"], int(file["draws"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            pass  # damaged: written again
    chunk = generate_chunk(grammar, number)
    if path is not None:
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, tokens=chunk.tokens, lengths=chunk.lengths, values=chunk.values, draws=np.int64(chunk.draws)
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, buffer.getvalue(), shared=True)
        except OSError as error:
            raise UserError(f"ListOps cannot be kept in {path.parent} ({error}): choose --cache-dir") from None
    return chunk


def generate(grammar: Grammar, sizes: dict[str, int], cache: Path | None = None) -> dict[str, Split]:
    """Splits of distinct expressions, filled in the order of ``sizes``, of which all draws are alike.

    100,000 of the published lengths take about a minute on one core. Raises :class:`UserError` where the grammar has
    too few different expressions.
    """
    total = sum(sizes.values())
    expressions: list[np.ndarray] = []
    values: list[int] = []
    seen: set[bytes] = set()
    with Progress(total, "ListOps", "expression") as bar:
        number = 0
        while len(expressions) < total:
            fresh = len(expressions)
            for tokens, value in _expressions(obtain_chunk(grammar, number, cache)):
                if len(expressions) < total and tokens.tobytes() not in seen:
                    seen.add(tokens.tobytes())
                    expressions.append(tokens)
                    values.append(value)
            fresh = len(expressions) - fresh
            if len(expressions) < total and fresh < CHUNK // 100:
                raise UserError(
                    f"the grammar has too few expressions: {fresh} of {CHUNK} drawn after {len(seen):,} were new, "
                    f"{total:,} are wanted; allow longer ones (--max-symbols) or ask for fewer (--train-size)"
                )
            bar.update(fresh)
            number += 1
    splits: dict[str, Split] = {}
    start = 0
    for name, size in sizes.items():
        stop = start + size
        splits[name] = Split((expressions[start:stop],), np.array(values[start:stop], dtype=np.int64))
        start = stop
    return splits


def _expressions(chunk: Chunk) -> Iterator[tuple[np.ndarray, int]]:
    ends = np.cumsum(chunk.lengths)
    for start, end, value in zip(ends - chunk.lengths, ends, chunk.values.tolist(), strict=True):
        yield chunk.tokens[start:end], value


def read_tsv(path: Path, limit: int | None, quotes: Quotes = "auto") -> Split:
    """A published file (columns Source and Target); raises :class:`UserError` naming file and line."""
    expressions: list[np.ndarray] = []
    values: list[int] = []
    for record, place in islice(read_records(path, ("Source", "Target"), ("",) * 2, quotes=quotes), limit):
        try:
            expressions.append(parse(record["Source"]))
            values.append(int(record["Target"]))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, {place}: {error}") from None
        if not 0 <= values[-1] <= 9 or not len(expressions[-1]):
            raise UserError(f"{path}, {place}: an expression and a digit are expected")
    return Split((expressions,), np.array(values, dtype=np.int64))
