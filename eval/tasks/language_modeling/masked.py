"""Held-out accuracy and loss of masked models under fixed noise, a function of the seed and the place alone."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import numpy as np
import torch

from data_pipeline.batches import IGNORE
from data_pipeline.batches.masking import Masking, mask_tokens
from data_pipeline.errors import UserError
from eval.results.parts import Parts
from eval.results.schema import Estimator, Metric, Outcome, Table
from eval.shared.scoring import PART_TOKENS, metrics_of, run_parts, score, unigram_entropy
from eval.subject import Subject, batches
from eval.tasks.language_modeling import LMSettings, MaskSettings
from eval.tasks.language_modeling.causal import TABLE
from eval.tasks.language_modeling.spans import Ints
from eval.tasks.language_modeling.text import Stream, open_stream
from eval.tasks.language_modeling.windows import by_size, by_tokens, side_by_side, thinned
from pretrain.model.attention.layout import Layout

KINDS = ("masked", "random", "kept")
ESTIMATORS = {
    "masked_accuracy": Estimator("hits", "targets"),
    "masked_loss": Estimator("nats", "targets"),
    "masked_perplexity": Estimator("nats", "targets", exponential=True),
}


def evaluate(subject: Subject, settings: LMSettings, parts: Parts) -> Outcome:
    """Windows side by side, of the stream (those of the validation during training) or of each document; raises
    :class:`UserError` for too little text."""
    stream = open_stream(subject, settings)
    length = settings.length or 0
    apart = settings.documents == "apart"
    starts, sizes = windows_of(stream, length, apart)
    kept = thinned(sizes, settings.max_tokens, settings.seed) if apart else spread(len(starts), length, settings)
    starts, sizes = starts[kept], sizes[kept]
    slices = by_tokens(sizes) if apart else list(batches(len(starts), max(1, PART_TOKENS // length)))
    jobs = [
        (
            f"windows {p.start} to {p.stop} of {len(starts)}",
            partial(_part, subject, stream, settings, starts[p], sizes[p]),
        )
        for p in slices
    ]
    records = [record for part in run_parts(parts, jobs, "lm (masked)") for record in part]
    total = sum(record["targets"] for record in records)
    if not total:
        raise UserError(f"no token of {stream.name} was masked: the held-out text is too short for --length {length}")
    metrics = metrics_of(records, {name: ESTIMATORS[name] for name in ("masked_accuracy",)}, better=True)
    metrics |= metrics_of(records, {name: item for name, item in ESTIMATORS.items() if name not in metrics})
    unigrams = stream.counts(subject.loaded.model_config.vocab_size or 1)
    unigrams[list(stream.tokenizer.special_ids)] = 0  # never a target
    # Of the whole text, whatever is scored of it: the frequencies of a sample know that sample's tokens.
    entropy = unigram_entropy(unigrams)
    metrics["unigram_entropy"] = Metric(entropy, None, n=int(unigrams.sum()), unit="tokens")
    rows: list[list[Any]] = [["model", metrics["masked_accuracy"].value, metrics["masked_loss"].value, total]]
    for kind in KINDS:
        number = sum(record[f"targets_{kind}"] for record in records)
        if number:
            hits, nats = (sum(record[f"{what}_{kind}"] for record in records) for what in ("hits", "nats"))
            rows.append([f"model, {kind} targets", hits / number, nats / number, number])
    frequent = float(unigrams.max() / unigrams.sum())
    rows.append(["the most frequent token, unigram entropy of the whole text", frequent, entropy, None])
    of_each = ", of each document by itself" if apart else ""
    note = f"Windows of {length} tokens side by side{of_each}; intervals resample the {len(records):,} windows."
    table = Table(TABLE, ["predictor", "accuracy", "loss, nats/target", "targets"], rows, note)
    return Outcome(metrics, [table], records=records, estimators=dict(ESTIMATORS))


def windows_of(stream: Stream, length: int, apart: bool) -> tuple[Ints, Ints]:
    """Starts and sizes, each (W,), of windows side by side: of ``length`` tokens each, without the rest of the stream,
    or of at most as many, where they fill each document by itself."""
    if apart:
        return side_by_side(stream.edges, length)
    available = stream.num_tokens // length
    if available < 1:
        raise UserError(f"{stream.name} holds {stream.num_tokens} tokens, less than one window of {length}")
    return np.arange(available, dtype=np.int64) * length, np.full(available, length, dtype=np.int64)


def spread(available: int, length: int, settings: LMSettings) -> Ints:
    """Numbers of ``settings.max_tokens`` tokens' worth of windows, spread evenly over all, at least one."""
    wanted = available * length if settings.max_tokens is None else settings.max_tokens
    count = min(available, max(1, wanted // length))
    return np.arange(count, dtype=np.int64) * available // count


def noised(subject: Subject, stream: Stream, settings: MaskSettings, starts: Ints, sizes: Ints) -> tuple[Ints, Ints]:
    """Inputs and labels, each (R, longest), of windows of ``sizes`` (R,) tokens, filled up on the right: the noise of
    a window follows from the seed and its place."""
    tokenizer = subject.loaded.tokenizer
    assert tokenizer.mask_id is not None  # without one a masked model is not loaded
    return mask_tokens(
        stream.rows(starts, sizes),
        starts,
        seed=settings.seed,
        masking=Masking(settings.mask_rate, settings.mask_share, settings.random_share),
        boundaries=None,
        mask_id=tokenizer.mask_id,
        special_ids=tokenizer.special_ids,
        vocab_size=tokenizer.vocab_size,
    )


def _part(subject: Subject, stream: Stream, settings: LMSettings, starts: Ints, sizes: Ints) -> list[dict[str, Any]]:
    """A record for each window that has a target."""
    mask_id = subject.loaded.tokenizer.mask_id
    records: dict[int, dict[str, Any]] = {}
    for rows in by_size(sizes, slice(0, len(sizes))):
        inputs, labels = noised(subject, stream, settings, starts[rows], sizes[rows])
        chosen = labels != IGNORE
        goal, given = labels[chosen], inputs[chosen]
        layout = Layout.from_lengths(torch.from_numpy(sizes[rows]), inputs.shape[1])
        nats, hits = score(subject, torch.from_numpy(inputs), torch.from_numpy(chosen), torch.from_numpy(goal), layout)
        kind = np.where(given == mask_id, 0, np.where(given == goal, 2, 1))
        owner = np.nonzero(chosen)[0]
        text = np.where(chosen, labels, inputs)
        for row in np.unique(owner).tolist():
            mine = owner == row
            read = text[row, : sizes[rows[row]]]
            record: dict[str, Any] = {"id": hashlib.sha256(read.tobytes()).hexdigest()[:32]}
            record |= {"nats": float(nats[mine].sum()), "hits": int(hits[mine].sum()), "targets": int(mine.sum())}
            for number, name in enumerate(KINDS):
                of_kind = mine & (kind == number)
                record[f"nats_{name}"] = float(nats[of_kind].sum())
                record[f"hits_{name}"] = int(hits[of_kind].sum())
                record[f"targets_{name}"] = int(of_kind.sum())
            records[int(rows[row])] = record
    return [records[number] for number in sorted(records)]
