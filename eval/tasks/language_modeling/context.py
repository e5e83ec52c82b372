"""Does more context help? The same held-out tokens, scored with contexts of different lengths.

A *probe* is a place of the text, at which a few tokens are scored under every context. All of a probe lies in one
document, so that a longer context is more of the same text. Causal models: a window of C tokens predicts the last few,
of which the last one sees C tokens. Masked models: a window of C tokens around the targets; the noise is that of the
longest window, so that targets and what is hidden near them are the same in all.

The gain of a context over the next shorter one is measured on the same tokens: its interval is that of a paired
bootstrap over the probes, far narrower than those of the two losses.
"""

from __future__ import annotations

import hashlib
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.batches import IGNORE
from data_pipeline.errors import UserError
from eval.results.parts import Parts
from eval.results.schema import Estimator, Metric, Outcome, Series, Table
from eval.results.statistics import bootstrap, paired_bootstrap
from eval.shared.scoring import PART_TOKENS, metrics_of, rows_of, run_parts, score
from eval.subject import Subject, batches
from eval.tasks.language_modeling import ContextSettings
from eval.tasks.language_modeling.masked import noised
from eval.tasks.language_modeling.spans import Ints
from eval.tasks.language_modeling.text import Stream, check_source, describe_source, open_stream

VERSION = 2
TABLE = "loss by context"
SHORTEST = 32


def resolve(subject: Subject, settings: ContextSettings) -> ContextSettings:
    """The contexts: 32, 64 and so on up to the length, unless given; rising, each once.

    Raises :class:`UserError` for fewer than two, and for one that the model cannot read.
    """
    check_source(settings)
    length = subject.check_length(settings.length or subject.trained_length, "--length")
    doubled = [SHORTEST << i for i in range(length.bit_length()) if SHORTEST << i < length]
    contexts = tuple(sorted(set(settings.contexts or (*doubled, length))))
    shortest = settings.probe_targets if subject.causal else 2
    if len(contexts) < 2 or contexts[0] < shortest:
        raise UserError(
            f"--contexts {' '.join(map(str, contexts))}: give at least two different ones, of at least {shortest} "
            "tokens"
        )
    subject.check_length(contexts[-1], "--contexts")
    return settings.model_copy(update={"length": length, "contexts": contexts})


def data(subject: Subject, settings: ContextSettings) -> dict[str, Any]:
    """The held-out text."""
    return describe_source(subject, settings)


