"""Run folders with results of every kind, and a reader of the page, for the tests of the report."""

from __future__ import annotations

import hashlib
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from eval.results.schema import Estimator, Grid, Metric, ModelInfo, Outcome, Series, Table
from eval.results.statistics import bootstrap
from eval.results.store import obtain
from eval.tasks.classification import MAJORITY_ROW, MODEL_ROW, SCRATCH_ROW, TABLE, TFIDF_ROW
from eval.tasks.validity import CHECKS_TABLE

EVIL = '<script>alert("x")</script> & http://evil.example/a.png'
LENGTHS = [256.0, 512.0, 1024.0, 2048.0, 4096.0]


def make_run(root: Path, name: str, objective: str = "clm", *, lr: float = 1e-3) -> Path:
    """A run folder without evaluation: 80 steps, two stages, and half a line that a killed run left."""
    run = root / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        f"name: {name}\nmodel: {{objective: {objective}, attention: nystrom}}\noptimizer: {{lr: {lr}}}\n"
        "curriculum:\n- {until_tokens: 4000, seq_len: 64, micro_batch: 4}\n"
        "- {until_tokens: 8000, seq_len: 128, micro_batch: 2}\n"
    )
    lines: list[dict[str, object]] = [{"kind": "event", "event": "start", "step": 0, "tokens": 0}]
    for step in range(1, 81):
        tokens = step * 100
        lines.append(
            {"kind": "train", "step": step, "tokens": tokens, "loss": 5 - step / 40 + 100 * lr, "lr": lr,
             "grad_norm": 1 / step, "tokens_per_second": 900 + step, "mfu": None, "data_wait": 0.01, "seconds": step}
        )  # fmt: skip
        if step % 20 == 0:
            lines.append({"kind": "valid", "step": step, "tokens": tokens, "loss": 5.1 - step / 40})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st')
    (run / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13"}}))
    return run


def write(
    folder: Path, task: str, outcome: Outcome, *, suite: str | None = None, gate: str = "passed",
    model: ModelInfo | None = None, settings: dict[str, Any] | None = None, data: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write a result as a suite would; by default of one model, on one text, at one length."""
    name = suite or task
    obtain(
        folder, name, task=task, version=1, gate=gate, compute=lambda _: outcome,
        model=model or ModelInfo("hash", folder.parent.name, "clm", "nystrom", 1234567, 8000),
        data=data or {"path": "shards/valid", "tokens": 5000, "documents": 6, "hash": "d"},
        settings=settings or {"length": 128, "max_tokens": None, "max_length": 128, "precision": "fp32"},
    )  # fmt: skip
    return folder / f"{name}.json"


def write_everything(run: Path, objective: str = "clm", *, shift: float = 0.0, gate: str = "passed") -> None:
    """Results of the tasks the page knows, and of one it does not; ``shift`` makes one run differ from another."""
    model = ModelInfo("hash", run.name, objective, "nystrom", 1234567, 8000)
    outcomes = {
        "lm": _masked() if objective == "mlm" else _lm(shift),
        "classify": _classify(shift),
        "generate": _fill(shift) if objective == "mlm" else _generate(run.name),
        "needle": _needle(shift),
        "approximation": _approximation(shift),
        "house_task": _unknown(shift),
    }
    checks = [
        ["causality", 0.0, "<= 0.0001", gate != "forced", "detail"],
        ["batch mates", 1e-7, "<= 0.0001", True, ""],
    ]
    passed = Outcome({"passed": Metric(float(gate != "forced"), True)}, [Table(CHECKS_TABLE, ["check"] * 5, checks)])
    write(run / "eval", "validity", passed, gate="none", model=model)
    classes = {
        "hash": "c", "classes": ["a", "b"], "train": "a.csv", "test": "b.csv", "train_records": 10, "test_records": 5,
    }  # fmt: skip
    for task, outcome in outcomes.items():
        write(run / "eval", task, outcome, gate=gate, model=model, data=classes if task == "classify" else None)


def _lm(shift: float) -> Outcome:
    rng = np.random.default_rng(0)
    records = [
        {"id": hashlib.sha256(str(i).encode()).hexdigest(), "nats": float(n) + 20 * shift, "tokens": 20}
        for i, n in enumerate(rng.normal(60, 4, 300))
    ]
    estimator = Estimator("nats", "tokens", exponential=True)
    interval = bootstrap(records, estimator)
    position = [4.0, 12.0, 24.0, 48.0, 96.0]
    loss = [4.0 + shift, 3.5, 3.2, 3.0 + shift, 2.9]
    return Outcome(
        {
            "perplexity": Metric(interval.value, False, n=len(records), low=interval.low, high=interval.high),
            "bits_per_byte": Metric(1.31 + shift, False),
            "unigram_entropy": Metric(6.0, False),
        },
        [
            Table("held-out loss", ["predictor", "loss"], [["model", 3.0], ["unigram entropy", 6.0]], "A note."),
            Table("by document", ["document", "words", "kept"], [[f"book {i}", 100 * i, True] for i in range(20)]),
        ],
        [
            Series("loss by position", position, loss, "position in the window", "loss, nats per token",
                   low=[v - 0.1 for v in loss], high=[v + 0.1 for v in loss]),
            *(Series(f"stride {stride}", LENGTHS, [20 - stride / 64 - i / 2 + shift for i in range(5)],
                     "context, tokens", "perplexity", chart="perplexity by context") for stride in (64, 128)),
            Series("unigrams", LENGTHS, [21.0] * 5, "context, tokens", "perplexity", chart="perplexity by context",
                   reference=True),
        ],
        records=records,
        estimators={"perplexity": estimator},
    )  # fmt: skip


def _masked() -> Outcome:
    return Outcome(
        {"masked_accuracy": Metric(0.41, True, n=800, low=0.38, high=0.44), "masked_loss": Metric(3.1, False, n=800)},
        [Table("held-out loss", ["predictor", "accuracy", "targets"], [["model", 0.41, 800]])],
    )


def _classify(shift: float) -> Outcome:
    columns = ["predictor", "accuracy", "± std", "macro F1", "± std", "seeds"]
    rows = [
        [MODEL_ROW, 0.9 - shift, 0.01, 0.88, 0.02, 3],
        [SCRATCH_ROW, 0.6, 0.02, 0.5, 0.02, 3],
        [TFIDF_ROW, 0.95, None, 0.94, None, 1],
        [MAJORITY_ROW, 0.4, None, 0.1, None, 1],
    ]
    return Outcome({"accuracy": Metric(0.9 - shift, True, 0.01, 3)}, [Table(TABLE, columns, rows)])


def _generate(name: str) -> Outcome:
    samples: list[dict[str, Any]] = [
        {"kind": "continuation", "prompt": EVIL, "text": f"{EVIL} by {name}", "real": EVIL, "perplexity": 12.0}
    ]
    samples += [
        {"kind": "continuation", "prompt": f"Prompt {i} of the held-out text, ", "text": f"continued by {name}. " * 9,
         "real": "what stands there", "perplexity": 10.0 + i}
        for i in range(9)
    ]  # fmt: skip
    table = Table("generated text", ["text", "distinct-2"], [["model", 0.7], ["real continuation", 0.8]])
    return Outcome({"distinct_2": Metric(0.7, None, n=10)}, [table], samples=samples)


def _fill(shift: float) -> Outcome:
    sample = {
        "kind": "fill_mask",
        "parts": [EVIL, "."],
        "answers": [{"right": EVIL, "rank_in_top_5": 1 if shift else 2, "top": [["cat", 0.5], [EVIL, 0.2]]}],
    }
    return Outcome({"top_1": Metric(0.5 + shift, True, n=20)}, samples=[sample])


def _needle(shift: float) -> Outcome:
    depths = ["0%", "25%", "50%", "75%", "100%"]
    values: list[list[float | None]] = [
        [max(0.0, 1.0 - 0.22 * j - 0.05 * abs(i - 2) - shift) for j in range(5)] for i in range(5)
    ]
    values[0][4] = None
    accuracy = [float(np.mean([row[j] or 0 for row in values])) for j in range(5)]
    return Outcome(
        {"accuracy": Metric(0.6 - shift, True, n=100, low=0.5 - shift, high=0.7 - shift)},
        series=[
            Series("accuracy", LENGTHS, accuracy, "length, tokens", "share found"),
            Series("chance", LENGTHS, [0.1] * 5, "length, tokens", "share found", chart="accuracy", reference=True),
        ],
        grids=[
            Grid("share found", [f"{n:,.0f}" for n in LENGTHS], depths, values, "length, tokens", "depth of the key",
                 0.0, 1.0, "20 keys in each cell.")
        ],
        samples=[{"kind": "hidden", "length": 256, "depth": 0.5, "key": "48213", "answer": EVIL, "right": False}],
    )  # fmt: skip


def _approximation(shift: float) -> Outcome:
    rng = np.random.default_rng(1)
    heads, layers = [f"head {i}" for i in range(12)], [f"layer {i}" for i in range(12)]
    values = [[float(v) for v in row] for row in rng.lognormal(-2, 1, (12, 12)) + shift]
    return Outcome(
        {"relative_error": Metric(float(np.mean(values)), False)},
        series=[
            Series(f"layer {i}", [8.0, 16.0, 32.0, 64.0], [math.exp(-k - i / 9) + shift for k in range(4)],
                   "landmarks", "relative error", chart="error by landmarks")
            for i in range(12)
        ],
        grids=[Grid("relative error", heads, layers, [list(row) for row in values], "head", "layer")],
    )  # fmt: skip


def _unknown(shift: float) -> Outcome:
    return Outcome(
        {"score": Metric(0.5 + shift, True)},
        [Table(f"odd {EVIL}", ["what", "value"], [[EVIL, 1.0], [None, float("inf")]], EVIL)],
        [Series(EVIL, [1.0, 2.0, 3.0], [1e5, 3.0, 2e7], f"x {EVIL} $a$", f"y {EVIL} $", scale="linear")],
        [Grid(EVIL, [EVIL, "b"], [EVIL], [[None, 1.0]], EVIL, EVIL, note=EVIL)],
        [{"kind": EVIL, EVIL: EVIL, "nested": {"a": [1, 2.5, None]}}],
    )


class Page(HTMLParser):
    """Collects elements, ids and text; fails on tags that do not nest."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._open and self._open[-1] in ("h1", "h2"):
            self.headings.append(data)

    @property
    def words(self) -> str:
        """All text, white space joined."""
        return " ".join(" ".join(self.text).split())
