"""``python -m benchmarks.validity``: the parts of its faults. That each is found, ``test_gate_plants.py`` holds."""

from __future__ import annotations

import pytest

from benchmarks.validity.__main__ import part_of
from benchmarks.validity.plants import PLANTS
from data_pipeline.errors import UserError


def test_parts_hold_every_fault_once() -> None:
    parts = [list(PLANTS)[part_of(f"{number}/3")] for number in (1, 2, 3)]
    assert sorted(plant.name for part in parts for plant in part) == sorted(plant.name for plant in PLANTS)
    assert list(PLANTS)[part_of("1/1")] == list(PLANTS)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--part {text}: it must be I/K"):
        part_of(text)
