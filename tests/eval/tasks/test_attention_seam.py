"""A form of attention that only this test knows, met by whatever evaluates, plans and compares forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from suites_case import subject_of
from toy_forms import Near, Sink

from benchmarks.attention_ablation.forms import configure, select
from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.results.parts import Parts
from eval.shared.forms import window_tokens
from eval.tasks.approximation import ApproximationSettings
from eval.tasks.approximation import task as approximation
from eval.tasks.efficiency import EfficiencySettings
from eval.tasks.efficiency import task as efficiency
from eval.tasks.lra import LRASettings
from eval.tasks.recall import MQARSettings
from eval.tasks.recall import task as recall
from eval.tasks.validity import ValiditySettings
from eval.tasks.validity import checks as validity
from pretrain.config import parse_config
from pretrain.model.attention.registry import FORMS, pattern_of
from pretrain.planning import cli

MQAR: dict[str, Any] = {"lengths": (48,), "pairs": (2,), "rows": 2, "symbols": 32}


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with FORMS.registered(Near, Sink):
        yield


@pytest.mark.parametrize("attention", ["near", "sink", "window/nystrom"])
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_the_gate_passes_it(export: Callable[..., Path], shards: ShardSet, attention: str, objective: str) -> None:
    name = f"{attention.replace('/', '-')}-{objective}"
    subject = subject_of(export(name, attention=pattern_of(attention), objective=objective), shards)
    outcome = validity.run(subject, ValiditySettings(positions=16))
    rows = {row[0]: row[3] for row in outcome.tables[0].rows}
    assert all(rows.values()), rows
    assert ("decoding: token by token" in rows) == (objective == "clm")


def test_the_gate_fails_it_where_it_leaks(
    export: Callable[..., Path], shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of(export("leaking", attention="near", objective="clm"), shards)
    real = Near.attend
    monkeypatch.setattr(Near, "attend", lambda self, q, k, v, *rest: real(self, q, k, v, *rest) + 0.1 * v.mean(2, True))
    rows = {row[0]: row[3] for row in validity.run(subject, ValiditySettings(positions=16)).tables[0].rows}
    assert not rows["causality: later tokens changed"]
    assert not rows["decoding: token by token"]


def test_recall_sets_it_beside_others_and_says_what_it_sees(causal: Path, shards: ShardSet) -> None:
    subject = subject_of(causal, shards)
    settings = recall.resolve(subject, MQARSettings(**MQAR, attention=("near", "softmax")))
    assert settings.attention == ("own", "near", "softmax")
    outcome = recall.run(subject, settings, Parts())
    assert any("near" in name for table in outcome.tables for row in table.rows for name in map(str, row))
    with pytest.raises(ValueError, match=r"no form of attention 'nearest': did you mean 'near'\?"):
        MQARSettings(attention=("nearest",))
    assert LRASettings(benchmark="listops", networks=("near", "softmax-conv")).networks == ("near", "softmax-conv")


def test_recall_notes_the_window_of_its_own(export: Callable[..., Path], shards: ShardSet) -> None:
    subject = subject_of(export("near-recall", attention="near", objective="clm"), shards)
    outcome = recall.run(subject, recall.resolve(subject, MQARSettings(**MQAR)), Parts())
    notes = " ".join(table.note for table in outcome.tables)
    assert "Each layer sees the 9 to 9 nearest tokens exactly, and no others." in notes


def test_approximation_compares_it_or_says_why_not(export: Callable[..., Path], shards: ShardSet) -> None:
    sink = subject_of(export("sink-approximation", attention="sink", objective="clm"), shards)
    asked = ApproximationSettings(length=44, max_tokens=88)
    settings = approximation.resolve(sink, asked)
    assert (settings.landmarks, settings.segment_lengths) == ((), ())  # it reads neither
    outcome = approximation.run(sink, settings, Parts())
    assert 0 < outcome.metrics["relative_error"].value < 1
    with pytest.raises(UserError, match="--landmarks has no effect: attention sink does not read num_landmarks"):
        approximation.resolve(sink, asked.model_copy(update={"landmarks": (4,)}))
    near = subject_of(export("near-approximation", attention="near", objective="clm"), shards)
    with pytest.raises(UserError, match=r"attention: near\) sees its window and nothing beyond it: there is nothing"):
        approximation.resolve(near, asked)


def test_efficiency_measures_it_with_its_own_cache(export: Callable[..., Path], shards: ShardSet) -> None:
    subject = subject_of(export("near-efficiency", attention="near", objective="clm"), shards)
    asked = EfficiencySettings(lengths=(24, 64), rounds=2, precision="fp32", decode_tokens=4)
    outcome = efficiency.run(subject, efficiency.resolve(subject, asked), Parts())
    memory = {(row[0], row[1]): row[9] for row in outcome.tables[1].rows}
    assert memory[24, "as trained (near)"] == memory[64, "as trained (near)"] < memory[64, "exact softmax"]


def test_a_pattern_is_met_layer_by_layer(export: Callable[..., Path], shards: ShardSet) -> None:
    """By recall, as a variant and as the model's own; by approximation, efficiency, and what results say of it."""
    pattern = export("pattern", attention=["nystrom", "softmax"], objective="clm", landmark_inverse=True)
    subject = subject_of(pattern, shards)
    assert subject.info().attention == "nystrom x1 + softmax x1"
    assert window_tokens(subject.loaded.model_config) is None

    settings = recall.resolve(subject, MQARSettings(**MQAR, attention=("softmax/nystrom", "nystrom/softmax")))
    outcome = recall.run(subject, settings, Parts())
    cells = [str(name) for table in outcome.tables for row in table.rows for name in row]
    assert any("softmax/nystrom" in cell for cell in cells)
    assert not any("nystrom/softmax" in cell for cell in cells)  # that is its own
    notes = " ".join(table.note for table in outcome.tables)
    assert "nystrom (1 of 2 layers) sees the 9 to 16 nearest tokens exactly, those farther back through" in notes
    assert "softmax (1 of 2 layers) sees all tokens exactly." in notes
    assert "own: nystrom x1 + softmax x1." in notes

    settings = approximation.resolve(subject, ApproximationSettings(length=44, max_tokens=88, window_sizes=(1,)))
    outcome = approximation.run(subject, settings, Parts())
    layers = {row[0]: row[1] for row in outcome.tables[1].rows}
    assert layers["layer 1 (nystrom)"] > 0.01
    assert layers["layer 2 (softmax)"] < 1e-5
    both = [window for grid in outcome.grids if grid.name.endswith("inside the window") for window in grid.values]
    assert len(both) == 2
    near = subject_of(export("pattern-near", attention=["near", "softmax"], objective="clm"), shards)
    words = r"attention: near x1 \+ softmax x1\) computes exact attention or sees its window"
    with pytest.raises(UserError, match=words):
        approximation.resolve(near, ApproximationSettings(length=44, max_tokens=88))

    asked = EfficiencySettings(lengths=(24, 64), rounds=2, precision="fp32", decode_tokens=4)
    outcome = efficiency.run(subject, efficiency.resolve(subject, asked), Parts())
    memory = {row[1]: row[9] for row in outcome.tables[1].rows if row[0] == 64}
    assert memory["window alone"] < memory["as trained (nystrom x1 + softmax x1)"] != memory["exact softmax"]


