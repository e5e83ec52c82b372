"""What the checks of the gate share: texts, lengths, positions, and how two outputs are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from eval.shared.scoring import rows_of
from eval.subject import Subject
from eval.tasks.validity import ValiditySettings
from pretrain.model.attention.form import Form
from pretrain.model.attention.layout import Layout
from pretrain.model.attention.registry import forms_of

Precision = Literal["fp32", "bf16"]

# Bounds, as shares of the largest absolute logit unless said otherwise.
LOGIT_BOUND = 1e-4
LIKELIHOOD_BOUND = 1e-3  # nats per token
SEEN_BOUND = 1e-6  # least effect of what a model must see; the same input computed twice differs by 0
TINY = 1e-30  # for a model whose logits are all zero

HEAD_ELEMENTS = 2**24
"""Logits held at once while two outputs are compared: 64 MiB in float32."""


@dataclass(frozen=True)
class Check:
    """One measured number against its bound; ``sense`` is "<=" or ">=". NaN never passes."""

    name: str
    measured: float
    bound: float
    sense: str = "<="
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the bound holds."""
        return self.measured <= self.bound if self.sense == "<=" else self.measured >= self.bound

    @property
    def margin(self) -> float:
        """How far inside its bound it is, by a factor: below 1 it fails; -inf for NaN."""
        if not np.isfinite(self.measured):
            return -np.inf
        low, high = (self.measured, self.bound) if self.sense == "<=" else (self.bound, self.measured)
        return np.inf if low == 0 else high / low


def worst_of(checks: Sequence[Check]) -> list[Check]:
    """One check for each name, that with the least margin; the others are left out. Order of first appearance."""
    found: dict[str, Check] = {}
    for check in checks:
        if check.name not in found or check.margin < found[check.name].margin:
            found[check.name] = check
    return list(found.values())


