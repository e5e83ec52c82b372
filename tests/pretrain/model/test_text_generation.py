"""Generation: deterministic by seed, exact by the prefix property, clear about mistakes."""

from __future__ import annotations

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


def test_learned_positions_slide() -> None:
    assert len(generate(decoder(positions="learned", max_positions=8), [1, 2], max_new_tokens=15)) == 15


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="objective: mlm"):
        generate(decoder(objective="mlm"), [1], max_new_tokens=1)
    with pytest.raises(UserError, match="empty prompt"):
        generate(decoder(), [], max_new_tokens=1)
    with pytest.raises(UserError, match="token 23 is outside"):
        generate(decoder(), [1, 23], max_new_tokens=1)
    with pytest.raises(UserError, match="must not be negative"):
        generate(decoder(), [1], max_new_tokens=1, temperature=-1.0)
