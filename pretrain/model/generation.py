"""Text from a causal model: prompts in one forward pass, then a token for each at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import cast, overload

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.model.attention.layout import Layout
from pretrain.model.decoding import DecodingCache, decode, prefill
from pretrain.model.sampling import Sampling, uniform_noise
from pretrain.model.transformer import NystromformerLM

OnTokens = Callable[[list[int], list[int]], Collection[int]]
"""Is given the rows that are being written and the token of each; returns the rows that end with this token."""


@overload
def generate(
    model: NystromformerLM,
    prompts: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    repetition_penalty: float = ...,
    seed: int | Sequence[int] = ...,
    stop_id: int | Sequence[int] | None = ...,
    on_tokens: OnTokens | None = ...,
) -> list[int]: ...


@overload
def generate(
    model: NystromformerLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    repetition_penalty: float = ...,
    seed: int | Sequence[int] = ...,
    stop_id: int | Sequence[int] | None = ...,
    on_tokens: OnTokens | None = ...,
) -> list[list[int]]: ...


@torch.no_grad()
def generate(
    model: NystromformerLM,
    prompts: Sequence[int] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop_id: int | Sequence[int] | None = None,
    on_tokens: OnTokens | None = None,
) -> list[int] | list[list[int]]:
    """Continue a prompt, or a batch of prompts of any lengths: the new tokens of each, at most ``max_new_tokens``.

    temperature, top_k, top_p, repetition_penalty: see :class:`Sampling`. seed: row i draws from a generator of its own,
    seeded with ``seed + i``, or with its own of a sequence of seeds. So a row's text is the same alone and in any
    batch, as far as its logits are. Those are equal up to rounding, which can decide between two tokens that are nearly
    equally likely. The random state of torch is left alone. ``stop_id``: a row ends before the first of these tokens
    and leaves the batch.

    ``on_tokens`` is called at each step with the tokens just chosen, those of ``stop_id`` too: for streaming, and for
    ends that are not a single token. A row that it returns ends after its token.

    A model with learned positions sees the last ``max_positions`` tokens of a text only; beyond them every step runs
    all of those through the model again, for their positions change.

    Raises :class:`UserError` for a masked model, an empty prompt, tokens outside the vocabulary, or a bad setting.
    """
    single = not len(prompts) or isinstance(prompts[0], Integral)
    rows = cast("Sequence[Sequence[int]]", [prompts] if single else prompts)
    stops = list(stop_id) if isinstance(stop_id, Sequence) else [] if stop_id is None else [stop_id]
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + i for i in range(len(rows))]
    check_request(model, rows, stops, seeds, max_new_tokens)
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p)

    vocabulary = model.head.decoder.out_features
    noise = uniform_noise(seeds, max_new_tokens)
    written = torch.zeros(len(rows), max_new_tokens, dtype=torch.int64)
    counts = torch.zeros(len(rows), dtype=torch.int64)
    seen = _occurring(rows, vocabulary) if repetition_penalty != 1 else None
    active = torch.arange(len(rows))  # rows that have not ended
    text = Texts(model, rows, max_new_tokens)
    with evaluation_mode(model):
        for step in range(max_new_tokens):
            logits = text.logits()
            tokens = sampling.choose(logits, noise[active, step], None if seen is None else seen[active])
            ended = () if on_tokens is None else on_tokens(active.tolist(), tokens.tolist())
            kept = ~torch.isin(tokens, torch.tensor(stops, dtype=torch.int64))
            written[active[kept], step] = tokens[kept]
            counts[active[kept]] += 1
            going = kept & ~torch.isin(active, torch.tensor(sorted(ended), dtype=torch.int64))
            active, tokens = active[going], tokens[going]
            if not len(active):
                break
            if seen is not None:
                seen[active, tokens] = True
            text.append(tokens, going.nonzero().flatten())
    new = [row[:count].tolist() for row, count in zip(written, counts, strict=True)]
    return new[0] if single else new


class Texts:
    """The texts of the rows that are being written, and the model's view of them."""

    def __init__(self, model: NystromformerLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.limit = model.config.max_positions if model.config.positions == "learned" else None
        self.max_length = max(map(len, prompts)) + max_new_tokens
        self.lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.tokens = torch.zeros(len(prompts), self.max_length, dtype=torch.int64)
        for row, prompt in zip(self.tokens, prompts, strict=True):
            row[: len(prompt)] = torch.as_tensor(prompt)
        self.cache: DecodingCache | None = None
        self.last: Tensor | None = None

    def append(self, tokens: Tensor, rows: Tensor) -> None:
        """Go on with these rows, (R,) int64, in this order and possibly several times, and one more token for each."""
        if not torch.equal(rows, torch.arange(len(self.lengths))):
            self.tokens, self.lengths = self.tokens[rows], self.lengths[rows]
            if self.cache is not None:
                self.cache.keep(rows.tolist())
        self.tokens[torch.arange(len(rows)), self.lengths] = tokens
        self.lengths += 1
        self.last = tokens

    def logits(self) -> Tensor:
        """(R, V) after the last tokens."""
        longest = int(self.lengths.max())
        if self.cache is not None and self.last is not None and (self.limit is None or longest <= self.limit):
            return decode(self.model, self.last.to(self.device), self.cache)
        # The prompts, or the end of a text that has outgrown the learned positions.
        sizes = self.lengths if self.limit is None else self.lengths.clamp(max=self.limit)
        width = int(sizes.max())
        columns = torch.arange(width)
        index = (self.lengths - sizes)[:, None] + torch.where(columns < sizes[:, None], columns, 0)
        most = self.max_length if self.limit is None else min(self.max_length, self.limit)
        ids = self.tokens.gather(1, index).to(self.device)
        logits, self.cache = prefill(self.model, ids, Layout.from_lengths(sizes, width), max_length=most)
        return logits


def check_request(
    model: NystromformerLM,
    prompts: Sequence[Sequence[int]],
    stops: Iterable[int],
    seeds: Sequence[int],
    max_new_tokens: int,
) -> None:
    """Raise :class:`UserError` for what cannot be continued; see :func:`generate`."""
    vocabulary = model.config.vocab_size or 0
    if model.config.objective != "clm":
        raise UserError("only a causal model (objective: clm) can generate; this one is masked (objective: mlm)")
    for number, prompt in enumerate(prompts):
        which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "prompt"
        if not len(prompt):
            raise UserError(
                f"cannot generate from an empty prompt ({which}): give at least one token, for example the end-of-text "
                "token"
            )
        outside = [token for token in prompt if not 0 <= token < vocabulary]
        if outside:
            raise UserError(
                f"{which}: token {outside[0]} is outside the model's vocabulary of {vocabulary}: wrong tokenizer?"
            )
    never = [token for token in stops if not 0 <= token < vocabulary]
    if never:
        raise UserError(f"stop token {never[0]} is outside the model's vocabulary of {vocabulary}: wrong tokenizer?")
    if len(seeds) != len(prompts):
        raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for each, or a single number")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens {max_new_tokens} must not be negative")


def _occurring(prompts: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """(B, V) bool: the tokens of each prompt."""
    seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.as_tensor(prompt)] = True
    return seen


@contextmanager
def evaluation_mode(model: NystromformerLM) -> Iterator[None]:
    """Without dropout inside, as it was outside."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
