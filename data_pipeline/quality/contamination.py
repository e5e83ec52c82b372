"""Overlap of evaluation text with the training shards, by 13-grams of words.

After Brown et al. 2020 ("Language Models are Few-Shot Learners", section 4 and appendix C): words are compared without
case, punctuation and white space. A text of fewer than 13 words counts as one gram of all its words. Texts below 8
words are not judged, for they give too many false positives. Here a word is a run of letters and digits. Scripts that
do not part words by spaces make long words, so that only whole phrases are found in them.

A tokenizer may lose some of the text: case and accents, rare characters that become ``[UNK]``, the space around Chinese
ones. Shards hold what is left, so the evaluation texts are compared as the same tokenizer gives them back.

The evaluation texts are held in memory, the shards are streamed: each document is decoded, and its grams are looked
up among those of the evaluation texts. A gram stands for its words by a 64-bit hash. With 10^6 evaluation grams and
10^12 grams of training text, chance makes 10^18 / 2^64 = 0.05 pairs equal. In fact it makes fewer: a gram with a word
that no evaluation text has is set aside before hashing.
"""

from __future__ import annotations

import re
import signal
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.processes import die_with_parent
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.sources.reading import Reading
from data_pipeline.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer

DEFAULT_N = 13
SHORTEST = 8  # words; shorter texts are not judged
_BATCH_TOKENS = 1 << 18  # decoded at a time, about 1 MB of text
_BATCH_TEXTS = 1024  # encoded and decoded at a time
_WORD = re.compile(r"[^\W_]+")
_NONE = np.iinfo(np.int64).max


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, without case (``str.casefold``) and in Unicode's composed form."""
    return _WORD.findall(unicodedata.normalize("NFC", text.casefold()))


@dataclass(frozen=True)
class Example:
    """A stretch of an evaluation text that stands in the shards."""

    text: int  # place among the texts
    share: float  # of the grams of that text that were found
    words: str  # its longest stretch of found grams, normalised
    shards: Path
    document: int  # the first document of those shards with the beginning of that stretch, from 0
    source: str  # input that this document came from


@dataclass(frozen=True)
class Contamination:
    """What of each text was found. All arrays are (texts,)."""

    n: int
    grams: np.ndarray  # int64; 0: the text is too short to be judged
    found: np.ndarray  # int64, how many of them are in the shards
    longest: np.ndarray  # int64, words in the longest stretch of which every gram was found
    examples: tuple[Example, ...]  # the largest shares first

    @property
    def share(self) -> np.ndarray:
        """Share of each text's grams that were found, float64; 0 for texts that are too short."""
        return self.found / np.maximum(self.grams, 1)

    @property
    def too_short(self) -> int:
        """Texts of fewer than 8 words."""
        return int((self.grams == 0).sum())

    @property
    def with_hits(self) -> int:
        """Texts that share at least one gram with the shards."""
        return int((self.found > 0).sum())

    def at_least(self, threshold: float) -> int:
        """Texts of whose grams at least this share was found; never those without any hit."""
        return int(((self.share >= threshold) & (self.found > 0)).sum())


