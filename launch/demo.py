"""``nystrom demo``: the main job on the built-in corpus, as the commands a user would type.

Each step is printed as the command it is, so that the demo is also the tutorial. A step whose output is already there
is not run again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PROGRAM = [sys.executable, "-m", "launch.program"]


@dataclass(frozen=True)
class Step:
    """One command of the demo, and how to know that it need not run."""

    title: str
    command: list[str]
    done: Callable[[], bool]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing of the demo; returns the exit status of the first step that failed, or 0."""
    parser = argparse.ArgumentParser(
        prog="nystrom demo",
        description="The whole road on a built-in corpus (the Python standard library's source and documentation): "
        "tokenizer, shards, a masked and a causal Nyströmformer by DeepSpeed, evaluation, one HTML report. "
        "Takes minutes on two cores; run again, it does only what is missing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="where everything goes")
    parser.add_argument("--nproc", type=int, default=2, help="processes to train with")
    args = parser.parse_args(argv)
    steps = demo_steps(args.dir, args.nproc)
    started = time.monotonic()
    rows: list[tuple[str, str]] = []
    for number, step in enumerate(steps, 1):
        print(f"\n[{number}/{len(steps)}] {step.title}", flush=True)
        if step.done():
            print("      already there", flush=True)
            rows.append((step.title, "already there"))
            continue
        print(f"      $ nystrom {shlex.join(step.command)}", flush=True)
        began = time.monotonic()
        status = subprocess.run([*PROGRAM, *step.command], check=False).returncode
        if status:
            print(
                f"\nnystrom demo: step {number} ended with status {status}; what was done stays, the same command goes on there",
                file=sys.stderr,
            )
            return status
        rows.append((step.title, f"{time.monotonic() - began:.0f} s"))
    _summary(args.dir, rows, time.monotonic() - started)
    return 0


def demo_steps(folder: Path, nproc: int) -> list[Step]:
    """The commands of the demo in their order, writing below ``folder``."""
    corpus, tokenizer, runs = folder / "corpus", folder / "tokenizer", folder / "runs"
    report = folder / "report.html"

    def exists(path: Path) -> Callable[[], bool]:
        return path.exists

    steps = [
        Step(
            "Collect the corpus: the standard library's source and documentation",
            ["data", "stdlib", "--out", str(corpus)],
            exists(corpus / "classify-test.jsonl"),
        ),
        Step(
            "Train a byte-level BPE tokenizer",
            [
                "data",
                "tokenizer",
                "--input",
                str(corpus / "train.jsonl"),
                "--vocab-size",
                "8192",
                "--out",
                str(tokenizer),
            ],
            exists(tokenizer / "tokenizer.json"),
        ),
    ]
    for split in ("train", "valid"):
        shards = folder / "shards" / split
        steps.append(
            Step(
                f"Tokenize the {split} split into shards",
                ["data", "prepare", "--input", str(corpus / f"{split}.jsonl")]
                + ["--tokenizer", str(tokenizer), "--out", str(shards)],
                exists(shards / "manifest.json"),
            )
        )
    for objective, word in (("mlm", "masked"), ("clm", "causal")):
        steps.append(
            Step(
                f"Pretrain a small {word} Nyströmformer: {nproc} processes, ZeRO-2, bf16, three lengths",
                ["launch", "local", "--nproc", str(nproc), "--config", str(CONFIGS / f"demo-{objective}.yaml")]
                + ["--set", f"output_dir={runs}", f"data.train={folder / 'shards/train'}"]
                + [f"data.valid={folder / 'shards/valid'}"],
                lambda run=runs / f"demo-{objective}": _finished(run),
            )
        )
    for objective, word in (("mlm", "masked"), ("clm", "causal")):
        run = runs / f"demo-{objective}"
        steps.append(
            Step(
                f"Evaluate the {word} model: validity, held-out loss, classification, samples",
                ["eval", "validity", "lm", "classify", "generate", "--checkpoint", str(run)]
                + ["--train", str(corpus / "classify-train.jsonl"), "--test", str(corpus / "classify-test.jsonl")],
                lambda run=run: all(
                    (run / "eval" / f"{t}.json").exists() for t in ("validity", "lm", "classify", "generate")
                ),
            )
        )
    results = [
        runs / f"demo-{o}" / "eval" / f"{t}.json" for o in ("mlm", "clm") for t in ("lm", "classify", "generate")
    ]
    steps.append(
        Step(
            "Write the report",
            ["report", str(runs / "demo-mlm"), str(runs / "demo-clm"), "--out", str(report)],
            lambda: (
                report.exists() and all(p.exists() and p.stat().st_mtime <= report.stat().st_mtime for p in results)
            ),
        )
    )
    return steps


def _finished(run: Path) -> bool:
    """Whether training wrote its last file, the consolidated weights."""
    return (run / "export" / "export.json").exists()


def _summary(folder: Path, timings: list[tuple[str, str]], seconds: float) -> None:
    """Print what each step took and what the evaluations measured, and last the report's path."""
    width = max(len(title) for title, _ in timings)
    print(f"\n{'step'.ljust(width)}  time")
    for title, took in timings:
        print(f"{title.ljust(width)}  {took}")
    print(f"{'in all'.ljust(width)}  {seconds:.0f} s\n")
    rows = [("model", "task", "measure", "value")]
    for run in ("demo-mlm", "demo-clm"):
        for task in ("validity", "lm", "classify", "generate"):
            path = folder / "runs" / run / "eval" / f"{task}.json"
            if not path.exists():
                raise UserError(
                    f"{path} is missing although its step succeeded: delete {path.parent} and run the demo again"
                )
            for name, metric in json.loads(path.read_text(encoding="utf-8"))["metrics"].items():
                spread = f" ± {metric['std']:.3f}" if metric.get("std") is not None else ""
                rows.append((run, task, name, f"{metric['value']:.4g}{spread}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    print(f"\n{folder / 'report.html'}")
