"""Held-out loss: perplexity by token, word and byte for causal models, masked accuracy and loss for masked ones.

Deterministic: causal models read the held-out stream in windows of ``seq_len`` tokens that do not overlap, each token
a target at most once (the very first has no context and is none); masked models see fixed noise, a function of the seed
alone.

Words and bytes are counted in the decoded text of the targets, words by whitespace. The cost of a document's end is in
the sum of losses but is neither word nor byte, so word and byte figures are (slightly) on the strict side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from data_pipeline.batches.loader import validation_batches
from data_pipeline.batches.masking import Masking
from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.language_modeling.settings import LMSettings
from eval.results.parts import Parts
from eval.results.schema import Metric, Outcome, Series, Table
from eval.subject import Subject, batches

VERSION = 2
TABLE = "held-out loss"
POSITION_SERIES = "loss by position"


def resolve(subject: Subject, settings: LMSettings) -> LMSettings:
    """The window: the longest length of the run unless given, and one the model can read."""
    length = settings.length or subject.trained_length
    return settings.model_copy(update={"length": subject.check_length(length, "--length")})


def data(subject: Subject, settings: LMSettings) -> dict[str, Any]:
    """The held-out shards."""
    shards = subject.held_out()
    return {
        "path": str(shards.path),
        "tokens": shards.num_tokens,
        "documents": shards.num_documents,
        "hash": shards.fingerprint,
    }


def run(subject: Subject, settings: LMSettings, parts: Parts) -> Outcome:
    """Evaluate by the model's objective; raises :class:`UserError` without held-out shards, or with too few tokens."""
    shards = subject.held_out()
    if shards.num_tokens < 2:
        raise UserError(f"{shards.path} holds {shards.num_tokens} tokens: nothing to predict")
    return _causal(subject, shards, settings) if subject.causal else _masked(subject, shards, settings)