def contamination(
    shards: ShardSet | Sequence[ShardSet],
    texts: Sequence[str],
    n: int = DEFAULT_N,
    *,
    workers: int = 1,
    examples: int = 10,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> Contamination:
    """Look for the ``n``-grams of ``texts`` in the documents of ``shards``, which are read once.

    Memory is proportional to the texts. ``workers`` processes share the shard files; the result does not depend on
    their number. The texts are encoded and decoded as each folder's text was; of several folders with tokenizers that
    lose different things, the one that holds the largest share of a text decides its numbers. ``on_tokens`` is called
    with numbers of tokens read. Raises :class:`UserError` for damaged shards.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    sets = [shards] if isinstance(shards, ShardSet) else list(shards)
    hits = [_search_stored(stored, n, workers, on_tokens) for stored in _as_stored(sets, texts)]
    # Where folders give a text back in several forms, the form of which the largest share was found counts.
    scores = np.array([np.where(one.grams > 0, one.found / np.maximum(one.grams, 1), -1) for one in hits])
    chosen = scores.argmax(axis=0) if len(hits) else np.zeros(len(texts), dtype=np.int64)

    def of_chosen(values: Sequence[np.ndarray]) -> np.ndarray:
        return np.array(values, dtype=np.int64)[chosen, np.arange(len(texts))] if values else np.zeros(len(texts), int)

    grams, found = of_chosen([one.grams for one in hits]), of_chosen([one.found for one in hits])
    longest, first = of_chosen([one.longest for one in hits]), of_chosen([one.first for one in hits])
    worst = np.argsort(-(found / np.maximum(grams, 1)), kind="stable")[:examples]
    shown = []
    for text in worst[found[worst] > 0].tolist():
        one = hits[chosen[text]]
        words = words_of(one.texts[text])[one.begins[text] :][: longest[text]]
        share = float(found[text] / grams[text])
        shown.append(Example(text, share, " ".join(words), *_place(sets, int(first[text]))))
    return Contamination(n, grams, found, longest, tuple(shown))


@dataclass(frozen=True)
class _Stored:
    """The evaluation texts as some of the folders hold them."""

    texts: list[str]
    folders: list[tuple[ShardSet, int]]  # each with the number of its first document through all sets


@dataclass(frozen=True)
class _Hits:
    """What of each stored text was found. All arrays are (texts,) int64."""

    texts: list[str]
    grams: np.ndarray
    found: np.ndarray
    longest: np.ndarray  # words
    begins: np.ndarray  # the word at which the longest stretch begins
    first: np.ndarray  # the first document with the first gram of that stretch, numbered through all sets


def _as_stored(sets: Sequence[ShardSet], texts: Sequence[str]) -> list[_Stored]:
    """The texts as each folder's tokenizer and normalisation leave them; folders that leave the same words together."""
    by_way: dict[tuple[str, str | None], list[str]] = {}
    by_words: dict[bytes, _Stored] = {}
    before = 0
    for shards in sets:
        normalize = shards.manifest.settings.get("reading", {}).get("normalize")
        way = (shards.tokenizer_hash, normalize)
        if way not in by_way:
            by_way[way] = _given_back(shards.tokenizer(), Reading(normalize=normalize), texts)
        digest = xxhash.xxh3_128()
        for text in by_way[way]:
            digest.update("\x00".join([*words_of(text), "\n"]).encode())
        by_words.setdefault(digest.digest(), _Stored(by_way[way], [])).folders.append((shards, before))
        before += shards.num_documents
    return list(by_words.values())


def _given_back(tokenizer: Tokenizer, reading: Reading, texts: Sequence[str]) -> list[str]:
    out: list[str] = []
    for start in range(0, len(texts), _BATCH_TEXTS):
        # A half surrogate pair is no text, and no shard has one.
        batch = [reading.normalized(t.encode(errors="replace").decode()) for t in texts[start : start + _BATCH_TEXTS]]
        out += tokenizer.decode_batch(tokenizer.encode_batch(batch))
    return out


def _search_stored(stored: _Stored, n: int, workers: int, on_tokens: Callable[[int], object]) -> _Hits:
    texts = stored.texts
    grams = EvaluationGrams(texts, n)
    first = np.full(grams.distinct, _NONE, dtype=np.int64)
    if grams.distinct:
        for numbers, documents in _search(stored.folders, grams, workers, on_tokens):
            first[numbers] = np.minimum(first[numbers], documents)
    hits = first[grams.numbers] != _NONE
    per_text = np.bincount(grams.owners, minlength=len(texts))
    found = np.bincount(grams.owners[hits], minlength=len(texts))
    longest, begins, places = np.zeros((3, len(texts)), dtype=np.int64)
    edges = np.concatenate([[0], np.cumsum(per_text)])
    for text in np.flatnonzero(found):
        begin, length = _longest_run(hits[edges[text] : edges[text + 1]])
        longest[text] = length - 1 + grams.sizes[edges[text]]
        begins[text] = begin
        places[text] = first[grams.numbers[edges[text] + begin]]
    return _Hits(texts, per_text, found, longest, begins, places)


def _hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode(errors="surrogatepass"))


