"""Positions beyond those that were trained: rows that repeat, angles by the published rules, no stale compilation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pretrain.engine.positions import tile_rows
from pretrain.model import Layout, ModelConfig, build_model
from pretrain.model.decoding import decode, prefill
from pretrain.model.generation import generate
from pretrain.model.positions import rotary_table
from pretrain.model.transformer import NystromformerLM

VOCAB = 23


def config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": VOCAB, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_landmarks": 6,
        "segment_length": 4, "conv_kernel": 5, "max_positions": 48, "init_std": 0.3,
    }  # fmt: skip
    return ModelConfig.model_validate(values | changes)


def model_of(**changes: object) -> NystromformerLM:
    torch.manual_seed(0)
    return build_model(config(**changes)).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("trained", [7, 24])
def test_untrained_positions_compute_as_the_tiled_table(objective: str, trained: int) -> None:
    """To the bit, in full rows, packed ones, and token by token; and what is in the untrained rows is never read."""
    some = model_of(objective=objective, positions="learned", trained_positions=trained)
    every = model_of(objective=objective, positions="learned")
    table, tiled = (model.get_parameter("embeddings.position_embeddings.weight") for model in (some, every))
    with torch.no_grad():
        tiled.copy_(tile_rows(table, trained, 48))
        table[2 + trained :] = math.nan
    documents = torch.arange(90).reshape(2, 45) // 30
    for ids, layout in [
        (tokens(2, 48), None),
        (tokens(1, trained + 1), None),
        (tokens(2, 45), Layout.from_documents(documents)),
    ]:
        expected = every(ids, layout=layout).logits
        assert torch.isfinite(expected).all()
        assert torch.equal(some(ids, layout=layout).logits, expected)
    if objective == "clm":
        ids = tokens(2, 30)
        runs = []
        for model in (some, every):
            logits, cache = prefill(model, ids[:, :5], max_length=30)
            runs.append(torch.stack([logits] + [decode(model, ids[:, t], cache) for t in range(5, 30)]))
        assert torch.equal(*runs)
        text = generate(
            some, [1, 2, 3], max_new_tokens=60, temperature=0
        )  # to the end of the table, not of the trained
        assert text == generate(every, [1, 2, 3], max_new_tokens=60, temperature=0)


def test_tiling_keeps_the_first_two_rows_and_what_it_does_not_reach() -> None:
    table = torch.arange(12.0)[:, None]
    assert tile_rows(table, 3, 8).flatten().tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 10, 11]
    assert tile_rows(table, 4, 5).flatten().tolist() == [0, 1, 2, 3, 4, 5, 2, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(("rule", "factor"), [("linear", 8.0), ("linear", 1.5), ("ntk", 8.0), ("ntk", 1.5)])
def test_angles_are_those_of_transformers(rule: str, factor: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from pretrain.config import parse_config
    from pretrain.curriculum.stages import stage_model

    width, first, base = 16, 128, 10_000.0
    longer = int(first * factor)
    run = parse_config(
        {
            "name": "t",
            "model": {"hidden_size": width, "num_heads": 1, "rope_theta": base, "rope_scaling": rule},
            "data": {"train": "x", "block_length": 384 * 8},
            "curriculum": [
                {"until_tokens": 10**6, "seq_len": first, "micro_batch": 1},
                {"until_tokens": 10**7, "seq_len": longer, "micro_batch": 1},
            ],
            "batch_tokens": 384 * 8,
        }
    )
    model = stage_model(run, 1)
    got = rotary_table(
        torch.arange(longer)[None], width, model.rope_theta, torch.float64, scale=model.rope_position_scale
    )
    theirs = LlamaConfig(
        hidden_size=width, num_attention_heads=1, max_position_embeddings=first,
        rope_parameters={
            # Their name for the NTK-aware base that follows the length at hand; here the stage's length stands for it.
            "rope_type": {"ntk": "dynamic", "linear": "linear"}[rule],
            "rope_theta": base, "factor": 1.0 if rule == "ntk" else factor,
        },
    )  # fmt: skip
    name = theirs.rope_parameters["rope_type"]
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[name](theirs, torch.device("cpu"), seq_len=longer)
    assert attention_factor == 1.0
    angles = torch.arange(longer, dtype=torch.float64)[:, None] * frequencies.double()
    for ours, expected in zip(got, (angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(ours[0, :, 0], expected, rtol=0, atol=1e-6 * longer)  # their frequencies are float32


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("changes", [{"rope_theta": 1e5}, {"rope_position_scale": 0.25}])
def test_a_stage_changes_the_live_model_as_if_it_had_been_built_so(objective: str, changes: dict[str, float]) -> None:
    live, built = model_of(objective=objective), model_of(objective=objective, **changes)
    ids = tokens(2, 48)
    before = live(ids).logits
    live.set_positions(config(objective=objective, **changes))
    after = live(ids).logits
    assert torch.equal(after, built(ids).logits)
    assert not torch.allclose(after, before)
    live.set_positions(config(objective=objective))
    assert torch.equal(live(ids).logits, before)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"rope_theta": 1e5}),
        ({}, {"rope_position_scale": 0.25}),
        ({"positions": "learned", "trained_positions": 7}, {"positions": "learned", "trained_positions": 24}),
    ],
)
def test_a_compiled_model_does_not_keep_the_angles_of_the_stage_before(
    first: dict[str, object], second: dict[str, object]
) -> None:
    model = model_of(attention="softmax", **first)
    compiled = torch.compile(model, dynamic=False, backend="eager")
    ids = tokens(2, 48)
    for changes in (first, second, first):
        model.set_positions(config(attention="softmax", **changes))
        torch.testing.assert_close(compiled(ids).logits, model_of(attention="softmax", **changes)(ids).logits)


def test_nothing_else_of_a_built_model_may_change() -> None:
    with pytest.raises(ValueError, match="a model that is built cannot change max_positions, num_landmarks"):
        model_of().set_positions(config(max_positions=64, num_landmarks=5))
