"""Held-out loss of causal models: perplexity by token, word and byte, and loss by position."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from eval.results.parts import Parts
from eval.results.schema import Estimator, Metric, Outcome, Table
from eval.shared.scoring import LOG2E, metrics_of, run_parts, score, unigram_entropy
from eval.subject import Subject
from eval.tasks.language_modeling import LMSettings
from eval.tasks.language_modeling.contamination import Overlap, overlap
from eval.tasks.language_modeling.passages import pieces, records_of
from eval.tasks.language_modeling.positions import bucket_edges, by_position, position_sums
from eval.tasks.language_modeling.text import Stream, open_stream
from eval.tasks.language_modeling.windows import Windows, strided, strided_apart
from pretrain.model.attention.layout import Layout
from pretrain.telemetry.reports import perplexity

TABLE = "held-out loss"
COLUMNS = ["predictor", "loss, nats/token", "token perplexity", "bits per byte", "byte perplexity", "word perplexity"]
ESTIMATORS = {
    "loss": Estimator("nats", "tokens"),
    "perplexity": Estimator("nats", "tokens", exponential=True),
    "bits_per_byte": Estimator("nats", "bytes", scale=LOG2E),
    "byte_perplexity": Estimator("nats", "bytes", exponential=True),
    "word_perplexity": Estimator("nats", "words", exponential=True),
}
APART = ", of each document by itself, whose first token is not predicted"
INEXACT = (
    " The tokenizer does not give the text back, so bytes and words are those of the decoded text, where tokens begin "
    "in it is estimated, and passages differ from those of other tokenizers: give the original with text."
)


def evaluate(subject: Subject, settings: LMSettings, parts: Parts) -> Outcome:
    """Score every token once in windows ``stride`` apart; see :mod:`eval.tasks.language_modeling.task`."""
    stream = open_stream(subject, settings, settings.record_chars)
    length, stride = settings.length or 0, settings.stride or 0
    apart = settings.documents == "apart"
    if apart:
        windows = strided_apart(stream.edges, length, stride, settings.max_tokens, settings.seed)
    else:
        windows = strided(stream.num_tokens - 1, length, stride, settings.max_tokens)
    if not len(windows):
        raise UserError(f"every document of {stream.name} is empty: nothing to predict with --documents apart")
    jobs = [
        (f"windows {p.start} to {p.stop} of {len(windows)}", partial(_part, subject, stream, windows, p))
        for p in windows.parts()
    ]
    found = run_parts(parts, jobs, "lm")
    records, exact = records_of([piece for part in found for piece in part["pieces"]], apart)
    metrics = metrics_of(records, ESTIMATORS)
    estimators = dict(ESTIMATORS)
    # Of the whole text, whatever is scored of it: the frequencies of a sample know that sample's tokens.
    entropy = unigram_entropy(stream.counts(subject.loaded.model_config.vocab_size or 1))
    metrics["unigram_entropy"] = Metric(entropy, None, n=stream.num_tokens, unit="tokens")
    totals = {key: sum(record[key] for record in records) for key in ("nats", "tokens", "bytes", "words")}
    rows = [
        _row("model", totals),
        _row("unigram entropy of the whole text", totals | {"nats": entropy * totals["tokens"]}),
    ]
    unit = f"passages of at most {settings.record_chars} characters" if settings.record_chars else "documents"
    note = (
        f"Windows of {length} tokens, {stride} apart{APART if apart else ''}. Intervals resample the "
        f"{len(records):,} {unit} (not tokens, which depend on each other)."
    ) + ("" if exact else INEXACT)
    if settings.contamination is not None:
        seen = overlap(stream, records, settings, parts)
        metrics |= _without(seen, records, estimators)
        rows.append(_row("model, passages of the training text left out", seen.rest))
        note += f" {seen.note}"
    curves, positions = by_position(np.sum([part["positions"] for part in found], axis=0), length, stride)
    return Outcome(
        metrics,
        [Table(TABLE, COLUMNS, rows, note), positions],
        curves,
        records=records,
        estimators=estimators,
    )


def _part(subject: Subject, stream: Stream, windows: Windows, part: slice) -> dict[str, Any]:
    """Pieces of the passages that these windows predict, and the sums by position."""
    edges = bucket_edges(int(windows.widths.max()))
    positions = np.zeros((7, len(edges) - 1))
    runs: list[tuple[int, list[NDArray[np.float64]]]] = []
    scored: dict[int, NDArray[np.float64]] = {}
    first, last = windows.bounds()
    reached = -1
    for chosen in windows.batches(part):
        widths = windows.widths[chosen]
        tokens = torch.from_numpy(stream.rows(windows.starts[chosen], widths + 1))
        column = np.arange(tokens.shape[1] - 1)
        where = (column >= (widths - windows.scored[chosen])[:, None]) & (column < widths[:, None])
        chosen_tokens = torch.from_numpy(where)
        nats = np.zeros(where.shape)
        nats[where], _ = score(
            subject,
            tokens[:, :-1],
            chosen_tokens,
            tokens[:, 1:][chosen_tokens],
            Layout.from_lengths(torch.from_numpy(widths), len(column)),
        )
        positions += position_sums(nats, where, edges)
        scored |= {number: row[mine] for number, row, mine in zip(chosen.tolist(), nats, where, strict=True)}
    for number in range(part.start, part.stop):
        if first[number] != reached:
            runs.append((int(first[number]), []))
        runs[-1][1].append(scored[number])
        reached = int(last[number])
    return {
        "pieces": [piece for begin, rows in runs for piece in pieces(stream, begin, np.concatenate(rows))],
        "positions": positions.tolist(),
    }


def _row(name: str, totals: dict[str, Any]) -> list[Any]:
    nats, tokens = totals["nats"], max(totals["tokens"], 1)
    size, words = max(totals["bytes"], 1), max(totals["words"], 1)
    return [
        name,
        nats / tokens,
        perplexity(nats / tokens),
        nats / size * LOG2E,
        perplexity(nats / size),
        perplexity(nats / words),
    ]


def _without(seen: Overlap, records: list[dict[str, Any]], estimators: dict[str, Estimator]) -> dict[str, Metric]:
    """The share of contaminated passages, and loss and bits per byte on the others; completes ``estimators``."""
    added = {
        "loss_clean": Estimator("nats_clean", "tokens_clean"),
        "bits_per_byte_clean": Estimator("nats_clean", "bytes_clean", scale=LOG2E),
    }
    estimators |= added
    metrics: dict[str, Metric] = {"contaminated": Metric(seen.share, None, n=seen.judged, unit="passages")}
    return metrics | (metrics_of(records, added) if seen.rest["tokens"] else {})
