"""Text from a causal model, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.model.transformer import NystromformerLM


@torch.no_grad()
def generate(
    model: NystromformerLM,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
    stop_id: int | None = None,
) -> list[int]:
    """Continue a prompt; returns the new tokens only, at most ``max_new_tokens``, ending before ``stop_id``.

    temperature: 0 takes the most likely token. top_k: sample among that many, None or 0 for all. The same seed gives
    the same tokens: sampling happens on the CPU with a generator of its own and leaves torch's random state alone.

    Every step runs the whole text so far (its prefix's logits would not change, so this is exact): a step costs a
    forward pass. A model with learned positions sees the last ``max_positions`` tokens only.

    Raises :class:`UserError` for a masked model, an empty prompt, tokens outside the vocabulary, or a bad setting.
    """
    config = model.config
    vocabulary = config.vocab_size or 0
    if config.objective != "clm":
        raise UserError("only a causal model (objective: clm) can generate; this one is masked (objective: mlm)")
    if not prompt_ids:
        raise UserError(
            "cannot generate from an empty prompt: give at least one token, for example the end-of-text token"
        )
    outside = [token for token in prompt_ids if not 0 <= token < vocabulary]
    if outside:
        raise UserError(
            f"prompt token {outside[0]} is outside the model's vocabulary of {vocabulary}: wrong tokenizer?"
        )
    if max_new_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 0):
        raise UserError(
            f"max_new_tokens {max_new_tokens}, temperature {temperature} and top_k {top_k} must not be negative"
        )

    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)
    context = config.max_positions if config.positions == "learned" else None
    tokens = list(prompt_ids)
    training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            seen = tokens if context is None else tokens[-context:]
            states = model(torch.tensor([seen], device=device), hidden=True).hidden
            token = _sample(model.head(states[0, -1:])[0].float().cpu(), temperature, top_k, random)
            if token == stop_id:
                break
            tokens.append(token)
    finally:
        model.train(training)
    return tokens[len(prompt_ids) :]


def _sample(logits: Tensor, temperature: float, top_k: int | None, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k and top_k < logits.numel():
        logits, tokens = logits.topk(top_k)
    else:
        tokens = torch.arange(logits.numel())
    chosen = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=random)
    return int(tokens[chosen])
