"""Models of a later stage pass the validity gate; angles that follow the length at hand do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from suites_case import subject_of

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.subject import Subject
from eval.tasks.validity import ValiditySettings
from eval.tasks.validity import checks as validity
from pretrain.model.attention import self_attention
from pretrain.model.positions import rotary_table


@pytest.fixture(scope="module")
def staged(export: Callable[..., Path], shards: ShardSet) -> Callable[..., Subject]:
    """A fresh model as of the second of three stages (16, 64 and 128 tokens long), or of another one."""

    def load(name: str, tokens: int = 1024, theta: float | None = None, **model: Any) -> Subject:
        folder = export(name, **model)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        lengths = {16: 1024, 64: 2048, 128: 4096}
        config["curriculum"] = [{"until_tokens": n, "seq_len": k, "micro_batch": 1} for k, n in lengths.items()]
        if theta is not None:
            config["curriculum"][1]["rope_theta"] = theta
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        info = json.loads((folder / "export.json").read_text())
        (folder / "export.json").write_text(json.dumps({**info, "tokens": tokens}))
        return subject_of(folder, shards)

    return load


def checks_of(subject: Subject) -> dict[str, bool]:
    outcome = validity.run(subject, ValiditySettings(positions=12))
    return {row[0]: row[3] for row in outcome.tables[0].rows}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rope_scaling": "ntk"}, {"rope_theta": 1e4 * 4 ** (16 / 14)}),
        ({"rope_scaling": "linear"}, {"rope_position_scale": 0.25}),
        ({"theta": 300.0}, {"rope_theta": 300.0}),
        ({"positions": "learned", "max_positions": 128}, {"trained_positions": 64}),
    ],
)
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_models_of_a_later_stage_are_sound(
    staged: Callable[..., Subject], objective: str, options: dict[str, Any], expected: dict[str, float]
) -> None:
    """The length that the gate looks at, 64 tokens or more, goes beyond the first stage and the trained positions."""
    name = "-".join([objective, *map(str, options.values())])
    subject = staged(name, tokens=1025, objective=objective, **options)
    fields = subject.loaded.model_config.model_dump()
    assert {key: fields[key] for key in expected} == expected
    assert subject.trained_length == 64
    checks = checks_of(subject)
    assert all(checks.values()), checks
    assert any(name.startswith("causality") for name in checks) == (objective == "clm")


def test_untrained_positions_are_sound_and_bounded_by_the_table(staged: Callable[..., Subject]) -> None:
    subject = staged("early", objective="clm", positions="learned", max_positions=128)
    assert subject.loaded.model_config.trained_positions == 16
    assert subject.trained_length == 16
    checks = checks_of(subject)
    assert all(checks.values()), checks
    assert subject.check_length(128, "--length") == 128
    with pytest.raises(UserError, match="129 is longer than the 128 learned positions"):
        subject.check_length(129, "--length")


@pytest.mark.parametrize("kind", ["base", "scale"])
def test_angles_that_follow_the_length_at_hand_are_caught(
    staged: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What "dynamic" scalings do: the likelihood of a prefix is not the one in the full text."""

    def dynamic(positions: torch.Tensor, width: int, theta: float, dtype: torch.dtype, *, scale: float) -> Any:
        growth = max(float(positions.max() + 1) / 16, 1.0)
        if kind == "base":
            return rotary_table(positions, width, theta * growth ** (width / (width - 2)), dtype, scale=scale)
        return rotary_table(positions, width, theta, dtype, scale=scale / growth)

    subject = staged(f"dynamic-{kind}", objective="clm")
    monkeypatch.setattr(self_attention, "rotary_table", dynamic)
    assert not checks_of(subject)["causality: full against prefix-only likelihood"]
