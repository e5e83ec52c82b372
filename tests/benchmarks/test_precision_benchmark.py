"""``python -m benchmarks.precision``: what it compares is right, and a run of the smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.precision import norm, rounding, segments
from benchmarks.precision.__main__ import main
from data_pipeline.errors import UserError
from pretrain.model.attention.blockwise import Window
from pretrain.model.attention.layout import Rectangle
from pretrain.model.attention.nystrom import nystrom_attention, pooled_attention

TINY = ["--length", "24", "--segment-length", "8", "--width", "4", "--landmarks", "4", "--lengths", "8,9"]


def test_what_is_written_out_is_the_same_function() -> None:
    """In float64, where rounding cannot hide a difference."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 6, dtype=torch.float64) for _ in range(3))
    known = rounding.forms(8, Window(8, 2))
    for written, ours in (("causal-16-bits", "causal"), ("masked-fused", "masked")):
        torch.testing.assert_close(known[written](q, k, v), known[ours](q, k, v), rtol=0, atol=1e-12)
    sizes = segments.spread(40, 12)
    whole = Rectangle(40, 40)
    for got, right in (
        (segments.through_inverse(q[0], k[0], v[0], sizes), nystrom_attention(q, k, v, whole, num_landmarks=12)[0]),
        (segments.pooled(q[0], k[0], v[0], sizes), pooled_attention(q, k, v, whole, num_landmarks=12)[0]),
    ):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-12)


def test_ways_to_cut() -> None:
    assert segments.ceiling(9, 4) == [3, 3, 3]
    assert segments.longer_first(9, 4) == [3, 2, 2, 2]
    assert segments.spread(9, 4) == [2, 2, 2, 3]


def test_inputs_are_smooth() -> None:
    x = segments.smooth(4, 200, 32, seed=0)
    assert float(x.var()) == pytest.approx(1, abs=0.05)
    assert float((x[:, :, 1:] * x[:, :, :-1]).mean()) == pytest.approx(0.9, abs=0.05)


def test_a_norm_in_float32_is_compared_with_float64() -> None:
    (row,) = norm.errors([1000])
    assert 0 < abs(row["error"]) < 1e-5


def test_rounding_of_16_bits_is_seen() -> None:
    rows = rounding.errors(["exact"], 16, width=4, heads=1, landmarks=4, window=Window(4, 2), dtype=torch.bfloat16)
    assert [row["deviation"] for row in rows] == [1, 20]
    assert all(1e-4 < row[what] < 3e-2 for row in rows for what in ("out", "dq", "dk", "dv"))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 16, 4).bfloat16() for _ in range(3))
    right = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    off = F.scaled_dot_product_attention(q, k, v).double() - right
    assert rows[0]["out"] == pytest.approx(float(off.norm() / right.norm()), rel=1e-6)


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "precision.json"
    assert main([*TINY, "--values", "1000", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert len(result["rounding"]) == 2 * len(rounding.TITLES)
    assert [(row["length"], row["segments"]) for row in result["segments"]] == [
        (length, way) for length in (8, 9) for way in ("ceiling", "longer first", "spread")
    ]
    assert result["segments"][0]["inverse"] == result["segments"][2]["inverse"]  # 4 divides 8: cut alike
    assert [row["values"] for row in result["norm"]] == [1000]
    assert "| spread |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "speed"], "no 'speed'; there are rounding, segments, norm"),
        (["--length", "100"], "must be a multiple of --segment-length"),
        (["--lengths", "63"], "63 tokens are fewer than the 64 of --landmarks"),
        (["--values", "1e6"], "whole numbers above 0"),
    ],
)
def test_mistakes_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(words)
