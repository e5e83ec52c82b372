"""What a model says to questions: likelihoods of the options, and its likeliest token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.subject import LOGIT_BUDGET
from eval.tasks.recall.questions import Ints, Questions

TOKENS = 2**14
"""Of a forward pass, about."""


def states_at(model: Any, inputs: Ints, at: Ints) -> Tensor:
    """Last hidden states (B, T, hidden) of ``inputs`` (B, N) at the positions ``at`` (B, T)."""
    device = next(model.parameters()).device
    hidden = model(torch.from_numpy(inputs).to(device), hidden=True).hidden
    places = torch.from_numpy(at).to(device)
    return hidden.gather(1, places[..., None].expand(*places.shape, hidden.shape[-1]))


@torch.inference_mode()
def answers(model: Any, inputs: Ints, questions: Questions) -> tuple[NDArray[np.float64], Ints]:
    """Log probabilities (B, T, K) of the options, in nats over the whole vocabulary, and the likeliest tokens (B, T).

    ``inputs``: the questions' own or one of their controls. The head runs on the questions' positions only.
    """
    device = next(model.parameters()).device
    log_p, likeliest = [], []
    rows = max(1, TOKENS // inputs.shape[1])
    for first in range(0, len(inputs), rows):
        part = slice(first, first + rows)
        states = states_at(model, inputs[part], questions.at[part]).flatten(0, 1)
        options = torch.from_numpy(questions.options[part]).to(device).flatten(0, 1)
        size = max(1, LOGIT_BUDGET // model.config.vocab_size)
        for some, choice in zip(states.split(size), options.split(size), strict=True):
            logits = model.head(some).float()
            log_p.append((logits.gather(1, choice) - logits.logsumexp(-1, keepdim=True)).double().cpu())
            likeliest.append(logits.argmax(-1).cpu())
    shape = questions.options.shape
    return torch.cat(log_p).numpy().reshape(shape), torch.cat(likeliest).numpy().reshape(shape[:2])


def items(model: Any, questions: Questions, *, controls: bool = True) -> list[dict[str, Any]]:
    """For each row its ``id`` and, a value for each question:

    - ``distance``, and ``nats``, -log p of the right answer.
    - ``exact``: the likeliest of all tokens is the right one.
    - ``right``: the likeliest option is, and ``chance``, one in the number of options; both absent with one option. Of
      options equally likely the first counts.

    With ``controls`` also

    - ``gain``: nats in the control ``without`` minus ``nats``; ``gain_other``: the same with the control ``other``.
    - ``calibrated``: as ``right`` for log p minus that in the control ``without``, which takes out what the model
      prefers anyhow (domain-conditional PMI: Holtzman et al. 2021, "Surface form competition", arXiv 2104.08315).
    """
    log_p, likeliest = answers(model, questions.inputs, questions)
    columns: dict[str, NDArray[Any]] = {
        "distance": questions.distance,
        "exact": (likeliest == questions.right).astype(np.int64),
        "nats": -_of_right(log_p, questions),
    }
    choice = log_p.shape[2] > 1
    if choice:
        columns["right"] = (log_p.argmax(2) == questions.answer).astype(np.int64)
        columns["chance"] = np.full(questions.at.shape, 1 / log_p.shape[2])
    if controls:
        without, _ = answers(model, questions.controls["without"], questions)
        columns["gain"] = _of_right(log_p - without, questions)
        if choice:
            columns["calibrated"] = ((log_p - without).argmax(2) == questions.answer).astype(np.int64)
        if "other" in questions.controls:
            other, _ = answers(model, questions.controls["other"], questions)
            columns["gain_other"] = _of_right(log_p - other, questions)
    return [
        {"id": name, **{key: values[row].tolist() for key, values in columns.items()}}
        for row, name in enumerate(questions.ids())
    ]


def sample(model: Any, questions: Questions, decode: Any, title: str) -> dict[str, Any]:
    """The first row's first question, to be looked at: the row shortened, and the model's ranking of the options."""
    questions = questions.first(1)
    log_p, likeliest = answers(model, questions.inputs, questions)
    at, distance = int(questions.at[0, 0]), int(questions.distance[0, 0])
    row, options = questions.inputs[0].tolist(), questions.options[0, 0].tolist()
    order = np.argsort(-log_p[0, 0], kind="stable")[:5].tolist()
    # A causal model answers one place before the answer's.
    source = at - distance
    pieces = [decode(row[low:high]) for low, high in _shortened(source, at, len(row))]
    return {
        "kind": "recall",
        "title": title,
        "prompt": " … ".join(pieces),
        "right": decode([int(questions.right[0, 0])]),
        "likeliest": decode([int(likeliest[0, 0])]),
        "ranking": [[decode([options[place]]), float(log_p[0, 0, place])] for place in order],
        "distance": distance,
    }


def _shortened(source: int, at: int, length: int, around: int = 12) -> list[tuple[int, int]]:
    """Stretches of a row around its beginning, the source of the answer and the question; overlapping ones joined."""
    wanted = [(0, around), (max(0, source - around), source + around), (max(0, at - around), at + 1)]
    joined: list[tuple[int, int]] = []
    for low, high in sorted((low, min(high, length)) for low, high in wanted):
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return [(low, min(high, at + 1)) for low, high in joined if low <= at]


def _of_right(values: NDArray[np.float64], questions: Questions) -> NDArray[np.float64]:
    return np.take_along_axis(values, questions.answer[..., None], axis=2)[..., 0]
