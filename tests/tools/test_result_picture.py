"""The pictures of README.md and docs/imdb.md show the numbers of the results that they are drawn from."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

from tools import labels_picture, result_picture


def write_run(folder: Path, metric: str, losses: list[float], accuracy: float) -> None:
    (folder / "eval").mkdir(parents=True)
    steps: list[dict[str, object]] = [
        {"kind": "train", "tokens": 1000 * i, "loss": loss} for i, loss in enumerate(losses, 1)
    ]
    steps.insert(1, {"kind": "train", "tokens": 1500, "loss": None})  # a batch without a target
    valid = [{"kind": "valid", "tokens": 3000, "loss": losses[-1]}, {"kind": "valid", "tokens": 3100, "loss": None}]
    rows = [*steps, {"kind": "event", "event": "done"}, *valid]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lm = {metric: {"value": losses[-1]}, "unigram_entropy": {"value": 6.4}}
    names = ("accuracy", "scratch_accuracy", "tfidf_accuracy", "majority_accuracy")
    classify = {name: {"value": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1} for name in names}
    for suite, metrics in (("lm", lm), ("classify", classify)):
        (folder / "eval" / f"{suite}.json").write_text(json.dumps({"metrics": metrics}))


def test_it_says_what_the_runs_say_in_colours_for_both_grounds(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "demo-mlm", "masked_loss", [7.0, 6.0, 4.125], 0.625)
    write_run(tmp_path / "runs" / "demo-clm", "loss", [7.0, 5.0, 3.375], 0.5)
    out = tmp_path / "result.svg"
    result_picture.main([str(tmp_path), "--out", str(out)])
    drawn = ET.fromstring(out.read_text())
    texts = {(text.text or "").strip() for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"masked 4.12", "causal 3.38", "0.62 [0.53, 0.72]", "0.50 [0.40, 0.60]", "TF-IDF"} <= texts
    assert not [drawn for drawn in result_picture.COLOURS if drawn in out.read_text()]
    assert "prefers-color-scheme: dark" in out.read_text()


def test_accuracies_by_labels_are_those_of_the_result(tmp_path: Path) -> None:
    metrics = {
        f"{prefix}accuracy_at_{labels}": {"value": value, "low": value - 0.02, "high": value + 0.02}
        for prefix, value in (("", 0.875), ("scratch_", 0.75), ("tfidf_", 0.8125))
        for labels in (2000, 500)
    }
    for labels in (500, 2000):
        own = {name: metric for name, metric in metrics.items() if name.endswith(f"_{labels}")}
        (tmp_path / f"at-{labels}.json").write_text(json.dumps({"metrics": own}))
    out = tmp_path / "imdb.svg"
    labels_picture.main([str(tmp_path / "at-2000.json"), str(tmp_path / "at-500.json"), "--out", str(out)])
    drawn = ET.fromstring(out.read_text())
    texts = {(text.text or "").strip() for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"pretrained 0.875", "TF-IDF 0.812", "random weights 0.750", "500", "2,000"} <= texts
    assert "number of labelled reviews" in out.read_text()
    assert not [drawn for drawn in result_picture.COLOURS if drawn in out.read_text()]