@dataclass
class _Table:
    """The distinct grams of one size, sorted by key."""

    keys: np.ndarray  # uint64, rising
    base: int  # number of the first of them among the grams of all sizes
    shift: np.uint64 = field(init=False)
    mask: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        # A bit for the leading digits of each key, 16 to 32 places for one key. A look into it is several times faster
        # than a binary search and rejects all but one in 16 of the grams that are not there.
        bits = max(16, len(self.keys).bit_length() + 4)
        self.shift = np.uint64(64 - bits)
        self.mask = np.zeros(1 << bits, dtype=bool)
        self.mask[self.keys >> self.shift] = True

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in ``keys`` of those that are here, and their numbers."""
        places = np.flatnonzero(self.mask[keys >> self.shift])
        candidates = keys[places]
        ranks = np.minimum(np.searchsorted(self.keys, candidates), len(self.keys) - 1)
        same = self.keys[ranks] == candidates
        return places[same], ranks[same] + self.base


class EvaluationGrams:
    """The grams of the evaluation texts, numbered, and the search for them.

    ``owners``, ``numbers``, ``sizes`` (grams,): for every gram of every text, in order, its text, the number of its
    distinct gram and its words. ``distinct`` is how many different grams there are.
    """

    def __init__(self, texts: Sequence[str], n: int) -> None:
        self._vocabulary: dict[str, int] = {}
        lengths = np.zeros(len(texts), dtype=np.int64)
        parts = []
        for place, text in enumerate(texts):
            words = words_of(text)
            lengths[place] = len(words)
            parts.append(np.array([self._vocabulary.setdefault(w, len(self._vocabulary) + 1) for w in words], np.int32))
        ids = np.concatenate([*parts, np.empty(0, np.int32)])
        self._hashes = np.zeros(len(self._vocabulary) + 1, dtype=np.uint64)
        self._hashes[1:] = np.fromiter(map(_hash, self._vocabulary), np.uint64)
        # Multilinear hashing (Carter & Wegman 1979): a sum of the words' hashes, each times the factor of its place.
        # No two of the first 13 factors agree in their last 8 bits, so that also grams that differ by a swap of two
        # words collide with a chance below 2^-56.
        self._factors = np.array([_hash(f"place {i}") | 1 for i in range(n)], dtype=np.uint64)

        size_of = np.where(lengths >= min(SHORTEST, n), np.minimum(lengths, n), 0)
        count_of = np.where(size_of > 0, lengths - size_of + 1, 0)
        self.owners = np.repeat(np.arange(len(texts)), count_of)
        self.sizes = np.repeat(size_of, count_of)
        before = np.cumsum(lengths) - lengths  # words of the texts before
        starts = np.arange(len(self.owners)) - np.repeat(np.cumsum(count_of) - count_of, count_of) + before[self.owners]
        self.numbers = np.empty(len(self.owners), dtype=np.int64)
        self._tables: dict[int, _Table] = {}
        self.distinct = 0
        for size in np.unique(self.sizes).tolist():
            here = np.flatnonzero(self.sizes == size)
            keys, inverse = np.unique(self._keys(ids, starts[here], size), return_inverse=True)
            self.numbers[here] = inverse + self.distinct
            self._tables[size] = _Table(keys, self.distinct)
            self.distinct += len(keys)

    def _keys(self, ids: np.ndarray, starts: np.ndarray, size: int) -> np.ndarray:
        """Keys (starts,) uint64 of the grams of ``size`` words that begin at ``starts``."""
        keys = np.zeros(len(starts), dtype=np.uint64)
        for place in range(size):
            keys += self._factors[place] * self._hashes[ids[starts + place]]
        return keys

    def search(self, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the grams that occur in these documents, each once, and the first document (its place) of each."""
        parts: list[np.ndarray] = []
        for document in documents:
            words = words_of(document)
            parts.append(np.fromiter(map(self._vocabulary.get, words, repeat(0)), np.int32, len(words)))
            parts.append(np.zeros(1, dtype=np.int32))  # 0 is in no gram: none runs into the next document
        ids = np.concatenate(parts)
        ends = np.cumsum([len(part) + 1 for part in parts[::2]])
        known = np.concatenate([[0], np.cumsum(ids > 0)])
        numbers, places = [], []
        for size, table in self._tables.items():
            starts = np.flatnonzero(known[size:] - known[:-size] == size)
            found, of_size = table.find(self._keys(ids, starts, size))
            numbers.append(of_size)
            places.append(np.searchsorted(ends, starts[found], side="right"))
        distinct, inverse = np.unique(np.concatenate(numbers), return_inverse=True)
        first = np.full(len(distinct), len(documents))
        np.minimum.at(first, inverse, np.concatenate(places))
        return distinct, first


_Numbers = tuple[np.ndarray, np.ndarray]  # of grams, and of the document of each


