"""Pseudo-perplexity of masked models (Salazar et al. 2020, "Masked Language Model Scoring", equations 1 and 2).

Each token is masked in turn, alone, and scored given all the others of its window; the pseudo-log-likelihood PLL is the
sum over the tokens, and the pseudo-perplexity exp(-PLL / N). It takes a forward pass for each token, so that it is
measured on a sample of positions: a few in each of windows that are spread evenly over the held-out text.

A pseudo-likelihood is no likelihood (the conditionals need not belong to one distribution), and the other tokens of a
word of several give it away: PPPL is far below a causal perplexity and compares masked models of one tokenizer only.
Per byte and word it can be held against other tokenizers, with that reservation.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import UserError
from eval.language_modeling.causal import INEXACT
from eval.language_modeling.masked import window_starts
from eval.language_modeling.measures import LOG2E, PART_TOKENS, metrics_of, rows_of, run_parts, score, unique
from eval.language_modeling.settings import PseudoSettings
from eval.language_modeling.spans import Ints
from eval.language_modeling.text import Stream, check_source, describe_source, open_stream
from eval.results.parts import Parts
from eval.results.schema import Estimator, Outcome, Table
from eval.subject import Subject, batches

VERSION = 1
TABLE = "pseudo-likelihood"
LOSSES = {
    "pseudo_perplexity": Estimator("nats", "tokens", exponential=True),
    "pseudo_word_perplexity": Estimator("nats", "words", exponential=True),
    "pseudo_byte_perplexity": Estimator("nats", "bytes", exponential=True),
    "pseudo_bits_per_byte": Estimator("nats", "bytes", scale=LOG2E),
}
SCORES = {
    "pseudo_log_likelihood": Estimator("nats", "tokens", scale=-1.0),
    "accuracy": Estimator("hits", "tokens"),
}


def resolve(subject: Subject, settings: PseudoSettings) -> PseudoSettings:
    """The window; raises :class:`UserError` for a causal model, which has a likelihood."""
    if subject.causal:
        raise UserError("pppl is for masked models: a causal one has a likelihood, measure it with lm")
    check_source(settings)
    length = subject.check_length(settings.length or subject.trained_length, "--length")
    return settings.model_copy(update={"length": length})


def data(subject: Subject, settings: PseudoSettings) -> dict[str, Any]:
    """The held-out text."""
    return describe_source(subject, settings)


def run(subject: Subject, settings: PseudoSettings, parts: Parts) -> Outcome:
    """PLL and PPPL by token, word and byte; raises :class:`UserError` for too little held-out text."""
    stream = open_stream(subject, settings)
    length = settings.length or 0
    starts, counts = sample(stream, settings)
    per_window = -(-settings.pppl_tokens // len(starts))
    slices = list(batches(len(starts), max(1, PART_TOKENS // (length * per_window))))
    jobs = [
        (
            f"windows {p.start} to {p.stop} of {len(starts)}",
            partial(_part, subject, stream, settings, starts[p], counts[p]),
        )
        for p in slices
    ]
    found = [item for part in run_parts(parts, jobs, "pppl") for item in part]
    records = unique([record for record, _ in found])
    if not records:
        raise UserError(f"{stream.name} holds no ordinary token: nothing to mask")
    metrics = metrics_of(records, SCORES, better=True) | metrics_of(records, LOSSES)
    total = {key: sum(record[key] for record in records) for key in ("nats", "tokens", "bytes", "words")}
    rows = [
        [
            unit,
            total[key],
            -total["nats"] / max(total[key], 1),
            metrics[name].value,
            metrics[name].low,
            metrics[name].high,
        ]
        for unit, key, name in (
            ("token", "tokens", "pseudo_perplexity"),
            ("word", "words", "pseudo_word_perplexity"),
            ("byte", "bytes", "pseudo_byte_perplexity"),
        )
    ]
    note = (
        f"{total['tokens']:,} positions, each masked alone in its window of {length} tokens; intervals resample the "
        f"{len(records):,} windows. Not comparable with the perplexity of a causal model."
    ) + ("" if all(exact for _, exact in found) else INEXACT)
    columns = ["per", "units", "pseudo-log-likelihood, nats", "pseudo-perplexity", "low", "high"]
    return Outcome(metrics, [Table(TABLE, columns, rows, note)], records=records, estimators=SCORES | LOSSES)


def sample(stream: Stream, settings: PseudoSettings) -> tuple[Ints, Ints]:
    """Starts (W,) of windows spread evenly over the stream, and how many positions (W,) are masked in each."""
    every = window_starts(stream, settings.length or 0, None)
    wanted = settings.pppl_tokens
    count = min(len(every), -(-wanted // settings.window_targets))
    edges = np.arange(count + 1, dtype=np.int64) * wanted // count
    return every[np.arange(count, dtype=np.int64) * len(every) // count], np.diff(edges)


def positions(stream: Stream, row: Ints, start: int, count: int, seed: int) -> Ints:
    """Rising positions in the window ``row`` at ``start``, ``count`` of its ordinary tokens or all there are."""
    ordinary = np.flatnonzero(~np.isin(row, stream.tokenizer.special_ids))
    return np.sort(np.random.default_rng([seed, start]).permutation(ordinary)[:count])


def _part(
    subject: Subject, stream: Stream, settings: PseudoSettings, starts: Ints, counts: Ints
) -> list[tuple[dict[str, Any], bool]]:
    """A record for each window with a target, and whether its text is exact."""
    mask_id = stream.tokenizer.mask_id
    assert mask_id is not None  # without one a masked model is not loaded
    length = settings.length or 0
    rows = stream.read(starts, length)
    places = [
        positions(stream, row, start, count, settings.seed)
        for row, start, count in zip(rows, starts.tolist(), counts.tolist(), strict=True)
    ]
    owner, column = np.repeat(np.arange(len(rows)), list(map(len, places))), np.concatenate(places)
    nats, hits = np.zeros(len(owner)), np.zeros(len(owner), dtype=bool)
    for part in batches(len(owner), rows_of(length)):
        here = np.arange(len(owner[part])), column[part]
        inputs = rows[owner[part]]
        goal = inputs[here]
        inputs[here] = mask_id
        where = np.zeros(inputs.shape, dtype=bool)
        where[here] = True
        nats[part], hits[part] = score(
            subject, torch.from_numpy(inputs), torch.from_numpy(where), torch.from_numpy(goal)
        )
    out = []
    for number, (row, start, mine) in enumerate(zip(rows, starts.tolist(), places, strict=True)):
        if not len(mine):
            continue
        size, words, exact = _text(stream, start + mine)
        content = hashlib.sha256(row.tobytes() + mine.tobytes()).hexdigest()[:32]
        of_row = owner == number
        record = {
            "id": content,
            "nats": float(nats[of_row].sum()),
            "hits": int(hits[of_row].sum()),
            "tokens": len(mine),
            "bytes": size,
            "words": words,
        }
        out.append((record, exact))
    return out


def _text(stream: Stream, places: Ints) -> tuple[int, int, bool]:
    """Bytes and words that begin with the tokens at ``places`` of the stream, and whether that is exact."""
    size = words = 0
    exact = True
    for place in places.tolist():
        document = int(np.searchsorted(stream.edges, place, side="right")) - 1
        spans, at = stream.spans(document), place - int(stream.edges[document])
        size += int(spans.bytes[at + 1] - spans.bytes[at])
        words += int(spans.words[at + 1] - spans.words[at])
        exact = exact and spans.exact
    return size, words, exact
