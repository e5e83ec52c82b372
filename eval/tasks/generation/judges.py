"""Models that read the texts: the one that wrote them, a reference, and one whose hidden states stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from eval.subject import Subject, batches
from eval.tasks.generation import GenerateSettings
from pretrain.checkpoint.load import load_model

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Judges:
    """``reference`` is None if none was asked for; ``features`` may be the subject itself."""

    subject: Subject
    reference: Subject | None
    features: Subject

    @classmethod
    def of(cls, subject: Subject, settings: GenerateSettings) -> Judges:
        """Load what the settings name; raises :class:`UserError` for a checkpoint that cannot be used."""
        reference = None if settings.reference is None else _load(settings.reference, subject.device)
        if reference is not None and not reference.causal:
            raise UserError(
                f"--reference {settings.reference} is a masked model, which gives no likelihood to a text: name a "
                "causal one (--features takes either)"
            )
        features = None if settings.features is None else _load(settings.features, subject.device)
        return cls(subject, reference, features or reference or subject)

    def reread(self, judge: Subject, pairs: Sequence[Pair]) -> list[Pair]:
        """Prompts and texts, tokens of the subject, in the tokens of ``judge``: the same where it has the same
        tokenizer, else each decoded and encoded by itself."""
        mine, theirs = self.subject.loaded.tokenizer, judge.loaded.tokenizer
        if mine.hash == theirs.hash:
            return list(pairs)
        return [(theirs.encode(mine.decode(a)) or [theirs.eos_id], theirs.encode(mine.decode(b))) for a, b in pairs]


def continuation_nats(judge: Subject, pairs: Sequence[Pair]) -> list[list[float]]:
    """-log p, in nats, of each token of the second text of every pair after the first, which must not be empty."""
    out: list[list[float]] = [[] for _ in pairs]
    for rows in _alike(judge, [len(a) + len(b) for a, b in pairs]):
        ids = _stack([[*pairs[row][0], *pairs[row][1]] for row in rows])
        logits = judge.logits(ids[:, :-1])
        goal = ids[:, 1:].to(logits.device)
        nats = logits.logsumexp(-1) - logits.gather(-1, goal[..., None])[..., 0]
        for row, values in zip(rows, nats.tolist(), strict=True):
            out[row] = values[len(pairs[row][0]) - 1 :]
    return out


@torch.inference_mode()
def mean_states(judge: Subject, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The mean of the hidden states before the head over the tokens of each text, read by itself: (texts, hidden).

    An empty text is read as the end of a document.
    """
    texts = [list(text) or [judge.loaded.tokenizer.eos_id] for text in texts]
    out: list[list[float]] = [[] for _ in texts]
    for rows in _alike(judge, list(map(len, texts))):
        ids = _stack([texts[row] for row in rows])
        states = judge.model(ids.to(judge.device), hidden=True).hidden.float().mean(1)
        for row, values in zip(rows, states.tolist(), strict=True):
            out[row] = values
    return out


def _alike(judge: Subject, lengths: Sequence[int]) -> list[list[int]]:
    """Batches of texts of one length: without padding, what is read does not depend on the company it is in."""
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(length, []).append(row)
    found = []
    for length, rows in sorted(by_length.items()):
        if length > 1:
            judge.check_length(length, f"{judge.loaded.path}: prompt and continuation together,")
        found += [rows[part] for part in batches(len(rows), judge.rows(length))]
    return found


def _stack(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


# Kept, because a suite asks for it to know its hash before it asks to use it.
@lru_cache(maxsize=2)
def _load(path: str, device: torch.device) -> Subject:
    loaded = load_model(path)
    loaded.model.to(device).eval()
    return Subject(loaded, None, device)
