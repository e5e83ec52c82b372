"""Pseudo-perplexity of masked models (Salazar et al. 2020, "Masked Language Model Scoring", equations 1 and 2).

Each token is masked in turn, alone, and scored given all the others of its window; the pseudo-log-likelihood PLL is the
sum over the tokens, and the pseudo-perplexity exp(-PLL / N). It takes a forward pass for each token, so that it is
measured on a sample of positions: a few in each of windows that are spread evenly over the held-out text.

A pseudo-likelihood is no likelihood (the conditionals need not belong to one distribution), and the other tokens of a
word of several give it away. PPPL is far below a causal perplexity and compares masked models of one tokenizer only.
Per byte and word it can be held against other tokenizers, with that reservation.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import concat_ranges
from eval.results.parts import Parts
from eval.results.schema import Estimator, Outcome, Table
from eval.shared.scoring import LOG2E, PART_TOKENS, metrics_of, run_parts, score
from eval.subject import Subject, batches
from eval.tasks.language_modeling import PseudoSettings
from eval.tasks.language_modeling.causal import INEXACT
from eval.tasks.language_modeling.masked import windows_of
from eval.tasks.language_modeling.spans import Ints
from eval.tasks.language_modeling.text import Stream, check_source, describe_source, open_stream, resolve_documents
from eval.tasks.language_modeling.windows import by_size
from pretrain.model.attention.layout import Layout

VERSION = 2
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
    """The window, and documents apart where training held them apart; raises :class:`UserError` for a causal model,
    which has a likelihood."""
    if subject.causal:
        raise UserError("pppl is for masked models: a causal one has a likelihood, measure it with lm")
    check_source(settings)
    length = subject.check_length(settings.length or subject.trained_length, "--length")
    documents = resolve_documents(subject, settings.documents)
    return settings.model_copy(update={"length": length, "documents": documents})


def data(subject: Subject, settings: PseudoSettings) -> dict[str, Any]:
    """The held-out text."""
    return describe_source(subject, settings)


def run(subject: Subject, settings: PseudoSettings, parts: Parts) -> Outcome:
    """PLL and PPPL by token, word and byte; raises :class:`UserError` for too little held-out text."""
    stream = open_stream(subject, settings)
    length = settings.length or 0
    starts, sizes, counts = sample(stream, settings)
    per_window = -(-settings.pppl_tokens // len(starts))
    slices = list(batches(len(starts), max(1, PART_TOKENS // (length * per_window))))
    jobs = [
        (
            f"windows {p.start} to {p.stop} of {len(starts)}",
            partial(_part, subject, stream, settings, starts[p], sizes[p], counts[p]),
        )
        for p in slices
    ]
    found = [item for part in run_parts(parts, jobs, "pppl") for item in part]
    records = [record for record, _ in found]
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
        f"{total['tokens']:,} positions, each masked alone in its window of {length} tokens"
        f"{' of one document' if settings.documents == 'apart' else ''}; intervals resample the "
        f"{len(records):,} windows. Not comparable with the perplexity of a causal model."
    ) + ("" if all(exact for _, exact in found) else INEXACT)
    columns = ["per", "units", "pseudo-log-likelihood, nats", "pseudo-perplexity", "low", "high"]
    return Outcome(metrics, [Table(TABLE, columns, rows, note)], records=records, estimators=SCORES | LOSSES)


def sample(stream: Stream, settings: PseudoSettings) -> tuple[Ints, Ints, Ints]:
    """Starts and sizes (W,) of windows spread evenly over the stream, and how many positions (W,) are masked in each.

    Windows of documents differ in size: there short runs of tokens, of ``window_targets`` each, are spread evenly over
    all of them, and a window has as many positions as it has tokens in the runs, so that no token is likelier to be
    taken for the size of its document.
    """
    starts, sizes = windows_of(stream, settings.length or 0, settings.documents == "apart")
    wanted, targets = settings.pppl_tokens, settings.window_targets
    if settings.documents == "apart":
        ends = np.cumsum(sizes - np.isin(starts + sizes, stream.edges[1:]))  # without the documents' ends
        total = int(ends[-1])
        if not total:
            raise UserError(f"{stream.name} holds no ordinary token: nothing to mask")
        wanted = min(wanted, total)
        count = -(-wanted // targets)
        runs = np.arange(count + 1, dtype=np.int64)
        tokens = concat_ranges(runs[:-1] * total // count, np.diff(runs * wanted // count))
        counts = np.bincount(np.searchsorted(ends, tokens, side="right"), minlength=len(starts))
        kept = np.flatnonzero(counts)
        return starts[kept], sizes[kept], counts[kept]
    count = min(len(starts), -(-wanted // targets))
    edges = np.arange(count + 1, dtype=np.int64) * wanted // count
    kept = np.arange(count, dtype=np.int64) * len(starts) // count
    return starts[kept], sizes[kept], np.diff(edges)


def positions(stream: Stream, row: Ints, start: int, count: int, seed: int) -> Ints:
    """Rising positions in the window ``row`` at ``start``, ``count`` of its ordinary tokens or all there are."""
    ordinary = np.flatnonzero(~np.isin(row, stream.tokenizer.special_ids))
    return np.sort(np.random.default_rng([seed, start]).permutation(ordinary)[:count])


def _part(
    subject: Subject, stream: Stream, settings: PseudoSettings, starts: Ints, sizes: Ints, counts: Ints
) -> list[tuple[dict[str, Any], bool]]:
    """A record for each window with a target, and whether its text is exact."""
    mask_id = stream.tokenizer.mask_id
    assert mask_id is not None  # without one a masked model is not loaded
    rows = stream.rows(starts, sizes)
    places = [
        positions(stream, row, start, count, settings.seed)
        for row, start, count in zip(rows, starts.tolist(), counts.tolist(), strict=True)
    ]
    owner, column = np.repeat(np.arange(len(rows)), list(map(len, places))), np.concatenate(places)
    nats, hits = np.zeros(len(owner)), np.zeros(len(owner), dtype=bool)
    of = sizes[owner]
    for part in by_size(of, slice(0, len(of))):
        here = np.arange(len(part)), column[part]
        inputs = rows[owner[part], : of[part].max()]
        goal = inputs[here]
        inputs[here] = mask_id
        where = np.zeros(inputs.shape, dtype=bool)
        where[here] = True
        nats[part], hits[part] = score(
            subject,
            torch.from_numpy(inputs),
            torch.from_numpy(where),
            torch.from_numpy(goal),
            Layout.from_lengths(torch.from_numpy(of[part]), inputs.shape[1]),
        )
    out = []
    for number, (row, start, size, mine) in enumerate(zip(rows, starts.tolist(), sizes.tolist(), places, strict=True)):
        if not len(mine):
            continue
        covered, words, exact = _text(stream, start + mine)
        content = hashlib.sha256(row[:size].tobytes() + mine.tobytes()).hexdigest()[:32]
        of_row = owner == number
        record = {
            "id": content,
            "nats": float(nats[of_row].sum()),
            "hits": int(hits[of_row].sum()),
            "tokens": len(mine),
            "bytes": covered,
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
