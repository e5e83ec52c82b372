"""Finished runs of the ablation are found again by their settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.attention_ablation import study
from benchmarks.attention_ablation.study import Results
from pretrain.model.config import ModelConfig

BASE = ModelConfig(objective="clm", vocab_size=48, hidden_size=16, num_layers=2, num_heads=2, landmark_inverse=False)


def test_the_key_of_a_run_leaves_defaults_out() -> None:
    model, recipe = BASE.model_dump(), {"tokens": 256, "betas": (0.9, 0.95)}
    whole = study.key(kind="run", base=model, recipe=recipe, seed=0)
    older = {name: value for name, value in model.items() if name != "rope_theta"}
    assert study.key(kind="run", base=older, recipe={"tokens": 256}, seed=0) == whole
    for changed in ({"rope_theta": 5.0}, {"hidden_size": 32}):
        assert study.key(kind="run", base=model | changed, recipe=recipe, seed=0) != whole
    assert study.key(kind="run", base=model, recipe=recipe | {"betas": (0.9, 0.99)}, seed=0) != whole


@pytest.mark.parametrize("name", ["mqar-pairs", "passkey-far", "mqar-pyramid", "books-4096", "variables"])
def test_committed_results_are_found_again(name: str) -> None:
    results = Results(Path(__file__).parents[2] / f"benchmarks/results/ablation-{name}.json")
    assert results.runs
    for found, record in results.runs.items():
        parts = {part: record[part] for part in ("task", "recipe", "base", "model", "seed")}
        assert study.key(kind="run", **parts) == found