def test_the_ablation_knows_it() -> None:
    base = configure({"objective": "clm", "vocab_size": 31, "hidden_size": 16, "num_heads": 2}, "model")
    assert [variant.config.attention for variant in select(["near", "sink+conv-none"], base)] == ["near", "sink"]
    (pattern,) = select(["near/sink/near/sink+conv-none"], base)
    assert (pattern.config.attention, pattern.config.conv_kernel) == (("near", "sink"), 0)


@pytest.mark.parametrize(
    ("attention", "words"), [("near", "near"), ("sink", "sink"), (["near", "near", "sink"], "near x3 + sink x1")]
)
def test_it_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str], attention: Any, words: str) -> None:
    model = {"attention": attention, "vocab_size": 300, "hidden_size": 32, "num_layers": 4, "num_heads": 2}
    values = {
        "name": "planned", "model": {"objective": "clm", "segment_length": 16, **model}, "data": {"train": "not/there"},
        "curriculum": [{"until_tokens": 4096, "seq_len": 64, "micro_batch": 2}], "batch_tokens": 1024,
    }  # fmt: skip
    parse_config(values)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert cli.main(["--config", str(path), "--gpus", "2", "--gpu-memory", "80", "--gpu", "H100"]) in (0, None)
    assert f"a causal {words} model" in capsys.readouterr().out
