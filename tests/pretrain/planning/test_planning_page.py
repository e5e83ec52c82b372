"""What `nystrom plan` prints of the text that a run reads."""

from __future__ import annotations

from pretrain.planning.page import _reads


def test_one_source_needs_no_name() -> None:
    assert _reads({"books": 1.456}, 2000) == "reads 1.46 times the 2,000 tokens of data.train"


def test_each_source_of_a_mixture_has_its_number_of_passes() -> None:
    line = _reads({"books": 0.5, "notes": 2.761}, 3000)
    assert line == "reads books 0.50 times, notes 2.76 times; data.train has 3,000 tokens in all"
