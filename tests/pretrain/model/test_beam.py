"""Beam search beside exhaustive search, a search without a cache, and greedy decoding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from data_pipeline.errors import UserError
from pretrain.model import ModelConfig, build_model
from pretrain.model.beam import beam_search
from pretrain.model.generation import generate
from pretrain.model.transformer import NystromformerLM

STOP = 0


def decoder(vocab_size: int = 5, **changes: object) -> NystromformerLM:
    torch.manual_seed(0)
    values: dict[str, object] = {
        "objective": "clm", "vocab_size": vocab_size, "hidden_size": 16, "num_layers": 2, "num_heads": 2,
        "segment_length": 4, "conv_kernel": 5, "init_std": 0.5,
    }  # fmt: skip
    return build_model(ModelConfig.model_validate(values | changes)).double().eval()


def log_p(model: NystromformerLM, prompt: Sequence[int], continuation: Sequence[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *continuation]])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(continuation)[:, None]).sum())


@pytest.mark.parametrize(("stops", "penalty"), [(None, 1.0), (STOP, 0.0), (STOP, 1.0), (STOP, 3.0)])
def test_a_search_wide_enough_finds_the_best_of_all_continuations(stops: int | None, penalty: float) -> None:
    model, length = decoder(), 3
    prompts = [[1, 2, 3], [4], [2, 2, 0, 1, 3, 4, 1]]
    texts, scores = beam_search(
        model, prompts, beams=5**length, max_new_tokens=length, length_penalty=penalty, stop_id=stops
    )
    for prompt, text, score in zip(prompts, texts, scores, strict=True):
        tokens = range(5) if stops is None else range(1, 5)
        every = {c: log_p(model, prompt, c) for c in itertools.product(tokens, repeat=length)}
        if stops is not None:
            for n in range(length):
                every |= {c: log_p(model, prompt, [*c, STOP]) for c in itertools.product(tokens, repeat=n)}
        best = max(every, key=lambda c: every[c] / min(len(c) + 1, length) ** penalty)
        assert tuple(text) == best
        assert score == pytest.approx(every[best], abs=1e-9)


def plain_search(
    model: NystromformerLM, prompt: list[int], beams: int, steps: int, stops: Sequence[int], penalty: float
) -> tuple[list[int], float]:
    """The search with a full forward pass over every beginning."""
    alive: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    ended: list[tuple[tuple[int, ...], float]] = []
    for step in range(steps):
        candidates = []
        for text, score in alive:
            with torch.no_grad():
                log_p = model(torch.tensor([[*prompt, *text]])).logits[0, -1].log_softmax(-1).tolist()
            candidates += [(text, token, score + log_p[token]) for token in range(len(log_p))]
        candidates.sort(key=lambda candidate: -candidate[2])
        ended += [(text, score) for text, token, score in candidates[:beams] if token in stops]
        alive = [((*text, token), score) for text, token, score in candidates if token not in stops][:beams]
        if len(ended) >= beams and step + 1 < steps:
            alive = []
            break
    text, score = max([*ended, *alive[:1]], key=lambda pair: pair[1] / min(len(pair[0]) + 1, steps) ** penalty)
    return list(text), score


@pytest.mark.parametrize("changes", [{}, {"attention": "softmax"}, {"positions": "learned", "max_positions": 12}])
def test_beams_over_the_cache_equal_a_search_without_one(changes: dict[str, object]) -> None:
    model = decoder(23, **changes)
    prompts = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10]]
    steps = 6 if "max_positions" in changes else 14
    often = often_said(model, prompts, steps)
    ends = 0
    for beams, stops, penalty in (
        (3, [], 1.0), (3, [STOP], 0.0), (3, [5], 0.7), (3, often[:1], 1.0), (2, often[:2], 0.5), (5, often[:3], 3.0),
    ):  # fmt: skip
        texts, scores = beam_search(
            model, prompts, beams=beams, max_new_tokens=steps, length_penalty=penalty, stop_id=stops
        )
        for prompt, text, score in zip(prompts, texts, scores, strict=True):
            wanted, wanted_score = plain_search(model, prompt, beams, steps, stops, penalty)
            assert text == wanted
            assert score == pytest.approx(wanted_score, abs=1e-8)
            ends += len(text) < steps
            stop_log_p = [log_p(model, prompt, [*text, stop]) for stop in stops] if len(text) < steps else []
            whole = max(stop_log_p) if stop_log_p else log_p(model, prompt, text)
            assert score == pytest.approx(whole, abs=1e-8)  # with that of its stop
    assert ends > 3


def often_said(model: NystromformerLM, prompts: Sequence[Sequence[int]], steps: int) -> list[int]:
    """Tokens that greedy decoding says after several of them first: stops that end something."""
    said = [row[steps // 2] for row in generate(model, prompts, max_new_tokens=steps, temperature=0)]
    return list(dict.fromkeys(said))


def test_one_beam_is_greedy_and_mistakes_are_named() -> None:
    model = decoder(23)
    prompts = [[1, 2, 3], [4]]
    texts, _ = beam_search(model, prompts, beams=1, max_new_tokens=12)
    greedy = generate(model, prompts, max_new_tokens=12, temperature=0)
    assert texts == greedy
    for stops in ([STOP], [greedy[0][7]], [greedy[1][4], greedy[0][11]]):
        wanted = generate(model, prompts, max_new_tokens=12, temperature=0, stop_id=stops)
        for penalty in (0.0, 1.0, 3.0):
            texts, _ = beam_search(model, prompts, beams=1, max_new_tokens=12, length_penalty=penalty, stop_id=stops)
            assert texts == wanted
    assert beam_search(model, prompts, beams=2, max_new_tokens=0) == ([[], []], [0.0, 0.0])
    with pytest.raises(UserError, match="at least 1 beam, got 0"):
        beam_search(model, prompts, beams=0, max_new_tokens=1)
    with pytest.raises(UserError, match=r"length_penalty -1\.0 must not be negative"):
        beam_search(model, prompts, beams=2, max_new_tokens=1, length_penalty=-1.0)
    with pytest.raises(UserError, match="token 23 is outside"):
        beam_search(model, [[23]], beams=2, max_new_tokens=1)
