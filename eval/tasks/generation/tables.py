"""Metrics, tables and charts of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.results.schema import Estimator, Metric, Series, Table
from eval.results.statistics import Interval
from eval.tasks.generation import GenerateSettings, likeness, measures
from eval.tasks.generation.judges import Judges
from eval.tasks.generation.scoring import COPIED_WORDS, WINDOW, TextSet

TABLE = "generated text"
REPEATS = "generated text: repetition and copying"
JUDGED = "generated text, as models read it"
POSITIONS = 8

METRICS = {
    "own_perplexity": "own_perplexity",
    "own_bits_per_byte": "own_bits_per_byte",
    "reference_bits_per_byte": "reference_bits_per_byte",
    "repetition_4": "repetition_4",
    "repetition_window": f"repetition_in_{WINDOW}_tokens",
    "longest_repeat": "longest_repeat",
    "prompt_copies": "prompt_copies_4",
    "coherence": "coherence",
    "training_copies": f"training_copies_{COPIED_WORDS}",
}
"""Names of the metrics that are averages over texts, by those of their estimators."""


@dataclass(frozen=True)
class Measured:
    """Measures of one set of texts. ``tokens``: of each set, cut to the smallest. ``mauve``: mean and deviation."""

    tokens: int
    distinct: list[float]
    zipf: float
    self_bleu: float
    bleu_texts: int
    mauve: Sequence[float] | None
    intervals: dict[str, Interval]


def metrics(
    main: TextSet, measured: Measured, there: Mapping[str, Estimator], shuffled: Measured | None = None
) -> dict[str, Metric]:
    """Those of the main way of decoding. Measures of a whole set have no interval: a resample has texts twice, and
    what is counted is repetition. MAUVE stands beside that of the ``shuffled`` control, which may have more: neither
    more nor less of it is better."""
    n = len(main.pairs)
    found = {f"distinct_{i}": Metric(value, None, n=n, unit="texts") for i, value in enumerate(measured.distinct, 1)}
    for key in there:
        if key in METRICS:
            interval = measured.intervals[key]
            low, high = (interval.low, interval.high) if n > 1 else (None, None)
            found[METRICS[key]] = Metric(interval.value, None, n=n, low=low, high=high, unit="texts")
    found["self_bleu"] = Metric(measured.self_bleu, None, n=measured.bleu_texts, unit="texts")
    found["zipf_exponent"] = Metric(measured.zipf, None, n=measured.tokens, unit="tokens")
    if measured.mauve is not None:
        value, std = measured.mauve
        found["mauve"] = Metric(value, None, std=std, n=likeness.MAUVE_SEEDS, unit="clusterings")
    if shuffled is not None and shuffled.mauve is not None:
        value, std = shuffled.mauve
        found["mauve_of_shuffled_tokens"] = Metric(value, None, std=std, n=likeness.MAUVE_SEEDS, unit="clusterings")
    return {name: metric for name, metric in found.items() if not np.isnan(metric.value)}


def tables(
    sets: Sequence[TextSet],
    measured: Mapping[str, Measured],
    there: Mapping[str, Estimator],
    judges: Judges,
    settings: GenerateSettings,
) -> list[Table]:
    """Every set of texts a row, in three tables."""
    return [
        _counted(sets, measured, settings),
        _repeats(sets, measured, there),
        _judged(sets, measured, there, judges),
    ]


def charts(sets: Sequence[TextSet]) -> list[Series]:
    """Rank and frequency of the tokens, and the loss along the texts."""
    found = []
    for item in sets:
        counts = measures.rank_frequencies(item.texts)
        if len(counts) > 1:
            ranks = np.unique(np.geomspace(1, len(counts), 40).round().astype(np.int64))
            shares = np.log10(counts[ranks - 1] / counts.sum())
            found.append(
                Series(
                    f"rank and frequency, {item.name}",
                    ranks.tolist(),
                    shares.tolist(),
                    "rank of the token",
                    "log10 of its share of the text",
                    chart="rank and frequency of the tokens",
                    reference=item.control,
                )
            )
    for item in sets:
        longest = max(map(len, item.nats), default=0)
        width = -(-longest // POSITIONS) or 1
        x, y = [], []
        for start in range(0, longest, width):
            here = [value for row in item.nats for value in row[start : start + width]]
            x.append(start + (min(width, longest - start) - 1) / 2)
            y.append(float(np.mean(here)))
        if len(x) > 1:
            found.append(
                Series(
                    f"loss along the text, {item.name}",
                    x,
                    y,
                    "position in the continuation, tokens",
                    "loss under the model, nats per token",
                    chart="loss along the text",
                    scale="linear",
                    reference=item.control,
                )
            )
    return found


def _counted(sets: Sequence[TextSet], measured: Mapping[str, Measured], settings: GenerateSettings) -> Table:
    columns = [
        "text", "distinct-1", "distinct-2", "distinct-3", "repetition of 4-grams", "perplexity under the model",
        "self-BLEU", "Zipf exponent", "texts", "tokens", "ended early",
    ]  # fmt: skip
    rows: list[list[Any]] = []
    for item in sets:
        found = measured[item.name]
        early = sum(len(text) < settings.max_new_tokens for text in item.texts)
        values = [*found.distinct, found.intervals["repetition_4"].value, found.intervals["own_perplexity"].value]
        rows.append([item.name, *values, found.self_bleu, found.zipf, len(item.pairs), item.tokens, early])
    any_set = measured[sets[0].name]
    note = (
        f"distinct-n and the Zipf exponent are of the first {any_set.tokens} tokens of each set (none of a set with "
        f"fewer), self-BLEU of {any_set.bleu_texts} texts. The two sets of real text differ by chance; a text is like "
        "real text where its numbers are like theirs, not where they are highest."
    )
    if not any(item.control for item in sets):
        note += " No real text to compare with: name held-out shards with --data."
    return Table(TABLE, columns, _without_nan(rows), note)


def _repeats(sets: Sequence[TextSet], measured: Mapping[str, Measured], there: Mapping[str, Estimator]) -> Table:
    copies = "training_copies" in there
    columns = [
        "text", "repetition of 4-grams", "95% interval", f"tokens repeated within {WINDOW}", "longest repeat, tokens",
        "4-grams from the prompt",
    ]  # fmt: skip
    columns += [f"{COPIED_WORDS}-word runs of the training text", "longest, words"] if copies else []
    rows: list[list[Any]] = []
    for item in sets:
        found = measured[item.name].intervals
        row = [item.name, found["repetition_4"].value, _interval(found["repetition_4"])]
        row += [found[key].value for key in ("repetition_window", "longest_repeat", "prompt_copies")]
        if copies:
            row += [found["training_copies"].value, max(record["longest_copy"] for record in item.records)]
        rows.append(row)
    note = "Shares of all 4-grams or tokens of the texts; the longest repeat is a mean over the texts."
    if copies:
        note += f" Texts of fewer than {COPIED_WORDS} words are not searched in the training text."
    return Table(REPEATS, columns, _without_nan(rows), note)


def _judged(
    sets: Sequence[TextSet], measured: Mapping[str, Measured], there: Mapping[str, Estimator], judges: Judges
) -> Table:
    reference = "reference_bits_per_byte" in there
    mauve = any(found.mauve is not None for found in measured.values())
    columns = ["text", "perplexity under the model", "95% interval", "bits per byte"]
    columns += ["bits per byte under the reference", "95% interval of that"] if reference else []
    columns += ["coherence with the prompt", "95% interval of the coherence", "with another prompt"]
    columns += ["MAUVE", "± over clusterings"] if mauve else []
    rows: list[list[Any]] = []
    for item in sets:
        whole = measured[item.name]
        found = whole.intervals
        row = [item.name, found["own_perplexity"].value, _interval(found["own_perplexity"])]
        row += [found["own_bits_per_byte"].value]
        if reference:
            row += [found["reference_bits_per_byte"].value, _interval(found["reference_bits_per_byte"])]
        row += [found["coherence"].value, _interval(found["coherence"]), found["coherence_other"].value]
        row += (list(whole.mauve) if whole.mauve is not None else [None, None]) if mauve else []
        rows.append(row)
    return Table(JUDGED, columns, _without_nan(rows), _judges_note(judges, min(len(item.pairs) for item in sets)))


def _judges_note(judges: Judges, smallest: int) -> str:
    info = judges.features.info()
    whose = "the model's own" if judges.features is judges.subject else f"{info.run}'s ({info.objective})"
    note = f"Coherence: cosine of mean hidden states ({whose}) of prompt and text, each read by itself. "
    problem = likeness.mauve_problem(smallest)
    if problem is not None:
        return note + problem
    note += "MAUVE: against the other real text, whose like the real continuations are."
    if smallest < likeness.MAUVE_ADVISED:
        note += f" {likeness.MAUVE_ADVISED} texts and more are advised; with fewer it flatters, shuffled text too."
    return note


def _interval(interval: Interval) -> str | None:
    return f"{interval.low:.4g} to {interval.high:.4g}" if interval.n > 1 else None


def _without_nan(rows: list[list[Any]]) -> list[list[Any]]:
    return [[None if isinstance(cell, float) and np.isnan(cell) else cell for cell in row] for row in rows]
