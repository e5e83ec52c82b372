"""The validity gate: sound models pass, and each kind of unsound one is caught by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from suites_case import no_mask, subject_of

from benchmarks.validity.plants import Plant, planted
from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.results.schema import read_result
from eval.runner import Runner
from eval.shared import progress
from eval.subject import Subject
from eval.suites.load import load_suites
from eval.tasks.generation import GenerateSettings
from eval.tasks.validity import ValiditySettings
from eval.tasks.validity import checks as validity
from eval.tasks.validity.probe import check_positions, structure_length
from pretrain.model.attention.forms import nystrom
from pretrain.model.attention.ring import RingLayer


def checks_of(subject: Subject) -> dict[str, bool]:
    outcome = validity.run(subject, ValiditySettings(positions=16))
    return {row[0]: row[3] for row in outcome.tables[0].rows}


@pytest.mark.parametrize(
    "model",
    [
        {"objective": "clm"},
        {"objective": "clm", "attention": "softmax"},
        {"objective": "mlm"},
        {"objective": "mlm", "attention": "softmax", "positions": "learned", "max_positions": 72},
    ],
)
@pytest.mark.parametrize("with_text", [True, False])
def test_sound_models_pass(
    export: Callable[..., Path], shards: ShardSet, model: dict[str, Any], with_text: bool
) -> None:
    name = "-".join(["sound", *map(str, model.values()), str(with_text)])
    checks = checks_of(subject_of(export(name, **model), shards if with_text else None))
    assert all(checks.values()), checks
    assert any(name.startswith("causality") for name in checks) == (model["objective"] == "clm")
    assert ("decoding: token by token" in checks) == (model["objective"] == "clm")


def test_where_there_is_no_terminal_it_says_how_far_it_is(
    export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(subject: Subject, settings: ValiditySettings) -> list[SimpleNamespace]:
        return [SimpleNamespace(run=lambda: ["a check"])] * 2

    monkeypatch.setattr(validity, "experiments", half)
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    assert validity.all_checks(subject_of(export("said", objective="clm"), None), ValiditySettings()) == ["a check"] * 2
    assert "validity: 1 of 2 experiments, about" in capsys.readouterr().out


def segment_mean_leak(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    """Causal softmax, and a hundredth of the mean of the token's own segment of 8, which holds its future."""
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    pad = -v.shape[2] % 8
    means = F.pad(v, (0, 0, 0, pad)).unflatten(2, (-1, 8)).mean(3).repeat_interleave(8, 2)[:, :, : v.shape[2]]
    return out + 0.01 * means


@pytest.mark.parametrize("leak", [no_mask, segment_mean_leak])
def test_leaking_causal_model_is_caught(
    causal: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch, leak: Callable[..., torch.Tensor]
) -> None:
    monkeypatch.setattr(nystrom, "causal_nystrom_attention", leak)
    checks = checks_of(subject_of(causal, shards))
    assert not checks["causality: later tokens changed"]
    assert not checks["causality: full against prefix-only likelihood"]
    assert not checks["decoding: token by token"]
    assert checks["save and load: logits"]


def test_cache_that_forgets_is_caught(causal: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A landmark that is not kept: nothing but generation itself would show it."""
    monkeypatch.setattr(RingLayer, "_add_landmarks", lambda *_: None)
    assert [name for name, passed in checks_of(subject_of(causal, shards)).items() if not passed] == [
        "decoding: token by token"
    ]


def test_model_that_ignores_its_input_is_not_called_causal(causal: Path, shards: ShardSet) -> None:
    subject = subject_of(causal, shards)
    with torch.no_grad():
        subject.model.norm.weight.zero_()
    checks = checks_of(subject)
    assert not checks["control: the change is seen after t"]


def test_dependence_on_batch_mates_is_caught(masked: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    real = nystrom.nystrom_attention

    def leaky(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return real(q, k, v, *args, **kwargs) + 0.01 * v.mean(0)

    monkeypatch.setattr(nystrom, "nystrom_attention", leaky)
    assert not checks_of(subject_of(masked, shards))["batch mates"]


def test_published_starting_scale_of_the_inverse_is_caught(export: Callable[..., Path], shards: ShardSet) -> None:
    """It is one maximum over the whole batch, so a row's result moves with its mates."""
    assert not checks_of(subject_of(export("original", objective="mlm", inverse_init="original"), shards))[
        "batch mates"
    ]


def test_dependence_on_padding_is_caught(masked: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.model.attention.layout import Layout

    monkeypatch.setattr(Layout, "from_lengths", lambda lengths, length: Layout.full(len(lengths), length))
    checks = checks_of(subject_of(masked, shards))
    assert not checks["padding: amount"]
    assert not checks["padding: content"]
    assert checks["batch mates"]


def test_positions_reach_both_sides_of_segment_edges(causal: Path) -> None:
    subject = subject_of(causal, None)
    length = structure_length(subject)
    positions = check_positions(subject, length, ValiditySettings(positions=500))
    assert {7, 8, 15, 16, 0, length - 2} <= set(positions)
    assert max(positions) == length - 2
    assert length > 8 * 2 + 8  # landmarks take part only beyond the window


def runner_of(export_folder: Path, shards: ShardSet, folder: Path) -> Runner:
    return Runner(subject_of(export_folder, shards), folder)


def gate_length(folder: Path) -> int:
    return read_result(folder / "validity.json").settings["length"]


def test_it_looks_as_far_as_is_scored(causal: Path, shards: ShardSet, tmp_path: Path) -> None:
    def lm(length: int) -> Any:
        return load_suites(["lm"], overrides=[("lm", "length", length), ("lm", "max_tokens", 64)])[0]

    runner = runner_of(causal, shards, tmp_path)
    runner.run(lm(64))
    shortest = gate_length(tmp_path)
    assert shortest == max(structure_length(runner.subject), 64)  # type: ignore[arg-type]
    runner.run(lm(160))
    assert gate_length(tmp_path) == max(160, shortest)
    # A longer verdict speaks for shorter texts, in this process and in the next.
    before = (tmp_path / "validity.json").read_bytes()
    again = runner_of(causal, shards, tmp_path)
    again.expect([lm(64), lm(160)])
    again.run(lm(64))
    again.run(load_suites(["validity"])[0])
    assert (tmp_path / "validity.json").read_bytes() == before
    assert load_suites(["generate"])[0].task.longest(GenerateSettings(prompt_tokens=100, max_new_tokens=300)) == 400


def test_a_failure_at_the_scored_length_blocks_the_suite(causal: Path, shards: ShardSet, tmp_path: Path) -> None:
    """Sound up to the length of the structure: only the longer suite is refused."""
    runner = runner_of(causal, shards, tmp_path)
    late = Plant("late", "", lambda c: c.ahead() if c.length > 150 else None)
    suites = [load_suites(["lm"], overrides=[("lm", "length", n), ("lm", "max_tokens", 64)])[0] for n in (64, 200)]
    assert structure_length(runner.subject) < 150  # type: ignore[arg-type]
    with planted(runner.subject.model, late):  # type: ignore[union-attr]
        runner.run(suites[0])
        with pytest.raises(UserError, match="the validity gate failed"):
            runner.run(suites[1])
