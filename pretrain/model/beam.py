"""Beam search: the best continuation that a search of limited width finds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data_pipeline.errors import UserError
from pretrain.model.generation import Texts, check_request, evaluation_mode
from pretrain.model.transformer import NystromformerLM


@torch.no_grad()
def beam_search(
    model: NystromformerLM,
    prompts: Sequence[Sequence[int]],
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    stop_id: int | Sequence[int] | None = None,
) -> tuple[list[list[int]], list[float]]:
    """For each prompt the best continuation found, and its log probability in nats, that of its stop included.

    Of every prompt the ``beams`` likeliest beginnings are kept at each step, those of all prompts in one batch; one of
    them is greedy decoding. A continuation ends before the first of ``stop_id``, if that stop is among the ``beams``
    likeliest next tokens of all its prompt's beams, or after ``max_new_tokens``. The best has the largest log
    probability / length ** ``length_penalty``, the stop counted. 1 compares means over tokens. 0 compares whole texts,
    and the likeliest text of most models is the empty one (Stahlberg and Byrne 2019, arXiv 1908.10090). A prompt is
    done when ``beams`` of its continuations have ended (``early_stopping=True`` in transformers) or no open one can
    still win.

    Raises :class:`UserError` as :func:`generate` does, for fewer than one beam and a negative penalty.
    """
    stops = list(stop_id) if isinstance(stop_id, Sequence) else [] if stop_id is None else [stop_id]
    check_request(model, prompts, stops, [0] * len(prompts), max_new_tokens)
    if beams < 1:
        raise UserError(f"a beam search needs at least 1 beam, got {beams}")
    if not 0 <= length_penalty < float("inf"):
        raise UserError(f"length_penalty {length_penalty} must not be negative: 0 is for none")
    best: list[list[int]] = [[] for _ in prompts]
    best_log_p = torch.zeros(len(prompts), dtype=torch.float64)
    best_score = torch.full((len(prompts),), -torch.inf, dtype=torch.float64)
    ended = torch.zeros(len(prompts), dtype=torch.int64)  # continuations of each that a stop ended
    alive = torch.arange(len(prompts))  # prompts that are not done
    log_p = torch.zeros(len(prompts), 1, dtype=torch.float64)  # (P, K), of the beams of each of them
    written = torch.zeros(len(prompts), 1, 0, dtype=torch.int64)  # (P, K, steps)
    text = Texts(model, prompts, max_new_tokens)
    with evaluation_mode(model):
        for step in range(max_new_tokens):
            logits = text.logits().double().cpu()
            if not logits.isfinite().all():
                raise UserError("the model's logits are not finite, no token can be chosen: have its weights diverged?")
            width, vocabulary = log_p.shape[1], logits.shape[-1]
            total = log_p[:, :, None] + logits.log_softmax(-1).view(len(alive), width, vocabulary)
            if stops:
                # The likeliest candidates, stops and others alike: a stop that is not one of them ends nothing.
                values, chosen = total.flatten(1).topk(min(beams, width * vocabulary), dim=-1)
                stopped = torch.isin(chosen % vocabulary, torch.tensor(stops))
                ended[alive] += stopped.sum(-1)
                values, rank = values.masked_fill(~stopped, -torch.inf).max(-1)
                score = values / (step + 1) ** length_penalty
                for place in (score > best_score[alive]).nonzero().flatten().tolist():
                    prompt = alive[place]
                    best[prompt] = written[place, chosen[place, rank[place]] // vocabulary].tolist()
                    best_log_p[prompt], best_score[prompt] = values[place], score[place]
                total[:, :, stops] = -torch.inf
            number = min(beams, width * (vocabulary - len(set(stops))))
            log_p, chosen = total.flatten(1).topk(number, dim=-1)
            parents, tokens = chosen // vocabulary, chosen % vocabulary
            # Log probabilities only fall, so that this is the best that a beam can come to, at the last step exactly.
            reachable = log_p[:, 0] / max_new_tokens**length_penalty
            # Those of full length have ended too, and are compared with the rest.
            searching = (ended[alive] < beams) | (step + 1 == max_new_tokens)
            going = (searching & (reachable > best_score[alive])).nonzero().flatten()
            if not len(going):
                break
            alive, log_p, parents, tokens = alive[going], log_p[going], parents[going], tokens[going]
            written = torch.cat([written[going[:, None], parents], tokens[..., None]], dim=-1)
            if step + 1 == max_new_tokens:
                for place, prompt in enumerate(alive.tolist()):
                    best[prompt], best_log_p[prompt] = written[place, 0].tolist(), log_p[place, 0]
            else:
                text.append(tokens.flatten(), (going[:, None] * width + parents).flatten())
    return best, best_log_p.tolist()
