"""``python -m benchmarks.onnx_speed``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.onnx_speed.__main__ import main
from data_pipeline.errors import UserError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--forms", "window"], "no 'window'; there are nystrom, softmax"),
        (["--lengths", "12,x"], "--lengths 12,x: must be positive whole numbers"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(words)


@pytest.mark.slow
def test_a_table_and_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    sizes = ["--hidden-size", "16", "--layers", "1", "--heads", "2", "--landmarks", "4"]
    out = tmp_path / "speed.json"
    assert main(["--forms", "softmax", "--lengths", "8,40", "--rounds", "2", *sizes, "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert set(content["seconds"]) == {"8", "40"}
    for times in content["seconds"].values():
        assert {name: len(values) for name, values in times.items()} == {"torch softmax": 2, "onnxruntime softmax": 2}
    printed = capsys.readouterr().out
    assert printed.startswith("| tokens | torch softmax, ms | onnxruntime softmax, ms | softmax: onnxruntime / torch |")
    assert f"written in {content['exports']['softmax']['seconds']:.0f} s" in printed
