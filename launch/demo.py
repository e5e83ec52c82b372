"""``nystrom demo``: the main job on the built-in corpus, as the commands a user would type.

Each step is printed as the command it is, so that the demo is also the tutorial. A step whose output is already there
is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.command_line import Parser
from data_pipeline.console import INNER, say_next
from data_pipeline.errors import UserError
from data_pipeline.processes import available_cores, child_command
from launch.demo_estimate import Cost, Speed, duration, measure

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PROGRAM = "launch.program"
SUITES = ("validity", "lm", "classify", "generate", "approximation", "repeats")
VOCAB_SIZE = 4096
POLL_SECONDS = 0.1
SHOWN = 6
"""Metrics of each suite in the table at the end; the report has all."""

# By model, of steps timed on two cores of an AMD EPYC (Zen 5) with nothing beside them, in bf16 and restricted to AVX2:
# in fp32 half the tokens a second made the demo 263 s long instead of 203 s. The table at the demo's end compares.
PREPARING = Cost(starts=0.4, tokens=0)
TRAINING = {"masked": Cost(2.5, 420_000, 33), "causal": Cost(2.5, 750_000, 24)}
EVALUATING = {"masked": Cost(2.0, 200_000, 36), "causal": Cost(2.0, 310_000, 40)}


@dataclass(frozen=True)
class Step:
    """One command of the demo, and how to know that it need not run."""

    title: str
    command: list[str]
    done: Callable[[], bool]
    cost: Cost = PREPARING


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = Parser(
        prog="nystrom demo",
        description="All of it on a built-in corpus (the Python standard library's source and documentation): "
        "tokenizer, shards, a masked and a causal Nyströmformer by DeepSpeed, evaluation, one HTML report. "
        "Takes minutes on two cores; run again, it does only what is missing.",
        examples=["nystrom demo", ("nystrom demo --dir /tmp/demo --nproc 1", "elsewhere, with one process")],
        exit_status={75: "stopped, with a checkpoint of what was trained: the same command resumes"},
    )
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="where everything goes")
    parser.add_argument("--nproc", type=int, default=2, help="processes to train with")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing of the demo; returns the exit status of the first step that failed, or 0."""
    args = build_parser().parse_args(argv)
    if args.nproc < 1:
        raise UserError(f"--nproc {args.nproc}: at least one process is needed")
    try:
        args.dir.mkdir(parents=True, exist_ok=True)
        lock = (args.dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{args.dir} can't hold the demo: {error.strerror}") from error
    with lock:
        try:
            # The system's lock: it goes with its process, however that ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another demo is at work in {args.dir}: wait for it, or say --dir another") from None
        except OSError:
            pass  # a file system without locks
        return _demo(args)


def _demo(args: argparse.Namespace) -> int:
    steps = demo_steps(args.dir, args.nproc)
    expected = _announce([step for step in steps if not step.done()], args.nproc)
    started = time.monotonic()
    rows: list[Timing] = []
    for number, step in enumerate(steps, 1):
        print(f"\n[{number}/{len(steps)}] {step.title}", flush=True)
        if step.done():
            print("      already there", flush=True)
            rows.append(Timing(step.title))
            continue
        print(f"      $ nystrom {shlex.join(step.command)}", flush=True)
        began = time.monotonic()
        status = _run(step.command)
        if status:
            with contextlib.suppress(OSError):  # of a terminal that is gone
                print(
                    f"\nnystrom demo: step {number} ended with status {status}; what was done stays, and the same "
                    "command resumes there",
                    file=sys.stderr,
                )
            return status
        rows.append(Timing(step.title, expected.get(step.title), time.monotonic() - began))
    _summary(args.dir, rows, time.monotonic() - started)
    say_next(["generate", "--checkpoint", args.dir / "runs" / "demo-clm", "--prompt", "import "])
    return 0


def _announce(steps: Sequence[Step], nproc: int) -> dict[str, float]:
    """Say how long these steps will take on this machine; returns the seconds of each by its title."""
    if not any(step.cost.tokens for step in steps):
        return {}  # seconds, which a measurement would double
    print("measuring how fast this machine trains, to say how long the demo takes ...", file=sys.stderr, flush=True)
    speed: Speed | None = measure(nproc)
    if speed is None:
        print("How long this takes could not be measured.", flush=True)
        return {}
    expected = {step.title: speed.seconds(step.cost, nproc) for step in steps}
    each = f"{speed.threads} thread{'s' if speed.threads > 1 else ''} each"
    print(
        f"This takes about {duration(sum(expected.values()))} on this machine: {nproc} process(es), {each}, on "
        f"{available_cores()} cores. One trains {speed.tokens_per_second:,.0f} tokens/s in {speed.precision} and "
        f"starts in {speed.import_seconds:.0f} s.",
        flush=True,
    )
    return expected


def _run(command: list[str]) -> int:
    """Run ``nystrom`` with these words; returns its status.

    SIGTERM, Ctrl-C and SIGHUP are passed on as SIGTERM, once, and waited for: training saves first (status 75). So is
    our end by -9. 75 also for a step that SIGTERM killed or did not reach: the same command resumes here as well.
    """
    from launch.watch import StopRequest
    from pretrain.distributed.signals import EXIT_PREEMPTED

    request = StopRequest()
    try:
        # In a session of its own: Ctrl-C reaches it through this process only, and once.
        words = child_command(PROGRAM, *command, number=signal.SIGTERM)
        env = {**os.environ, INNER: "1"}  # what comes next is the demo's next step
        process = subprocess.Popen(words, start_new_session=True, env=env)
        asked = False
        while True:
            try:
                status = process.wait(timeout=POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                if request.number is not None and not asked:
                    asked = True
                    process.send_signal(signal.SIGTERM)
    finally:
        request.restore()
    if request.number is not None and status in (0, -signal.SIGTERM):
        return EXIT_PREEMPTED
    return status if status >= 0 else 128 - status


def demo_steps(folder: Path, nproc: int) -> list[Step]:
    """The commands of the demo in their order, writing below ``folder``."""
    corpus, tokenizer, runs, report = folder / "corpus", folder / "tokenizer", folder / "runs", folder / "report.html"
    train, valid = folder / "shards" / "train", folder / "shards" / "valid"
    labelled = corpus / "classify-train.jsonl", corpus / "classify-test.jsonl"
    models = (("masked", runs / "demo-mlm"), ("causal", runs / "demo-clm"))

    steps = [
        Step(
            "Collect the corpus: the standard library's source and documentation",
            _words("data", "stdlib", "--out", corpus),
            (corpus / "classify-test.jsonl").exists,
        ),
        Step(
            "Train a byte-level BPE tokenizer",
            _words(
                *("data", "tokenizer", "--input", corpus / "train.jsonl"),
                *("--vocab-size", VOCAB_SIZE, "--out", tokenizer),
            ),
            (tokenizer / "tokenizer.json").exists,
        ),
    ]
    for shards in (train, valid):
        text = corpus / f"{shards.name}.jsonl"
        steps.append(
            Step(
                f"Tokenize the {shards.name} split into shards",
                _words("data", "prepare", "--input", text, "--tokenizer", tokenizer, "--out", shards),
                (shards / "manifest.json").exists,
            )
        )
    for word, run in models:
        steps.append(
            Step(
                f"Pretrain a small {word} Nyströmformer: {nproc} processes, ZeRO-2, three lengths",
                _words(
                    *("launch", "local", "--nproc", nproc, "--config", CONFIGS / f"{run.name}.yaml"),
                    *("--set", f"output_dir={runs}", f"data.train={train}", f"data.valid={valid}"),
                ),
                (run / "export" / "export.json").exists,  # the last file that training writes
                TRAINING[word],
            )
        )
    for word, run in models:
        steps.append(
            Step(
                f"Evaluate the {word} model: validity, loss, classification, samples, exact attention, recall",
                _words(
                    *("launch", "local", "--nproc", nproc, "--", "eval", *SUITES, "--checkpoint", run),
                    *("--train", labelled[0], "--test", labelled[1], "--set", "lm.max_tokens=65_536"),
                    *("--labels", 64, "--max-length", 128, "--batch-size", 8, "--epochs", 10),
                ),
                _All([run / "eval" / f"{suite}.json" for suite in SUITES]),
                EVALUATING[word],
            )
        )
    results = [run / "eval" / f"{suite}.json" for _, run in models for suite in SUITES]
    steps.append(
        Step(
            "Write the report",
            _words("report", *(run for _, run in models), "--out", report),
            _All([report], newer_than=results),
        )
    )
    return steps


def _words(*words: object) -> list[str]:
    return [str(word) for word in words]


@dataclass(frozen=True)
class _All:
    """Whether all files are there, none of them older than one of ``newer_than``."""

    files: Sequence[Path]
    newer_than: Sequence[Path] = ()

    def __call__(self) -> bool:
        if not all(path.exists() for path in (*self.files, *self.newer_than)):
            return False
        oldest = min(path.stat().st_mtime for path in self.files)
        return all(path.stat().st_mtime <= oldest for path in self.newer_than)


@dataclass(frozen=True)
class Timing:
    """What one step took, and was expected to; None where it was there already or could not be told."""

    title: str
    expected: float | None = None
    took: float | None = None


def _summary(folder: Path, timings: Sequence[Timing], seconds: float) -> None:
    """Print where the time went and what the evaluations measured, and last the report's path."""
    width = max(len(timing.title) for timing in timings)
    print(f"\n{'step'.ljust(width)}  expected   took  share")
    for timing in timings:
        if timing.took is None:
            print(f"{timing.title.ljust(width)}  already there")
        else:
            expected = "" if timing.expected is None else f"{timing.expected:.0f} s"
            print(f"{timing.title.ljust(width)}  {expected:>8}{timing.took:>5.0f} s{timing.took / seconds:>7.0%}")
    known = [timing.expected for timing in timings if timing.expected is not None]
    print(f"{'in all'.ljust(width)}  {f'{sum(known):.0f} s' if known else '':>8}{seconds:>5.0f} s\n")
    rows = [("model", "suite", "measure", "value")]
    for run in ("demo-mlm", "demo-clm"):
        for suite in SUITES:
            path = folder / "runs" / run / "eval" / f"{suite}.json"
            if not path.exists():
                raise UserError(
                    f"{path} is missing although its step succeeded: delete {path.parent} and run the demo again"
                )
            metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
            for name, metric in list(metrics.items())[:SHOWN]:
                spread = f" ± {metric['std']:.3f}" if metric.get("std") is not None else ""
                rows.append((run, suite, name, f"{metric['value']:.4g}{spread}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    print(f"\n{folder / 'report.html'}")