def _search(
    folders: Sequence[tuple[ShardSet, int]],
    grams: EvaluationGrams,
    workers: int,
    on_tokens: Callable[[int], object],
) -> Iterator[_Numbers]:
    """Hits in all shards of these folders, which come with the number of their first document."""
    tasks = []
    for shards, before in folders:
        for place, shard in enumerate(shards.manifest.shards):
            tasks.append((shards, place, before))
            before += shard.num_documents
    if workers == 1 or len(tasks) == 1:
        for task in tasks:
            yield from _search_shard(grams, *task, on_tokens)
        return
    # Spawned, not forked: the threads of the tokenizer and of Arrow do not survive a fork.
    spawn = get_context("spawn")
    stop = spawn.RawValue("b", 0)  # no lock, which a killed process might have held forever
    with ProcessPoolExecutor(
        min(workers, len(tasks)), spawn, initializer=_begin_worker, initargs=(grams, stop)
    ) as pool:
        futures = {
            pool.submit(_work, shards.path, place, first): shards.manifest.shards[place].num_tokens
            for shards, place, first in tasks
        }
        try:
            for future in as_completed(futures):
                yield future.result()
                on_tokens(futures[future])
        finally:
            stop.value = 1  # at the next batch; a shard that is begun would take minutes
            pool.shutdown(wait=False, cancel_futures=True)


def _search_shard(
    grams: EvaluationGrams, shards: ShardSet, place: int, before: int, on_tokens: Callable[[int], object]
) -> Iterator[_Numbers]:
    import tokenizers

    # Straight from the library: one call decodes a batch, on all cores, at twice the speed of text by text.
    tokenizer = tokenizers.Tokenizer.from_file(str(shards.path / TOKENIZER_FILE))
    entry = shards.manifest.shards[place]
    start = sum(shard.num_tokens for shard in shards.manifest.shards[:place])
    edges = np.concatenate([[0], shards.document_ends(entry.index).astype(np.int64)])
    document = 0
    while document < entry.num_documents:
        # As many documents as fill a batch, at least one.
        until = int(np.searchsorted(edges, edges[document] + _BATCH_TOKENS, side="right")) - 1
        until = max(until, document + 1)
        ids = shards.read(np.array([start + edges[document]]), int(edges[until] - edges[document]))[0]
        cuts = edges[document : until + 1] - edges[document]
        batch = [ids[a : b - 1].tolist() for a, b in pairwise(cuts.tolist())]
        numbers, places = grams.search(tokenizer.decode_batch(batch, skip_special_tokens=True))
        yield numbers, places + before + document
        on_tokens(len(ids))
        document = until


_worker_grams: EvaluationGrams | None = None
_worker_stop: Any = None


class _Stopped(Exception):
    """The search ended elsewhere."""


def _begin_worker(grams: EvaluationGrams, stop: Any) -> None:
    import os

    global _worker_grams, _worker_stop
    die_with_parent()  # else kill of the command left all of these waiting for work forever
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is enough
    _worker_grams, _worker_stop = grams, stop


def _look_at_stop(tokens: int) -> None:
    if _worker_stop.value:
        raise _Stopped


def _work(folder: Path, place: int, before: int) -> _Numbers:
    assert _worker_grams is not None
    shards = ShardSet.open(folder)
    first = np.full(_worker_grams.distinct, _NONE, dtype=np.int64)
    for numbers, documents in _search_shard(_worker_grams, shards, place, before, _look_at_stop):
        first[numbers] = np.minimum(first[numbers], documents)
    found = np.flatnonzero(first != _NONE)
    return found, first[found]


def _longest_run(hits: np.ndarray) -> tuple[int, int]:
    """Begin and length of the longest run of True, the first of equals."""
    changes = np.flatnonzero(np.diff(np.concatenate([[False], hits, [False]]).astype(np.int8)))
    begins, lengths = changes[::2], changes[1::2] - changes[::2]
    best = int(np.argmax(lengths))
    return int(begins[best]), int(lengths[best])


def _place(sets: Sequence[ShardSet], document: int) -> tuple[Path, int, str]:
    """Folder, number in the folder, and source of a document numbered through all sets."""
    for shards in sets:
        if document >= shards.num_documents:
            document -= shards.num_documents
            continue
        inside = document
        for shard in shards.manifest.shards:
            if inside < shard.num_documents:
                names, places = shards.document_sources(shard.index)
                return shards.path, document, names[places[inside]]
            inside -= shard.num_documents
    raise IndexError(document)