@dataclass(frozen=True)
class Probe:
    """A model at one length and in one precision, with a text to look at.

    ``text``: (length,) int64. Rows are computed as scores are: hidden states first, the head on what is looked at.
    """

    subject: Subject
    text: Tensor
    seed: int
    precision: Precision = "fp32"

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return len(self.text)

    @property
    def pad_id(self) -> int:
        """What stands in padding; any token does, where the tokenizer has none for it."""
        return self.subject.loaded.tokenizer.pad_id or 0

    @property
    def where(self) -> str:
        """For details: the length, and the precision if it is not float32."""
        return f"{self.length} tokens" + ("" if self.precision == "fp32" else f" in {self.precision}")

    @torch.inference_mode()
    def states(self, ids: Tensor, layout: Layout | None = None) -> Tensor:
        """Hidden states (B, N, h) of ``ids`` (B, N)."""
        with self._autocast():
            return self.subject.model(ids.to(self.subject.device), layout=layout, hidden=True).hidden

    @torch.inference_mode()
    def direct(self, ids: Tensor, layout: Layout | None = None) -> Tensor:
        """Logits (B, N, V) by the other path, which does not return hidden states."""
        with self._autocast():
            return self.subject.model(ids.to(self.subject.device), layout=layout).logits.float()

    @torch.inference_mode()
    def loss(self, ids: Tensor, labels: Tensor, layout: Layout | None = None) -> tuple[Tensor, int]:
        """Sum of the losses of ``labels`` (B, N) in nats, and the number of targets, as the model gives them."""
        with self._autocast():
            out = self.subject.model(ids.to(self.subject.device), labels=labels, layout=layout)
        assert out.loss_sum is not None
        assert out.num_targets is not None
        return out.loss_sum.float(), int(out.num_targets)

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Logits (..., V) in float32 of hidden states (..., h)."""
        with self._autocast():
            return self.subject.model.head(states).float()

    def scale(self, states: Tensor) -> float:
        """The largest absolute logit of these states (N, h)."""
        return max(TINY, *(float(self.logits(part).abs().max()) for part in self._parts(states)))

    def gap(self, a: Tensor, b: Tensor) -> Tensor:
        """The largest difference of a logit at each position, (N,), between states ``a`` and ``b``, both (N, h).

        The head runs where the states differ at all. In rows of one shape that is nowhere, for a sound model.
        """
        unequal = (a != b).any(-1)  # NaN is unequal to itself, and stays
        out = torch.zeros(len(a), device=a.device)
        if unequal.any():
            pairs = zip(self._parts(a[unequal]), self._parts(b[unequal]), strict=True)
            out[unequal] = torch.cat([(self.logits(x) - self.logits(y)).abs().amax(-1) for x, y in pairs])
        return out

    def rows(self, length: int | None = None) -> int:
        """Rows of ``length`` tokens (default: the text's) that are scored together."""
        return max(2, rows_of(length or self.length))

    def other(self, tokens: Tensor, seed: int) -> Tensor:
        """As many ordinary tokens, each another than the one in its place."""
        return different(tokens, self.subject, self.seed + seed)

    def special(self, tokens: Tensor, seed: int) -> Tensor:
        """The same with about a quarter of the tokens replaced by special ones, such as ``</s>``."""
        vocab = self.subject.loaded.model_config.vocab_size or 0
        ids = torch.tensor([i for i in self.subject.loaded.tokenizer.special_ids if i < vocab], dtype=torch.int64)
        rng = torch.Generator().manual_seed(self.seed + seed)
        chosen = torch.rand(tokens.shape, generator=rng) < 0.25
        drawn = torch.randint(max(1, len(ids)), tokens.shape, generator=rng)
        return torch.where(chosen, ids[drawn], tokens) if len(ids) else tokens

    def random(self, length: int, seed: int) -> Tensor:
        """Random ordinary tokens, (length,) int64."""
        return random_ids(self.subject, length, self.seed + seed)

    def cut_lengths(self, most: int = 8) -> list[int]:
        """Lengths of rows to look at, descending: the whole, the ends of the range, and edges at each scale."""
        n = self.length
        edges = positions_at_edges(self.subject, n)
        picked = [edges[i] + 1 for i in np.linspace(0, len(edges) - 1, most).astype(int)]
        wanted = dict.fromkeys([n, max(n // 7, 1), min(3, n), n - 1, n // 2 + 1, 1, *reversed(picked)])
        return sorted([m for m in wanted if 1 <= m <= n][:most], reverse=True)

    def _parts(self, states: Tensor) -> tuple[Tensor, ...]:
        vocab = self.subject.loaded.model_config.vocab_size or 1
        return states.split(max(1, HEAD_ELEMENTS // vocab))

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.subject.device.type, torch.bfloat16)


def share(value: Tensor | float, scale: float) -> float:
    """``value`` as a share of ``scale``; NaN stays NaN."""
    return float(value) / max(scale, TINY)


def structure_length(subject: Subject) -> int:
    """Tokens enough for the approximate part of the attention to take part, with a last segment that is not whole."""
    config = subject.loaded.model_config
    length = max(64, *(_length_for(form) for form in forms_of(config).values()))
    return min(length, config.max_positions) if config.positions == "learned" else length


def _length_for(form: Form) -> int:
    if form.exact_up_to is None:
        return 128
    if form.window is not None:
        return form.window.segment_length * (form.window.segments + 4) + form.window.segment_length // 2
    return 3 * form.exact_up_to + 5


def probed_length(subject: Subject, scored: int = 0) -> int:
    """Tokens up to which the gate looks: of the structure, of the training, and of what is to be scored."""
    config = subject.loaded.model_config
    length = max(structure_length(subject), subject.trained_length, scored)
    return min(length, config.max_positions) if config.positions == "learned" else length


def positions_at_edges(subject: Subject, length: int) -> list[int]:
    """Positions t < length - 1 on both sides of the edges of segments and of powers of two, ascending."""
    windows = (form.window for form in forms_of(subject.loaded.model_config).values())
    step = min((window.segment_length for window in windows if window is not None), default=max(length // 8, 1))
    powers = [2**i for i in range(3, length.bit_length())]
    edges = {e + side for e in [*range(0, length, step), *powers] for side in (-2, -1, 0, 1)}
    return sorted(t for t in {0, *edges, length - 2} if 0 <= t < length - 1)


def check_positions(subject: Subject, length: int, settings: ValiditySettings) -> list[int]:
    """Positions t < length - 1 to look at: both sides of edges first, then seeded random ones."""
    rng = np.random.default_rng(settings.seed)
    edges = positions_at_edges(subject, length)
    if len(edges) > settings.positions:  # evenly thinned, so that late segments are among them
        edges = [edges[i] for i in np.linspace(0, len(edges) - 1, settings.positions).astype(int)]
    others = [int(t) for t in rng.permutation(length - 1) if t not in set(edges)]
    return sorted(edges + others[: settings.positions - len(edges)])


def text_of(subject: Subject, length: int, seed: int) -> Tensor:
    """Held-out text where there is some (trained models are sharpest there), else random tokens. (length,) int64.

    From a place that depends on the weights: what a model does on the first tokens of its held-out text is what its
    training has most likely been looked at with.
    """
    mixed = int(hashlib.sha256(f"{subject.loaded.weights_hash} {seed}".encode()).hexdigest()[:8], 16)
    if subject.shards is not None and subject.shards.num_tokens >= length:
        start = np.random.default_rng(mixed).integers(subject.shards.num_tokens - length + 1, size=1)
        return torch.from_numpy(np.asarray(subject.shards.read(start.astype(np.int64), length))[0])
    return random_ids(subject, length, seed)


def ordinary_ids(subject: Subject) -> Tensor:
    """Ids of the model's vocabulary that are no special tokens, ascending. (N,) int64."""
    vocab = subject.loaded.model_config.vocab_size or 0
    special = [i for i in subject.loaded.tokenizer.special_ids if i < vocab]
    kept = torch.ones(vocab, dtype=torch.bool)
    kept[special] = False
    ordinary = kept.nonzero()[:, 0]
    if len(ordinary) < 2:
        raise UserError(f"a vocabulary of {vocab} has no two ordinary tokens to check the model with")
    return ordinary


def random_ids(subject: Subject, length: int, seed: int) -> Tensor:
    """Seeded random ordinary tokens, (length,) int64."""
    ordinary = ordinary_ids(subject)
    return ordinary[torch.randint(len(ordinary), (length,), generator=torch.Generator().manual_seed(seed))]


def different(tokens: Tensor, subject: Subject, seed: int) -> Tensor:
    """As many ordinary tokens, each another than the one in its place."""
    ordinary = ordinary_ids(subject)
    count = len(ordinary)
    shift = torch.randint(1, count, tokens.shape, generator=torch.Generator().manual_seed(seed))
    return ordinary[(torch.searchsorted(ordinary, tokens) + shift) % count]


def padded(rows: Sequence[Tensor], width: int, fill: Callable[[int], Tensor]) -> tuple[Tensor, Layout]:
    """Rows of unequal length in one batch (B, width), ``fill(count)`` behind each, and its layout."""
    ids = torch.stack([torch.cat([row, fill(width - len(row))]) for row in rows])
    return ids, Layout.from_lengths(torch.tensor([len(row) for row in rows]), width)
