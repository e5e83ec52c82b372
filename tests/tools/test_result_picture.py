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


def write_labels(file: Path, objective: str, values: tuple[float, float, float], labels: int) -> str:
    metrics = {
        f"{prefix}accuracy_at_{labels}": {"value": value, "low": value - 0.02, "high": value + 0.02}
        for prefix, value in zip(("", "scratch_", "tfidf_"), values, strict=True)
    }
    file.write_text(json.dumps({"model": {"objective": objective}, "metrics": metrics}))
    return str(file)


def test_accuracies_by_labels_are_those_of_the_results(tmp_path: Path) -> None:
    files = [
        write_labels(tmp_path / "causal.json", "clm", (0.8125, 0.625, 0.6875), 1000),
        write_labels(tmp_path / "more.json", "mlm", (0.875, 0.75, 0.8125), 2000),
        write_labels(tmp_path / "fewer.json", "mlm", (0.5, 0.5, 0.5), 500),
        write_labels(tmp_path / "again.json", "mlm", (0.625, 0.5, 0.5), 500),
    ]
    out = tmp_path / "imdb.svg"
    labels_picture.main([*files, "--out", str(out)])
    drawn = ET.fromstring(out.read_text())
    texts = [(text.text or "").strip() for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"pretrained 0.875", "TF-IDF 0.812", "random weights 0.750", "500", "2,000"} <= set(texts)
    assert {"pretrained 0.812", "TF-IDF 0.688", "random weights 0.625", "1,000"} <= set(texts)
    titles = [text.partition(":")[0] for text in texts if "model:" in text]
    assert titles == ["masked model", "causal model"]
    assert "number of labelled reviews" in out.read_text()
    assert not [drawn for drawn in result_picture.COLOURS if drawn in out.read_text()]

    labels_picture.main([files[1], files[2], "--out", str(out)])
    assert "causal model" not in out.read_text()
    assert "pretrained 0.875" in out.read_text()
