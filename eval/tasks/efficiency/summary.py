"""The measurements as metrics, tables and curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.results.schema import Metric, Outcome, Series, Table
from eval.tasks.efficiency import EfficiencySettings
from eval.tasks.efficiency.measure import Spread
from eval.tasks.efficiency.work import BACKWARD, DECODE, FORWARD

EXACT = "exact softmax"
MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """One form at one length. ``seconds``: of each round, empty where there was not enough memory; ``bytes``: at the
    fullest, or of the cache."""

    kind: str
    length: int
    form: str
    tokens: int
    """Of a round, over all sequences."""
    seconds: list[float]
    bytes: int | None


def summarize(measured: Sequence[Measured], own: str, note: str, settings: EfficiencySettings) -> Outcome:
    """The outcome; ``own``: the form that the model was trained with, ``note``: the machine."""
    kinds = list(dict.fromkeys(item.kind for item in measured))
    by_place = {(item.kind, item.length, item.form): item for item in measured}
    metrics: dict[str, Metric] = {}
    tables, series = [], []
    for kind in kinds:
        items = [item for item in measured if item.kind == kind]
        pairs = [(item, _exact(item, own, by_place)) for item in items]
        tables.append(_table(kind, pairs, note, settings.sequences))
        series += _curves(kind, pairs, own)
        metrics |= _metrics(kind, pairs, own, settings.rounds)
    return Outcome(metrics, tables, series)


def _exact(item: Measured, own: str, by_place: dict[tuple[str, int, str], Measured]) -> Measured | None:
    """Exact attention in the same place: the model's own, if that is what it was trained with."""
    found = by_place.get((item.kind, item.length, EXACT), by_place.get((item.kind, item.length, own)))
    return found if found is not None and found.seconds and item.seconds else None


Pair = tuple[Measured, Measured | None]


def _time_ratio(pair: Pair) -> Spread | None:
    item, exact = pair
    return Spread.of_ratios(item.seconds, exact.seconds) if exact else None


def _memory_ratio(pair: Pair) -> float | None:
    item, exact = pair
    return item.bytes / exact.bytes if exact and item.bytes and exact.bytes else None


def _table(kind: str, pairs: Sequence[Pair], note: str, sequences: int) -> Table:
    decoding = kind == DECODE
    unit = "ms per step" if decoding else "ms"
    memory = "cache, MiB" if decoding else "peak memory, MiB"
    columns = [
        "length",
        "attention",
        unit,
        "q1",
        "q3",
        "tokens/s",
        "time / exact",
        "q1",
        "q3",
        memory,
        "memory / exact",
    ]
    rows: list[list[Any]] = []
    for pair in pairs:
        item, ratio = pair[0], _time_ratio(pair)
        if not item.seconds:
            rows.append([item.length, item.form, *[None] * 9])
            continue
        steps = item.tokens // sequences if decoding else 1
        time = Spread.of([1000 * seconds / steps for seconds in item.seconds])
        rate = item.tokens / Spread.of(item.seconds).median
        ratios = [ratio.median, ratio.q1, ratio.q3] if ratio else [None] * 3
        size = None if item.bytes is None else item.bytes / MIB
        rows.append([item.length, item.form, time.median, time.q1, time.q3, rate, *ratios, size, _memory_ratio(pair)])
    text = {
        FORWARD: "All layers over full sequences, without the head.",
        BACKWARD: "Loss with its head and the gradients of all weights, without the optimizer.",
        DECODE: "A step appends a token to each text; the texts end at this length, for which the cache was made.",
    }[kind]
    what = "" if decoding else " Peak memory: of all tensors, beyond weights and input."
    return Table(
        f"{kind} by length",
        columns,
        rows,
        f"{text}{what} Medians and quartiles over rounds, ratios within rounds; empty: not enough memory. {note}.",
    )


def _curves(kind: str, pairs: Sequence[Pair], own: str) -> list[Series]:
    found = []
    memory = "decoding cache, MiB" if kind == DECODE else "peak memory, MiB"
    for form in dict.fromkeys(item.form for item, _ in pairs):
        there = [pair for pair in pairs if pair[0].form == form and pair[0].seconds]
        if not there:
            continue
        x = [float(item.length) for item, _ in there]
        rates = [Spread.of([item.tokens / seconds for seconds in item.seconds]) for item, _ in there]
        low, high = [rate.q1 for rate in rates], [rate.q3 for rate in rates]
        reference = form != own
        found.append(
            Series(
                form, x, [rate.median for rate in rates], "tokens", "tokens per second", f"{kind}: tokens per second",
                low, high, reference=reference,
            )
        )  # fmt: skip
        sizes = [(item.bytes or 0) / MIB for item, _ in there]
        found.append(Series(form, x, sizes, "tokens", memory, f"{kind}: {memory}", reference=reference))
    return found


def _metrics(kind: str, pairs: Sequence[Pair], own: str, rounds: int) -> dict[str, Metric]:
    """Of the longest length at which the model's own form ran."""
    there = [pair for pair in pairs if pair[0].form == own and pair[0].seconds]
    if not there:
        return {}
    pair = max(there, key=lambda pair: pair[0].length)
    item = pair[0]
    name = {FORWARD: "forward", BACKWARD: "backward", DECODE: "decode"}[kind]
    median = Spread.of(item.seconds).median
    found = {f"{name}_tokens_per_second": Metric(item.tokens / median, True, n=rounds, unit="rounds")}
    time, memory = _time_ratio(pair), _memory_ratio(pair)
    exact = pair[1]
    if exact is None or exact is item:
        return found
    if time is not None:
        found[f"{name}_time_ratio"] = Metric(time.median, False, n=rounds, unit="rounds")
    if memory is not None:
        ratio = "cache_ratio" if kind == DECODE else f"{name}_memory_ratio"
        found[ratio] = Metric(memory, False, n=1, unit="measurements")
    return found
