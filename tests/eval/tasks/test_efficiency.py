"""Structure and sanity of timings: what is timed beside what, memory that grows, refusals. Never a speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suites_case import subject_of

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.results.parts import Job, Parts
from eval.results.schema import Outcome
from eval.subject import Subject
from eval.suites.load import load_suites
from eval.tasks.efficiency import EfficiencySettings, task
from eval.tasks.efficiency.measure import Spread, interleave, peak_memory
from eval.tasks.efficiency.work import Decoding, backward, forward, tokens
from pretrain.model.generation import generate

CPU = torch.device("cpu")


def efficiency(subject: Subject, parts: Parts | None = None, **settings: Any) -> Outcome:
    given = EfficiencySettings(
        **({"lengths": (24, 64), "rounds": 2, "precision": "fp32", "decode_tokens": 4} | settings)
    )
    return task.run(subject, task.resolve(subject, given), parts or Parts())


class Recorded(Parts):
    """Keeps the names of the jobs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def map(self, jobs: Sequence[Job]) -> list[Any]:
        self.names += [name for name, _ in jobs]
        return super().map(jobs)


def test_every_form_is_measured_at_every_length_in_one_part(causal: Path, shards: ShardSet) -> None:
    subject, parts = subject_of(causal, shards), Recorded()
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    outcome = efficiency(subject, parts, backward=True)
    assert parts.names == ["timing"]
    forms = ["as trained (nystrom)", "exact softmax", "window alone"]
    kinds = ["forward", "forward and backward", "decoding"]
    assert [table.name for table in outcome.tables] == [f"{kind} by length" for kind in kinds]
    for table in outcome.tables:
        assert [row[:2] for row in table.rows] == [[length, form] for length in (24, 64) for form in forms]
        for row in table.rows:
            _, form, time, q1, q3, rate, ratio, ratio_q1, ratio_q3, memory, memory_ratio = row
            assert 0 < q1 <= time <= q3
            assert 0 < ratio_q1 <= ratio <= ratio_q3 < math.inf
            assert rate > 0
            assert memory > 0
            if form == "exact softmax":
                assert ratio == memory_ratio == 1
        memory = {(row[0], row[1]): row[9] for row in table.rows}
        for form in forms:  # the window's cache alone does not grow
            grows = (table.name, form) != ("decoding by length", "window alone")
            assert (memory[64, form] > memory[24, form]) == grows
    assert {series.chart for series in outcome.series} == {
        f"{kind}: {what}"
        for kind in kinds
        for what in ("tokens per second", "decoding cache, MiB" if kind == "decoding" else "peak memory, MiB")
    }
    for series in outcome.series:
        assert series.x == [24, 64]
        assert series.reference == (series.name != forms[0])
    metrics = outcome.metrics
    for name in ("forward_time_ratio", "backward_time_ratio", "decode_time_ratio"):
        assert metrics[name].value == outcome.tables[kinds.index(_kind(name))].rows[3][6]
        assert metrics[name].higher_is_better is False
    assert 0 < metrics["cache_ratio"].value < 1
    assert subject.model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    assert all(weight.grad is None for weight in subject.model.parameters())


def _kind(metric: str) -> str:
    return {"forward": "forward", "backward": "forward and backward", "decode": "decoding"}[metric.split("_")[0]]


def test_masked_and_exact_models_and_bfloat16(masked: Path, export: Callable[..., Path], shards: ShardSet) -> None:
    subject = subject_of(masked, shards)
    outcome = efficiency(subject, precision="bf16", sequences=2)
    assert [table.name for table in outcome.tables] == ["forward by length"]
    assert set(outcome.metrics) == {"forward_tokens_per_second", "forward_time_ratio", "forward_memory_ratio"}
    assert all(weight.dtype == torch.float32 for weight in subject.model.parameters())
    assert "bf16, 2 at a time" in outcome.tables[0].note
    exact = efficiency(subject_of(export("softmax", objective="clm", attention="softmax"), shards))
    assert [row[1] for row in exact.tables[0].rows[:2]] == ["as trained (softmax)", "window alone"]
    assert exact.tables[0].rows[0][6] == 1
    assert set(exact.metrics) == {"forward_tokens_per_second", "decode_tokens_per_second"}


