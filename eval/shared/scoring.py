"""How held-out tokens are scored, and what the records of their losses are turned into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.results.parts import Job, Parts
from eval.results.schema import Estimator, Metric
from eval.results.statistics import bootstrap
from eval.shared.progress import Progress
from eval.subject import LOGIT_BUDGET, Subject, batches
from pretrain.model.attention.layout import Layout

LOG2E = 1 / math.log(2)
# Tokens in one forward pass: the widest activations of a base model (4 x 768) are 200 MiB then.
FORWARD_TOKENS = 2**14
# Tokens that a part runs through the model: 10 to 20 s on a processor's core for a model of 5M parameters.
PART_TOKENS = 2**17


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of the empirical distribution of ``counts``: the loss of the best model without context."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def rows_of(length: int) -> int:
    """Rows of ``length`` tokens in one forward pass."""
    return max(1, FORWARD_TOKENS // length)


@torch.inference_mode()
def score(
    subject: Subject, inputs: Tensor, chosen: Tensor, goal: Tensor, layout: Layout | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """-log p in nats (T,) float64 of the tokens ``goal`` (T,), and whether each is the likeliest, at the positions
    where ``chosen`` (B, N) bool is set, row by row, of ``inputs`` (B, N). ``layout`` tells padding (default: none).

    The head runs on those positions only, and on no more at a time than the budget of logits allows.
    """
    device = subject.device
    hidden = subject.model(inputs.to(device), layout=layout, hidden=True).hidden[chosen.to(device)]
    goal = goal.to(device)
    nats, hits = [], []
    for part in batches(len(goal), max(1, LOGIT_BUDGET // (subject.loaded.model_config.vocab_size or 1))):
        logits = subject.model.head(hidden[part]).float()
        nats.append(torch.nn.functional.cross_entropy(logits, goal[part], reduction="none").double().cpu().numpy())
        hits.append((logits.argmax(-1) == goal[part]).cpu().numpy())
    if not nats:
        return np.zeros(0), np.zeros(0, dtype=bool)
    return np.concatenate(nats), np.concatenate(hits)


def metrics_of(
    records: Sequence[dict[str, Any]], estimators: dict[str, Estimator], better: bool | None = False
) -> dict[str, Metric]:
    """A metric for each estimator with its 95% interval over the records, counted in its denominator: tokens, bytes,
    words or targets."""
    found = {}
    for name, item in estimators.items():
        over, counted = bootstrap(records, item), item.denominator or "tokens"
        n, unit = int(sum(record[counted] for record in records)), counted.removesuffix("_clean")
        found[name] = Metric(over.value, better, n=n, low=over.low, high=over.high, unit=unit)
    return found


def run_parts(parts: Parts, jobs: Sequence[Job], title: str) -> list[Any]:
    """The values of the jobs; meanwhile it is told how many of them are done."""
    with Progress(len(parts.share(jobs)), title, "part") as bar:

        def seen(job: Job) -> Job:
            name, work = job

            def value() -> Any:
                found = work()
                bar.update()
                return found

            return name, value

        return parts.map([seen(job) for job in jobs])
