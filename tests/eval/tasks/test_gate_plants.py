"""Every fault planted in a model is found by the gate: a planted fault that nothing finds is a red test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from suites_case import subject_of

from benchmarks.validity.plants import PLANTS, Plant, planted
from data_pipeline.shards.shardset import ShardSet
from eval.subject import Subject
from eval.tasks.validity import ValiditySettings, checks

LENGTH = 640
# One fault of each sort in the fast tests: a case takes 3 seconds of processor time.
FAST = {"far token", "bf16", "loss path", "cache: made for long texts", "packed: far", "padding: much"}
CASES = [
    pytest.param(plant, objective, id=f"{plant.name}-{objective}", marks=[] if fast else pytest.mark.slow)
    for plant in PLANTS
    for number, objective in enumerate(plant.objectives)
    for fast in [plant.name in FAST and number == 0]
]


@pytest.fixture(scope="module")
def subjects(export: Callable[..., Path], shards: ShardSet) -> dict[str, Subject]:
    return {
        objective: subject_of(export(f"plants-{objective}", objective=objective), shards)
        for objective in ("clm", "mlm")
    }


@pytest.fixture(autouse=True)
def in_bf16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that is fast in it."""
    monkeypatch.setattr(checks, "fast_precision", lambda device: "bf16")


def found(subject: Subject) -> Iterator[str]:
    """Names of the checks that fail, without those of a model that is built anew and has no fault."""
    settings = checks.resolve(subject, ValiditySettings(length=LENGTH))
    for experiment in checks.experiments(subject, settings):
        for check in experiment.run():
            if not check.passed and not check.name.startswith("save and load"):
                yield check.name


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_nothing_is_found_in_a_sound_model(subjects: dict[str, Subject], objective: str) -> None:
    assert list(found(subjects[objective])) == []


@pytest.mark.parametrize(("plant", "objective"), CASES)
def test_a_planted_fault_is_found(subjects: dict[str, Subject], plant: Plant, objective: str) -> None:
    with planted(subjects[objective].model, plant):
        assert next(found(subjects[objective]), None)  # the first one: all of them would take twice the time
