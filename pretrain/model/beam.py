"""Beam search: the likeliest continuation that a search of limited width finds."""

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
    stop_id: int | Sequence[int] | None = None,
) -> tuple[list[list[int]], list[float]]:
    """For each prompt the likeliest continuation found, and its log probability in nats, that of its stop included.

    Of every prompt the ``beams`` likeliest beginnings are kept at each step, those of all prompts in one batch; one of
    them is greedy decoding. A continuation ends before the first of ``stop_id`` or after ``max_new_tokens``. Scores
    are sums of log probabilities, not divided by a length: what is sought is the mode of the model, which is known to
    be short or repetitive (Holtzman et al. 2020). A prompt is done when nothing that goes on can still win.

    Raises :class:`UserError` as :func:`generate` does, and for fewer than one beam.
    """
    stops = list(stop_id) if isinstance(stop_id, Sequence) else [] if stop_id is None else [stop_id]
    check_request(model, prompts, stops, [0] * len(prompts), max_new_tokens)
    if beams < 1:
        raise UserError(f"a beam search needs at least 1 beam, got {beams}")
    best: list[list[int]] = [[] for _ in prompts]
    best_score = torch.full((len(prompts),), 0.0 if not max_new_tokens else -torch.inf, dtype=torch.float64)
    alive = torch.arange(len(prompts))  # prompts that are not done
    scores = torch.zeros(len(prompts), 1, dtype=torch.float64)  # (P, K), of the beams of each of them
    written = torch.zeros(len(prompts), 1, 0, dtype=torch.int64)  # (P, K, steps)
    text = Texts(model, prompts, max_new_tokens)
    with evaluation_mode(model):
        for step in range(max_new_tokens):
            logits = text.logits().double().cpu()
            if not logits.isfinite().all():
                raise UserError("the model's logits are not finite, no token can be chosen: have its weights diverged?")
            width, vocabulary = scores.shape[1], logits.shape[-1]
            total = scores[:, :, None] + logits.log_softmax(-1).view(len(alive), width, vocabulary)
            if stops:
                ended, beam = total[:, :, stops].amax(-1).max(-1)
                for place in (ended > best_score[alive]).nonzero().flatten().tolist():
                    best[alive[place]] = written[place, beam[place]].tolist()
                    best_score[alive[place]] = ended[place]
                total[:, :, stops] = -torch.inf
            number = min(beams, width * (vocabulary - len(set(stops))))
            scores, chosen = total.flatten(1).topk(number, dim=-1)
            parents, tokens = chosen // vocabulary, chosen % vocabulary
            # Log probabilities only fall: a prompt whose best beam is behind what has ended is done.
            going = (scores[:, 0] > best_score[alive]).nonzero().flatten()
            if not len(going):
                break
            alive, scores, parents, tokens = alive[going], scores[going], parents[going], tokens[going]
            written = torch.cat([written[going[:, None], parents], tokens[..., None]], dim=-1)
            if step + 1 < max_new_tokens:
                text.append(tokens.flatten(), (going[:, None] * width + parents).flatten())
        else:
            for place, prompt in enumerate(alive.tolist() if max_new_tokens else []):
                best[prompt], best_score[prompt] = written[place, 0].tolist(), scores[place, 0]
    return best, best_score.tolist()
