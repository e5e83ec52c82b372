"""Arguments of ``python -m benchmarks.tokenization``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import check_file, check_positive, chosen, in_turns, markdown, run
from benchmarks.tokenization.measure import Run, run_method
from benchmarks.tokenization.methods import METHODS, NEEDS, TITLES
from data_pipeline.errors import UserError
from data_pipeline.sources.documents import iter_documents
from data_pipeline.sources.reading import Reading
from data_pipeline.units import format_bytes

GOALS = {("ours", "bare"): 0.95, ("ours", "datasets"): 2.5, ("ours-tiktoken", "bare"): 3.0}
"""The least ratio of speeds, of the first to the second."""
FILES = 16
"""JSONL files of the text, so that every competitor can share the work among processes."""
DESCRIPTION = """Tokenize the same text with every competitor, in turns, each in a process of its own: text a second,
as a ratio to the bare tokenizer, and the peak of memory of all processes together."""
EXAMPLES = (
    "python -m benchmarks.tokenization --rounds 5 --out tokenization.json",
    ("python -m benchmarks.tokenization --input reviews.jsonl.gz", "the ratios depend on the text"),
    ("python -m benchmarks.tokenization --methods ours-tiktoken --megabytes 64 --repeat 16 --rounds 1", "1 GB"),
)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = common.build_parser("tokenization", DESCRIPTION, EXAMPLES)
    parser.add_argument("--methods", default=",".join(METHODS), metavar="M,M", help=f"of {', '.join(METHODS)}")
    parser.add_argument(
        "--input", nargs="+", metavar="PATH", help="text as `nystrom data prepare` reads it (default: Python sources)"
    )
    parser.add_argument("--megabytes", type=float, default=64.0, metavar="X", help="text, in units of 10^6 bytes")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="the same text so many times")
    parser.add_argument("--vocab-size", type=int, default=32768, metavar="N", help="of the tokenizer")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes or threads each")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each")
    parser.add_argument("--work", type=Path, metavar="DIR", help="scratch folder (default: a temporary one)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 1 if ``--check`` and a goal is not met."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    names = chosen("--methods", args.methods, METHODS)
    check_positive(args, "rounds", "repeat", "workers", "megabytes")
    check_file("--out", args.out)
    skipped = {name: f"{NEEDS[name]} is not installed" for name in names if name in NEEDS and not _has(NEEDS[name])}
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        runs, text = _measure(args, [name for name in names if name not in skipped], Path(work))
    rows = [_row(name, runs, text["bytes"]) for name in runs]
    goals = _goals(runs)
    print(_table(rows, skipped, text))
    for goal in goals:
        print(f"{goal['first']} / {goal['second']}: {goal['ratio']:.2f} (goal {goal['goal']}): {goal['met']}")
    if args.out is not None:
        import torch

        content = {
            "schema": 1,
            "provenance": common.provenance("tokenization", arguments, torch.device("cpu")),
            "text": text,
            "rows": rows,
            "skipped": skipped,
            "goals": goals,
        }
        common.write_json(args.out, content)
    return int(args.check and any(not goal["met"] for goal in goals))


def python_sources() -> Iterator[str]:
    """Texts of the .py files of the standard library and of the installed packages, sorted by path."""
    for name in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(name))
        for path in sorted(root.rglob("*.py")):
            if name == "stdlib" and "site-packages" in path.parts:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip():
                yield text


def input_texts(inputs: Sequence[str]) -> Iterator[str]:
    """Texts of files that `nystrom data prepare` reads. Raises :class:`UserError` as it does."""
    for document in iter_documents(inputs, Reading()):
        yield document.text


def write_corpus(folder: Path, megabytes: float, repeat: int = 1, inputs: Sequence[str] = ()) -> tuple[int, int]:
    """Write the text that all competitors tokenize, to JSONL files: (documents, bytes of text).

    It is about ``megabytes`` * 10^6 bytes of the ``inputs``, or of Python sources, ``repeat`` times over; in one
    environment always the same. Raises :class:`UserError` if there is less.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    size = 0
    for text in input_texts(inputs) if inputs else python_sources():
        texts.append(text)
        size += len(text.encode())
        if size >= megabytes * 1e6:
            break
    if size < megabytes * 0.9e6:
        found = "the --input has" if inputs else "this environment has Python sources of"
        raise UserError(f"{found} {format_bytes(size)}, less than --megabytes {megabytes:g}: lower that")
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    for number in range(FILES):
        with open(folder / f"{number:02d}.jsonl", "w", encoding="utf-8") as f:
            for _ in range(repeat):
                f.writelines(lines[number::FILES])
    return len(texts) * repeat, size * repeat


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _measure(args: argparse.Namespace, names: Sequence[str], work: Path) -> tuple[dict[str, list[Run]], dict[str, Any]]:
    from data_pipeline.tokenization.training import train_tokenizer

    documents, size = write_corpus(work / "corpus", args.megabytes, args.repeat, args.input or ())
    with open(work / "corpus" / "00.jsonl", encoding="utf-8") as lines:
        train_tokenizer((json.loads(line)["text"] for line in lines), args.vocab_size).save(work / "tokenizer")
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for _, name in in_turns(names, args.rounds, warm_up=False):
        runs[name].append(run_method(name, work / "corpus", work / "tokenizer", args.workers, work))
        print(f"  {name}: {format_bytes(size / runs[name][-1].seconds)}/s", file=sys.stderr, flush=True)
    kind = "the input" if args.input else "Python source"
    return runs, {
        "kind": kind,
        "documents": documents,
        "bytes": size,
        "vocab_size": args.vocab_size,
        "workers": args.workers,
    }


def _row(name: str, runs: dict[str, list[Run]], size: int) -> dict[str, Any]:
    mine = runs[name]
    speeds = [size / 1e6 / each.seconds for each in mine]
    return {
        "method": name,
        "title": TITLES[name],
        "megabytes_per_second": statistics.median(speeds),
        "all_megabytes_per_second": speeds,
        "ratio_to_bare": _ratio(runs, name, "bare") if "bare" in runs else None,
        "peak_bytes": max(each.peak_bytes for each in mine),
        "tokens": mine[0].tokens,
    }


def _ratio(runs: dict[str, list[Run]], first: str, second: str) -> float:
    """Median over the rounds of the ratio of speeds."""
    return statistics.median(b.seconds / a.seconds for a, b in zip(runs[first], runs[second], strict=True))


def _goals(runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    out = []
    for (first, second), goal in GOALS.items():
        if first in runs and second in runs:
            ratio = _ratio(runs, first, second)
            out.append({"first": first, "second": second, "goal": goal, "ratio": ratio, "met": ratio >= goal})
    return out


def _table(rows: Sequence[dict[str, Any]], skipped: dict[str, str], text: dict[str, Any]) -> str:
    head = ["", "MiB/s", "of the bare tokenizer", "memory, MiB", "tokens"]
    lines = [
        [
            row["title"],
            f"{row['megabytes_per_second'] * 1e6 / 2**20:.2f}",
            "" if row["ratio_to_bare"] is None else f"{row['ratio_to_bare']:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['tokens']:,}",
        ]
        for row in rows
    ]
    lines += [[TITLES[name], why, "", "", ""] for name, why in skipped.items()]
    title = (
        f"{text['documents']:,} documents, {format_bytes(text['bytes'])} of {text['kind']}, {text['workers']} workers"
    )
    return f"{title}\n\n{markdown(head, lines)}"


if __name__ == "__main__":
    run(main, "tokenization")
