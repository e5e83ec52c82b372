"""Generation: deterministic by seed, exact by the prefix property, clear about mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_pipeline.errors import UserError
from pretrain.model import ModelConfig, build_model
from pretrain.model.generation import generate
from pretrain.model.transformer import NystromformerLM


def decoder(**changes: object) -> NystromformerLM:
    torch.manual_seed(0)
    values: dict[str, object] = {
        "objective": "clm",
        "vocab_size": 23,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "segment_length": 4,
        "conv_kernel": 5,
        "init_std": 0.5,
    }
    return build_model(ModelConfig.model_validate(values | changes)).double()


def test_same_seed_same_text_other_seed_other_text() -> None:
    model = decoder()
    state = torch.random.get_rng_state()
    first = generate(model, [1, 2, 3], max_new_tokens=30, temperature=2.0, seed=1)
    assert generate(model, [1, 2, 3], max_new_tokens=30, temperature=2.0, seed=1) == first
    assert generate(model, [1, 2, 3], max_new_tokens=30, temperature=2.0, seed=2) != first
    assert len(first) == 30
    assert all(0 <= token < 23 for token in first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_greedy_takes_the_most_likely_token_of_one_full_pass() -> None:
    model = decoder()
    prompt = [4, 5]
    new = generate(model, prompt, max_new_tokens=25, temperature=0)
    model.eval()
    best = model(torch.tensor([prompt + new])).logits[0].argmax(-1).tolist()
    assert best[1:-1] == new
    assert generate(model, prompt, max_new_tokens=25, temperature=5.0, top_k=1) == new


def test_top_k_stays_among_the_likeliest() -> None:
    model = decoder().eval()
    likeliest = model(torch.tensor([[7]])).logits[0, -1].topk(3).indices.tolist()
    drawn = {generate(model, [7], max_new_tokens=1, temperature=5.0, top_k=3, seed=s)[0] for s in range(60)}
    assert drawn == set(likeliest)
    everything = {generate(model, [7], max_new_tokens=1, temperature=50.0, top_k=None, seed=s)[0] for s in range(60)}
    assert len(everything) > 3


def test_stops_before_the_stop_token_and_restores_training_mode() -> None:
    model = decoder().train()
    whole = generate(model, [1], max_new_tokens=20, temperature=3.0)
    stop = whole[7]
    assert generate(model, [1], max_new_tokens=20, temperature=3.0, stop_id=stop) == whole[: whole.index(stop)]
    assert model.training
    assert generate(model, [1], max_new_tokens=0) == []
    several = generate(model, [1], max_new_tokens=20, temperature=3.0, stop_id=[stop, whole[3]])
    assert several == whole[: min(whole.index(stop), whole.index(whole[3]))]


PROMPTS = [[1], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [2, 3, 3], [20] * 6]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 2.0},
        {"temperature": 2.0, "stop_id": [0, 1, 5]},
        {"temperature": 1.5, "top_k": None, "top_p": 0.9, "repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_rows_text_does_not_depend_on_its_batch(settings: dict[str, Any], positions: str) -> None:
    """Also where rows have ended, and where rows outgrow the learned positions one after another."""
    model = decoder(positions=positions, max_positions=16)
    together = generate(model, PROMPTS, max_new_tokens=20, seed=3, **settings)
    assert together == [generate(model, p, max_new_tokens=20, seed=3 + i, **settings) for i, p in enumerate(PROMPTS)]
    if "stop_id" in settings:
        assert len({len(text) for text in together}) > 1
    back = generate(model, PROMPTS[::-1], max_new_tokens=20, seed=[6, 5, 4, 3], **settings)
    assert back[::-1] == together


def test_repetition_penalty_counts_prompt_and_new_tokens() -> None:
    model = decoder().eval()
    text = [4, 5]
    for token in generate(model, text, max_new_tokens=15, temperature=0, repetition_penalty=1.4):
        logits = model(torch.tensor([text])).logits[0, -1].tolist()
        for seen in set(text):
            logits[seen] = logits[seen] / 1.4 if logits[seen] > 0 else logits[seen] * 1.4
        assert token == max(range(23), key=logits.__getitem__)
        text.append(token)
    assert text[2:] != generate(model, [4, 5], max_new_tokens=15, temperature=0)


def test_tiny_nucleus_is_greedy() -> None:
    model = decoder()
    greedy = generate(model, [4, 5], max_new_tokens=12, temperature=0)
    assert generate(model, [4, 5], max_new_tokens=12, temperature=3.0, top_p=1e-9) == greedy


def test_learned_positions_slide() -> None:
    """Beyond the positions each token follows from the last ``max_positions`` alone."""
    model = decoder(positions="learned", max_positions=8).eval()
    for prompt in ([1, 2], list(range(11))):
        new = generate(model, prompt, max_new_tokens=15, temperature=0)
        text = prompt + new
        for t in range(len(prompt), len(text)):
            assert text[t] == model(torch.tensor([text[max(t - 8, 0) : t]])).logits[0, -1].argmax()


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="objective: mlm"):
        generate(decoder(objective="mlm"), [1], max_new_tokens=1)
    with pytest.raises(UserError, match="empty prompt"):
        generate(decoder(), [], max_new_tokens=1)
    with pytest.raises(UserError, match="token 23 is outside"):
        generate(decoder(), [1, 23], max_new_tokens=1)
    with pytest.raises(UserError, match="must not be negative"):
        generate(decoder(), [1], max_new_tokens=1, temperature=-1.0)
    with pytest.raises(UserError, match="must not be negative"):
        generate(decoder(), [1], max_new_tokens=-1)
    with pytest.raises(UserError, match="prompt 1 of 2"):
        generate(decoder(), [[1], []], max_new_tokens=1)
    with pytest.raises(UserError, match="stop token 23"):
        generate(decoder(), [1], max_new_tokens=1, stop_id=[2, 23])
    with pytest.raises(UserError, match="1 seeds for 2 prompts"):
        generate(decoder(), [[1], [2]], max_new_tokens=1, seed=[7])


def test_tokens_are_told_as_they_are_chosen_and_change_nothing() -> None:
    model = decoder()
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 2.0, "seed": 3, "stop_id": [0, 1, 5]}
    told: list[list[int]] = [[] for _ in PROMPTS]

    def on_tokens(rows: list[int], tokens: list[int]) -> list[int]:
        for row, token in zip(rows, tokens, strict=True):
            told[row].append(token)
        return []

    plain = generate(model, PROMPTS, **settings)
    assert generate(model, PROMPTS, on_tokens=on_tokens, **settings) == plain
    assert [[t for t in row if t not in (0, 1, 5)] for row in told] == plain
    assert any(len(row) > len(text) for row, text in zip(told, plain, strict=True))  # the stops are told too


def test_a_row_ends_after_the_token_when_it_is_told_to() -> None:
    model = decoder()
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 2.0, "seed": 3, "repetition_penalty": 1.2}
    plain = generate(model, PROMPTS, **settings)
    steps = iter(range(12))

    def on_tokens(rows: list[int], tokens: list[int]) -> set[int]:
        return {1: {0, 2}, 4: {1}, 6: {3}}.get(next(steps), set())

    cut = generate(model, PROMPTS, on_tokens=on_tokens, **settings)
    assert cut == [row[:length] for row, length in zip(plain, [2, 5, 2, 7], strict=True)]
    assert next(steps) == 7  # nothing is left to write
