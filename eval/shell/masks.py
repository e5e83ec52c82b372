"""Masks in a text, and what a masked model puts in their places."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from data_pipeline.errors import UserError
from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.shell.texts import Given
from eval.subject import Subject

USUAL_NAMES = ("[MASK]", "<mask>")
"""Read as a mask whatever the tokenizer calls its own."""


@dataclass(frozen=True)
class Candidate:
    """A token for a mask. ``token``: its text, with the space before a word where it has one; of a special token, or a
    part of a character, its name in the vocabulary."""

    token: str
    id: int
    probability: float


@dataclass(frozen=True)
class Filled:
    """A text with the likeliest tokens for each of its masks, in their order."""

    text: str
    masks: list[list[Candidate]]


def masked_ids(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of a text, and the places of its masks among them.

    The space before a mask belongs to the masked word, as it does in the vocabulary (transformers' RoBERTa: lstrip).
    Raises ValueError without a mask. The tokenizer must have one.
    """
    mask_id = tokenizer.mask_id
    assert mask_id is not None  # without one a masked model is not loaded
    names = {tokenizer.name_of(mask_id), *USUAL_NAMES}
    pieces = re.split("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)), text)
    if len(pieces) == 1:
        raise ValueError("no mask")
    ids: list[int] = []
    places: list[int] = []
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        ids += tokenizer.encode(piece if last else piece.removesuffix(" "))
        if not last:
            places.append(len(ids))
            ids.append(mask_id)
    return ids, places


def fill(subject: Subject, given: Given, top: int) -> Filled:
    """The ``top`` likeliest tokens for each mask of a text, the likeliest first.

    Each mask is filled by itself: the probability of a token is that with all masks left as they are. Raises
    :class:`UserError` for a text without a mask or longer than the learned positions, and for logits that are not
    finite.
    """
    tokenizer, config = subject.loaded.tokenizer, subject.loaded.model_config
    try:
        ids, places = masked_ids(given.text, tokenizer)
    except ValueError:
        raise UserError(
            f"{given.where}: there is no mask in the text: write [MASK] where a word is to be filled in"
        ) from None
    if config.positions == "learned" and len(ids) > config.max_positions:
        raise UserError(
            f"{given.where}: a text of {len(ids)} tokens is longer than the {config.max_positions} learned positions "
            "of the model (model.max_positions): shorten it"
        )
    hidden = torch.zeros(1, len(ids), dtype=torch.bool)
    hidden[0, places] = True
    logits = subject.target_logits(torch.tensor([ids]), hidden)
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite, no token can be chosen: have its weights diverged?")
    best = logits.double().softmax(-1).topk(min(top, logits.shape[-1]), dim=-1)
    return Filled(
        given.text,
        [
            [Candidate(token_text(tokenizer, i), i, p) for i, p in zip(ids, values, strict=True)]
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
    )


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token by itself, or its name where it has none."""
    text = tokenizer.decode([token])
    return text if text and "�" not in text else tokenizer.name_of(token) or f"<{token}>"