def run(subject: Subject, settings: ContextSettings, parts: Parts) -> Outcome:
    """The loss under each context and the gain of each over the one before; raises :class:`UserError` where no
    document is long enough."""
    stream = open_stream(subject, settings)
    contexts = settings.contexts
    starts = probe_starts(stream, contexts[-1] + subject.causal, settings.probes)
    slices = list(batches(len(starts), max(1, PART_TOKENS // sum(contexts))))
    jobs = [
        (f"probes {p.start} to {p.stop} of {len(starts)}", partial(_part, subject, stream, settings, starts[p]))
        for p in slices
    ]
    records = [record for part in run_parts(parts, jobs, "context") for record in part]
    if not records:
        raise UserError("no token of the probes is a target: raise --probes or --mask-rate")
    return _outcome(subject, settings, records)


def probe_starts(stream: Stream, need: int, probes: int) -> Ints:
    """Starts (P,) of stretches of ``need`` tokens of one document each, spread evenly over all places there are."""
    sizes = np.diff(stream.edges) - 1  # without the document's end
    places = np.maximum(sizes - need + 1, 0)
    total = int(places.sum())
    if not total:
        longest = int(sizes.max(initial=0))
        raise UserError(
            f"no document of {stream.name} has the {need} tokens that the longest context needs (the longest has "
            f"{longest}): lower --contexts"
        )
    count = min(probes, total)
    before = np.concatenate([[0], np.cumsum(places)])
    chosen = np.arange(count, dtype=np.int64) * total // count
    document = np.searchsorted(before, chosen, side="right") - 1
    return stream.edges[document] + chosen - before[document]


def _part(subject: Subject, stream: Stream, settings: ContextSettings, starts: Ints) -> list[dict[str, Any]]:
    """A record for each probe that has a target."""
    longest = settings.contexts[-1]
    if subject.causal:
        tokens = stream.read(starts, longest + 1)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        target = np.zeros(inputs.shape, dtype=bool)
        target[:, longest - settings.probe_targets :] = True
    else:
        tokens = stream.read(starts, longest)
        inputs, labels = noised(subject, stream, settings, starts, np.full_like(starts, longest))
        core = max(settings.contexts[0] // 2, 1)
        target = labels != IGNORE
        begin = (longest - core) // 2
        target[:, :begin] = target[:, begin + core :] = False
    number = target.sum(1)
    records: list[dict[str, Any]] = [
        {"id": hashlib.sha256(row.tobytes()).hexdigest()[:32], "targets": int(count)}
        for row, count in zip(tokens, number.tolist(), strict=True)
    ]
    owner = np.nonzero(target)[0]
    for context in settings.contexts:
        begin = longest - context if subject.causal else (longest - context) // 2
        cut = slice(begin, begin + context)
        nats, hits = _score(subject, inputs[:, cut], labels[:, cut], target[:, cut])
        for row, record in enumerate(records):
            record[f"nats_{context}"] = float(nats[owner == row].sum())
            record[f"hits_{context}"] = int(hits[owner == row].sum())
    return [record for record in records if record["targets"]]


def _score(
    subject: Subject, inputs: Ints, labels: Ints, target: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    found = [
        score(
            subject,
            torch.from_numpy(inputs[rows].copy()),
            torch.from_numpy(target[rows].copy()),
            torch.from_numpy(labels[rows][target[rows]]),
        )
        for rows in batches(len(inputs), rows_of(inputs.shape[1]))
    ]
    nats, hits = zip(*found, strict=True)
    return np.concatenate(nats), np.concatenate(hits)


def _outcome(subject: Subject, settings: ContextSettings, records: list[dict[str, Any]]) -> Outcome:
    contexts = settings.contexts
    shortest, longest = contexts[0], contexts[-1]
    for record in records:
        record["gain"] = record[f"nats_{shortest}"] - record[f"nats_{longest}"]
    losses = {f"loss_at_{c}": Estimator(f"nats_{c}", "targets") for c in contexts}
    accuracies = {f"accuracy_at_{c}": Estimator(f"hits_{c}", "targets") for c in contexts}
    gain = {"context_gain": Estimator("gain", "targets")}
    metrics = metrics_of(records, gain, better=None) | metrics_of(records, losses)
    if not subject.causal:
        metrics |= metrics_of(records, accuracies, better=True)
    rows: list[list[Any]] = []
    for before, context in pairwise((None, *contexts)):
        assert context is not None
        loss = metrics[f"loss_at_{context}"]
        row = [context, context <= subject.trained_length, loss.value, loss.low, loss.high]
        accuracy = bootstrap(records, accuracies[f"accuracy_at_{context}"]).value
        if before is None:
            rows.append([*row, accuracy, None, None, None, None])
            continue
        longer, shorter = (
            [{"id": r["id"], "nats": r[f"nats_{c}"], "targets": r["targets"]} for r in records]
            for c in (context, before)
        )
        change = paired_bootstrap(longer, shorter, Estimator("nats", "targets"))
        rows.append([*row, accuracy, change.value, change.low, change.high, change.p])
    columns = ["context, tokens", "trained on", "loss, nats/token", "low", "high", "likeliest is right"]
    columns += ["gain over the shorter", "gain, low", "gain, high", "p"]
    total = sum(record["targets"] for record in records)
    note = (
        f"The same {total:,} tokens at {len(records):,} places of the text under every context; intervals resample the "
        "places, for the gains in pairs."
    )
    points: list[Metric] = [metrics[f"loss_at_{c}"] for c in contexts]
    series = Series(
        TABLE,
        [float(c) for c in contexts],
        [m.value for m in points],
        "context, tokens",
        "loss, nats per token",
        low=[m.low or 0.0 for m in points],
        high=[m.high or 0.0 for m in points],
    )
    estimators = gain | losses | ({} if subject.causal else accuracies)
    return Outcome(metrics, [Table(TABLE, columns, rows, note)], [series], records=records, estimators=estimators)
