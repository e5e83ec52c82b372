"""From logits to a token: penalty, temperature, top-k, top-p, and a draw, for all rows of a batch at once.

Everything is on the CPU in float64. The same logits and noise then give the same token on every machine (sums on a GPU
have no fixed order), and a sum over a large vocabulary is exact enough for any ``top_p``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; what is listed first happens first. Raises :class:`UserError` for bad settings."""

    repetition_penalty: float = 1.0
    """Positive logits of tokens that were in the text are divided by it, negative ones multiplied (Keskar et al. 2019,
    section 4.1); 1 changes nothing."""
    temperature: float = 0.8
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int | None = 50
    """Only so many of the likeliest tokens, and what ties with the last of them; None or 0 for all."""
    top_p: float | None = None
    """Only the smallest set of likeliest tokens whose probability reaches this (Holtzman et al. 2020); None for all."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature {self.temperature} must not be negative: 0 takes the most likely token")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must not be negative: leave it out, or 0, for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1: 1 is for all tokens")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition_penalty {self.repetition_penalty} must be above 0: 1 changes nothing")

    def choose(self, logits: Tensor, noise: Tensor, seen: Tensor | None = None) -> Tensor:
        """One token for each row: (B,) int64.

        logits: (B, V). noise: (B,) float64 in [0, 1), uniform; a row's token depends on its own logits and noise only.
        seen: (B, V) bool, tokens of the text so far, for the penalty. Raises :class:`UserError` for logits that are not
        finite.
        """
        logits = logits.double().cpu()
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite, no token can be chosen: have its weights diverged?")
        if seen is not None and self.repetition_penalty != 1:
            logits = penalize(logits, seen, self.repetition_penalty)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # The difference to the largest: a quotient by a tiny temperature may be minus infinity and not infinity.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        return draw(logits.softmax(dim=-1), noise)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Keskar et al. 2019 (arXiv 1909.05858), section 4.1, with the sign of the logit minded as transformers does."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """(B, V): minus infinity for what is less than the k-th largest of its row."""
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """(B, V): minus infinity outside the nucleus, the smallest set of likeliest tokens whose probability is at least p
    (Holtzman et al. 2020, arXiv 1904.09751, section 3.1); never empty."""
    ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    return logits.masked_fill((before >= p).scatter(-1, order, before >= p), -torch.inf)


def draw(probabilities: Tensor, noise: Tensor) -> Tensor:
    """(B, V) and uniform noise (B,) -> (B,): the token at which the running sum passes the noise."""
    sums = probabilities.cumsum(dim=-1)
    total = sums[:, -1:]
    tokens = torch.searchsorted(sums, noise[:, None] * total, right=True).squeeze(-1)
    return tokens.minimum((sums < total).sum(dim=-1))  # a product that is rounded up to the total finds no token


def uniform_noise(seeds: Sequence[int], count: int) -> Tensor:
    """(rows, count) float64 in [0, 1): each row from a generator of its own, torch's random state left alone."""
    rows = [torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)
