"""YaRN: the angles of transformers, three constants of the model, and nothing of the length at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from form_case import config as tiny
from form_case import decoding_equals_the_forward_pass, logits, model_of, the_future_changes_nothing_and_prefixes_agree
from form_case import tokens as ids_of

from pretrain.config import parse_config
from pretrain.curriculum.stages import describe_changes, stage_model, stage_settings
from pretrain.model.attention.self_attention import _table
from pretrain.model.config import ModelConfig
from pretrain.model.positions import yarn_frequencies

STRETCHED = {"rope_scaling": "yarn", "rope_position_scale": 0.25, "rope_original_length": 16}


def run_of(lengths: list[int], **model: Any) -> Any:
    stages = [{"until_tokens": 8192 * (i + 1), "seq_len": n, "micro_batch": 1} for i, n in enumerate(lengths)]
    whole = {"hidden_size": 64, "num_heads": 1, "rope_scaling": "yarn", **model}
    batch = max(lengths)
    return parse_config(
        {"name": "t", "model": whole, "data": {"train": "x"}, "curriculum": stages, "batch_tokens": batch}
    )


@pytest.mark.parametrize(("width", "base", "first"), [(16, 1e4, 128), (64, 5e5, 2048), (128, 1e4, 512), (2, 1e4, 64)])
@pytest.mark.parametrize("growth", [2, 8])
def test_angles_are_those_of_transformers(width: int, base: float, first: int, growth: int) -> None:
    config = pytest.importorskip("transformers").LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    longer = first * growth
    model = stage_model(run_of([first, longer], hidden_size=width, rope_theta=base), 1)
    places = torch.arange(0, longer, 61)[None]
    got = _table(model, places, dtype=torch.float64)
    theirs = config(
        hidden_size=width, num_attention_heads=1, max_position_embeddings=longer,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": base, "factor": float(growth), "original_max_position_embeddings": first,
        },
    )  # fmt: skip
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    angles = places[0].double()[:, None] * frequencies.double()
    for ours, expected in zip(got, (angles.cos(), angles.sin()), strict=True):
        # Their frequencies are float32.
        torch.testing.assert_close(ours[0, :, 0], factor * expected, rtol=0, atol=1e-6 * longer)
    torch.testing.assert_close(yarn_frequencies(width, base, 1 / growth, first).float(), frequencies, rtol=1e-6, atol=0)


def test_fast_angles_stay_and_slow_ones_are_interpolated() -> None:
    plain = 1e4 ** (-torch.arange(32, dtype=torch.float64) / 32)
    turns = 512 * plain / (2 * torch.pi)
    found = yarn_frequencies(64, 1e4, 0.25, 512) / plain
    assert (found[turns > 40] == 1).all()
    torch.testing.assert_close(found[turns < 0.75], torch.full_like(found[turns < 0.75], 0.25))
    assert (found.diff() <= 0).all()
    # A text shorter than a turn of the fastest angle has none that was seen as a whole: all but the first shrink.
    torch.testing.assert_close(yarn_frequencies(64, 1e4, 0.25, 2)[1:], 0.25 * plain[1:])


def test_a_scale_of_1_is_rotary_to_the_bit() -> None:
    for original in (None, 16):
        yarn = model_of(rope_scaling="yarn", rope_original_length=original)
        assert torch.equal(logits(yarn, ids_of(2, 30)), logits(model_of(), ids_of(2, 30)))


def test_it_follows_the_stages_and_a_shorter_one_does_not_go_back() -> None:
    run = run_of([16, 32, 64, 32, 128])
    models = [stage_model(run, i) for i in range(5)]
    assert [m.rope_position_scale for m in models] == [1, 1 / 2, 1 / 4, 1 / 4, 1 / 8]
    assert {m.rope_theta for m in models} == {1e4}
    assert {m.rope_original_length for m in models} == {16}
    assert all(ModelConfig.model_validate(m.model_dump()) == m for m in models)  # as a checkpoint keeps it
    assert "rope_original_length" not in stage_settings(run, 0)
    assert stage_settings(run, 1)["rope_original_length"] == 16
    assert "64 and positions" not in (line := describe_changes(run)[0])
    assert line.endswith("(rule yarn).")


def test_a_run_from_weights_continues_from_the_first_length() -> None:
    settled = {"rope_position_scale": 0.25, "rope_original_length": 16}
    stages = [{"until_tokens": 8192, "seq_len": 128, "micro_batch": 1}]
    raw = run_of([64], **settled).model_dump() | {"init_from": "x", "init_length": 64, "curriculum": stages}
    model = stage_model(parse_config({**raw, "batch_tokens": 128}), 0)
    assert (model.rope_position_scale, model.rope_original_length) == (0.125, 16)


@pytest.mark.parametrize("changes", [{}, {"learn_landmark_query": True}])
def test_prefixes_agree_and_decoding_equals_the_forward_pass(changes: dict[str, Any]) -> None:
    model = model_of(objective="clm", **STRETCHED, **changes)
    the_future_changes_nothing_and_prefixes_agree(model)
    decoding_equals_the_forward_pass(model)


def test_a_stage_changes_the_live_model_as_if_it_had_been_built_so() -> None:
    live, built = model_of(rope_scaling="yarn"), model_of(**STRETCHED)
    before = logits(live, ids_of(2, 40))
    live.set_positions(tiny(**STRETCHED))
    assert torch.equal(logits(live, ids_of(2, 40)), logits(built, ids_of(2, 40)))
    assert not torch.allclose(logits(live, ids_of(2, 40)), before)


def test_a_stages_base_of_1_is_refused() -> None:
    raw = run_of([16]).model_dump()
    raw["curriculum"] = [{"until_tokens": 8192, "seq_len": 16, "micro_batch": 1, "rope_theta": 1.0}]
    with pytest.raises(Exception, match=r"curriculum.0.rope_theta 1.0: rope_scaling yarn needs a base above 1"):
        parse_config(raw)
