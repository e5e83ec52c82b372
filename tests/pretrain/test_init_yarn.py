"""Weights whose rotary angles were scaled, as the start of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from training_case import STAGES

from data_pipeline.errors import UserError
from data_pipeline.tokenization.training import train_tokenizer
from pretrain.checkpoint.load import LoadedModel
from pretrain.config import parse_config
from pretrain.curriculum.stages import stage_model
from pretrain.initialize import settle


def loaded(model: dict[str, Any], length: int) -> LoadedModel:
    """A model at the end of a run of a stage of 32 tokens and one of ``length``, without weights."""
    stages = [STAGES[0], {**STAGES[1], "seq_len": length, "until_tokens": 8192}]
    run = parse_config({**minimal(model), "curriculum": stages, "batch_tokens": length * 4})
    config = stage_model(run, 1)
    return LoadedModel(nn.Module(), config, run, train_tokenizer(["a b"], 270), "hash", 10**6, Path("books"), None)


def minimal(model: dict[str, Any]) -> dict[str, Any]:
    small = {"hidden_size": 16, "num_heads": 2, **model}
    return {"name": "t", "model": small, "data": {"train": "x"}, "curriculum": STAGES, "batch_tokens": 256}


def test_yarn_continues_from_the_first_length_and_from_no_other_rule() -> None:
    def settled(there: dict[str, Any], here: dict[str, Any]) -> Any:
        run = parse_config({**minimal(here), "init_from": "books"})
        run, notes = settle(run, loaded(there, 128))
        assert parse_config(run.model_dump()) == run  # as config.yaml keeps it
        return run.model, notes

    yarn, linear = {"rope_scaling": "yarn"}, {"rope_scaling": "linear"}
    model, notes = settled(yarn, yarn)
    assert (model.rope_position_scale, model.rope_original_length) == (0.25, 32)
    assert "continue from 128 tokens: base 10,000, scale 0.25" in notes[0]
    for there, here in ((yarn, linear), (linear, yarn), (yarn, {})):
        with pytest.raises(UserError, match="yarn does that to slow angles only"):
            settled(there, here)
        model, _ = settled(there, {**here, "rope_position_scale": 1.0})
        assert model.rope_original_length is None
    assert settled({}, yarn)[0].rope_original_length is None
    # Layers without positions have no angles; those of the others continue.
    model, _ = settled({"rope_scaling": "ntk"}, {"positions": ["rotary", "none"]})
    assert model.rope_theta == pytest.approx(10_000 * 4 ** (8 / 6))