def perplexity(nats: float) -> float:
    """exp(nats), infinite where that overflows."""
    return math.exp(nats) if nats < 700 else math.inf


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of the empirical distribution of ``counts``: the loss of the best model without context."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def window_starts(available: int, seq_len: int, max_tokens: int | None) -> tuple[NDArray[np.int64], int]:
    """Starts of the whole windows, and the width of the shorter one behind the last (0: none).

    ``available`` targets fill the windows. With fewer ``max_tokens`` the windows are spread evenly over the stream, so
    that they are a sample of all of it and not its first book.
    """
    whole = available // seq_len
    if max_tokens is None or max_tokens >= available:
        return np.arange(whole, dtype=np.int64) * seq_len, available - whole * seq_len
    if not whole:
        return np.zeros(0, dtype=np.int64), max_tokens
    count = min(max(max_tokens // seq_len, 1), whole)
    return np.arange(count, dtype=np.int64) * whole // count * seq_len, 0


def stream_windows(
    shards: ShardSet, starts: NDArray[np.int64], seq_len: int, rest: int, rows: int
) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
    """(starts (R,), inputs (R, N), targets (R, N)): targets are inputs one token on. The shorter window comes last."""
    for part in batches(len(starts), rows):
        tokens = torch.from_numpy(shards.read(starts[part], seq_len + 1))
        yield starts[part], tokens[:, :-1], tokens[:, 1:]
    if rest:
        last = np.array([starts[-1] + seq_len if len(starts) else 0], dtype=np.int64)
        tokens = torch.from_numpy(shards.read(last, rest + 1))
        yield last, tokens[:, :-1], tokens[:, 1:]


class TextCounter:
    """Counts words and UTF-8 bytes of pieces of a stream, decoding a document (or what was read) at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.words = 0
        self.bytes = 0
        self._open: list[int] = []
        self._position = 0

    def feed(self, start: int, tokens: NDArray[np.int64]) -> None:
        """Take the tokens at ``start`` of the stream; a gap to those before ends the piece there."""
        if start != self._position:
            self._close()
        self._position = start + len(tokens)
        ends = np.flatnonzero(tokens == self.tokenizer.eos_id)
        start = 0
        for end in ends:
            self._open.extend(tokens[start:end].tolist())
            self._close()
            start = int(end) + 1
        self._open.extend(tokens[start:].tolist())

    def finish(self) -> tuple[int, int]:
        """Words and bytes, with the last document as far as it was read."""
        self._close()
        return self.words, self.bytes

    def _close(self) -> None:
        text = self.tokenizer.decode(self._open)
        self.words += len(text.split())
        self.bytes += len(text.encode())
        self._open = []


def _causal(subject: Subject, shards: ShardSet, settings: LMSettings) -> Outcome:
    length = settings.length or 0
    starts, rest = window_starts(shards.num_tokens - 1, length, settings.max_tokens)
    targets = len(starts) * length + rest
    sums = np.zeros(length)  # float64, nats by position in the window
    counts = np.zeros(length, dtype=np.int64)
    unigrams = np.zeros(shards.vocab_size, dtype=np.int64)
    text = TextCounter(subject.loaded.tokenizer)
    with tqdm(total=targets, desc="lm", unit="tok", unit_scale=True, disable=None) as bar:
        for places, inputs, labels in stream_windows(shards, starts, length, rest, subject.rows(length)):
            logits = subject.logits(inputs)
            goal = labels.to(logits.device)
            nats = logits.logsumexp(-1) - logits.gather(-1, goal[..., None])[..., 0]
            width = labels.shape[1]
            sums[:width] += nats.double().sum(0).cpu().numpy()
            counts[:width] += labels.shape[0]
            unigrams += np.bincount(labels.numpy().reshape(-1), minlength=len(unigrams))
            for place, row in zip(places.tolist(), labels.numpy(), strict=True):
                text.feed(place, row)
            bar.update(labels.numel())
    words, size = text.finish()
    total, number = float(sums.sum()), int(counts.sum())
    entropy = unigram_entropy(unigrams)
    columns = [
        "predictor",
        "loss, nats/token",
        "token perplexity",
        "bits per byte",
        "byte perplexity",
        "word perplexity",
    ]
    loss = total / number
    per_byte, per_word = number / max(size, 1), number / max(words, 1)
    rows: list[list[Any]] = [
        [name, x, perplexity(x), x * per_byte / math.log(2), perplexity(x * per_byte), perplexity(x * per_word)]
        for name, x in (("model", loss), ("unigram entropy of the text", entropy))
    ]
    metrics = {
        "loss": Metric(loss, False, n=number),
        "perplexity": Metric(perplexity(loss), False, n=number),
        "bits_per_byte": Metric(loss * per_byte / math.log(2), False, n=size),
        "byte_perplexity": Metric(perplexity(loss * per_byte), False, n=size),
        "word_perplexity": Metric(perplexity(loss * per_word), False, n=words),
        "unigram_entropy": Metric(entropy, False, n=number),
    }
    return Outcome(metrics, [Table(TABLE, columns, rows)], [position_series(sums, counts)])


def position_series(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> Series:
    """Mean loss in buckets of positions, [0, 8), [8, 16), [16, 32) and so on; x is the middle of the bucket."""
    edges = [0, 8]
    while edges[-1] < len(sums):
        edges.append(2 * edges[-1])
    x, y = [], []
    for low, high in pairwise(edges):
        number = counts[low:high].sum()
        if number:
            high = min(high, len(sums))
            x.append((low + high - 1) / 2)
            y.append(float(sums[low:high].sum() / number))
    return Series(POSITION_SERIES, x, y, "position in the window, tokens", "loss, nats per token")


def _masked(subject: Subject, shards: ShardSet, settings: LMSettings) -> Outcome:
    length = settings.length or 0
    max_tokens = min(settings.max_tokens or shards.num_tokens, shards.num_tokens)
    mask_id = subject.loaded.tokenizer.mask_id
    assert mask_id is not None  # without one a masked model is not loaded
    kinds = ("masked", "random", "kept")
    loss, hits, number = np.zeros(3), np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    unigrams = np.zeros(shards.vocab_size, dtype=np.int64)
    masking = Masking(settings.mask_rate, settings.mask_share, settings.random_share)
    with tqdm(total=max_tokens, desc="lm (masked)", unit="tok", unit_scale=True, disable=None) as bar:
        for batch in validation_batches(
            shards,
            objective="mlm",
            seq_len=length,
            rows=subject.rows(length),
            max_tokens=max_tokens,
            seed=settings.seed,
            masking=masking,
            rank=0,
            world_size=1,
        ):
            inputs, labels = batch.input_ids, batch.labels
            chosen = labels != -100
            goal, given = labels[chosen], inputs[chosen]
            logits = subject.target_logits(inputs, chosen).cpu()
            nats = torch.nn.functional.cross_entropy(logits, goal, reduction="none").double()
            right = logits.argmax(-1) == goal
            kind = torch.where(given == mask_id, 0, torch.where(given == goal, 2, 1)).numpy()
            loss += np.bincount(kind, weights=nats.numpy(), minlength=3)
            hits += np.bincount(kind[right.numpy()], minlength=3)
            number += np.bincount(kind, minlength=3)
            unigrams += np.bincount(goal.numpy(), minlength=len(unigrams))
            bar.update(inputs.numel())
    total = int(number.sum())
    if not total:
        raise UserError(f"no token of {shards.path} was masked: the held-out text is too short for --length {length}")
    mean, accuracy, entropy = float(loss.sum() / total), float(hits.sum() / total), unigram_entropy(unigrams)
    columns = ["predictor", "accuracy", "loss, nats/target", "targets"]
    rows: list[list[Any]] = [
        ["model", accuracy, mean, total],
        *(
            [f"model, {k} targets", hits[i] / number[i], loss[i] / number[i], int(number[i])]
            for i, k in enumerate(kinds)
            if number[i]
        ),
        ["the most frequent token, unigram entropy", float(unigrams.max() / total), entropy, total],
    ]
    rows = [[cell.item() if isinstance(cell, np.generic) else cell for cell in row] for row in rows]
    metrics = {
        "masked_accuracy": Metric(accuracy, True, n=total),
        "masked_loss": Metric(mean, False, n=total),
        "masked_perplexity": Metric(perplexity(mean), False, n=total),
        "unigram_entropy": Metric(entropy, False, n=total),
    }
    return Outcome(metrics, [Table(TABLE, columns, rows)])