def test_a_pyramid_and_a_pattern_stand_beside_their_alternatives(export: Callable[..., Path], shards: ShardSet) -> None:
    pyramid = {"landmark_levels": 16, "landmark_band": 2}
    tables = {
        name: efficiency(subject_of(export(name, objective="clm", **model), shards), lengths=(256,)).tables
        for name, model in {
            "pyramid": pyramid,
            "pattern": {"attention": ["window", "nystrom"], **pyramid},
            "windows": {"attention": "window", **pyramid},
        }.items()
    }
    others = ["exact softmax", "window alone", "flat landmarks"]
    assert [row[1] for row in tables["pyramid"][0].rows] == ["as trained (nystrom)", *others]
    assert [row[1] for row in tables["pattern"][0].rows] == ["as trained (window x1 + nystrom x1)", *others]
    assert [row[1] for row in tables["windows"][0].rows] == ["as trained (window)", "exact softmax"]
    cache = {row[1]: row[9] for row in tables["pyramid"][1].rows}
    assert cache["window alone"] < cache["as trained (nystrom)"] < cache["flat landmarks"] < cache["exact softmax"]


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_peak_memory_is_that_of_the_allocator(objective: str, causal: Path, masked: Path) -> None:
    model = subject_of(causal if objective == "clm" else masked, None).model
    inputs, labels = tokens(model, 2, 200, 0)
    for work in (forward(model, inputs), backward(model, inputs, labels)):
        work()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile:
            work()
        events, most = list(profile.profiler.kineto_results.experimental_event_tree()), 0
        while events:
            event = events.pop()
            events.extend(event.children)
            most = max(most, getattr(event.extra_fields, "total_allocated", 0))
        assert peak_memory(work, CPU, [inputs, labels, *model.parameters()]) == pytest.approx(most, rel=0.02)


def test_peak_memory_counts_what_lives_together() -> None:
    given = torch.zeros(1000)

    def work() -> torch.Tensor:
        first = given + 1
        second = first + 1
        del first
        return (second + 1).sum()

    assert peak_memory(work, CPU, [given]) == 2 * 4000 + 4  # two of three, and the sum


def test_decoding_goes_on_where_the_prompt_ends_and_its_cache_is_as_counted(causal: Path) -> None:
    from pretrain.model.decoding import cache_bytes

    model = subject_of(causal, None).model
    inputs, _ = tokens(model, 2, 60, 0)
    decoding = Decoding(model, inputs[:, :40], 5, 60)
    written = [int(decoding()[0]) for _ in range(3)]
    assert decoding.cache.lengths.tolist() == [55, 55]
    expected = generate(model, inputs[0, :40].tolist(), max_new_tokens=16, temperature=0)
    assert written == expected[5::5]
    held = sum(x.nbytes for layer in decoding.cache.layers for x in layer.tensors().values())
    assert held == cache_bytes(model.config, 2, 60, torch.float32)


def test_rounds_run_every_case_once_in_changing_order() -> None:
    ran: list[str] = []
    cases = {name: lambda name=name: ran.append(name) for name in "abc"}
    times = interleave(cases, CPU, 8)
    rounds = ["".join(ran[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 2
    assert all(len(seconds) == 8 and min(seconds) >= 0 for seconds in times.values())
    assert Spread.of_ratios([1.0, 8.0, 6.0], [2.0, 2.0, 2.0]) == Spread(3.0, 1.75, 3.5)
    sample = np.random.default_rng(0).random(9).tolist()
    assert Spread.of(sample).median == sorted(sample)[4]


def test_a_form_without_memory_is_left_out(causal: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = task.forward

    def scarce(model: Any, inputs: torch.Tensor) -> Callable[[], object]:
        if model.config.attention == "softmax" and inputs.shape[1] == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, inputs)

    monkeypatch.setattr(task, "forward", scarce)
    outcome = efficiency(subject_of(causal, shards), decode_tokens=0)
    rows = {(row[0], row[1]): row[2:] for row in outcome.tables[0].rows}
    assert rows[64, "exact softmax"] == [None] * 9
    assert rows[64, "as trained (nystrom)"][4] is None
    assert rows[64, "as trained (nystrom)"][0] > 0
    assert rows[24, "as trained (nystrom)"][4] > 0
    assert set(outcome.metrics) == {"forward_tokens_per_second"}
    assert [s.x for s in outcome.series if s.name == "exact softmax"] == [[24], [24]]


def test_lengths_that_do_not_fit_are_refused(causal: Path, export: Callable[..., Path], shards: ShardSet) -> None:
    learned = subject_of(export("learned", objective="mlm", positions="learned", max_positions=700), shards)
    with pytest.raises(UserError, match="--lengths 1024 is longer than the 700 learned positions"):
        task.resolve(learned, EfficiencySettings(lengths=(512, 1024)))
    assert task.resolve(learned, EfficiencySettings()).lengths == (512, 700)
    assert task.resolve(subject_of(causal, shards), EfficiencySettings()).lengths == (512, 1024, 2048, 4096)
    with pytest.raises(UserError, match="--decode-tokens 16 in 5 rounds and one to warm up are 96 tokens"):
        task.resolve(subject_of(causal, shards), EfficiencySettings(lengths=(64, 512)))
    with pytest.raises(UserError, match="at least 2 tokens, got 1 512"):
        load_suites(["efficiency"], overrides=[(None, "lengths", [1, 512])])


def test_another_machine_is_measured_anew(causal: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(causal, shards)
    settings = task.resolve(subject, EfficiencySettings())
    here = task.data(subject, settings)["hash"]
    assert here == task.data(subject, settings)["hash"]
    monkeypatch.setattr(task, "cpu_name", lambda: "another processor with the same instructions")
    assert task.data(subject, settings)["hash"] != here
