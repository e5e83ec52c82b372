"""``python -m benchmarks.tokenization.divided``: `prepare` on one file that cannot be entered in the middle.

For each kind of file it prints the rate of the reader alone, per second of processor time. Then `prepare` runs with
one process and with several: processor time as a multiple of the wall clock, and whether the bytes are the same. The
largest part is the text that a kill costs each process at most. Start-up is inside the wall clock. Meaningful only on
a machine where nothing else runs; the load average before each run is printed for that.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import check_file, check_positive, run
from benchmarks.tokenization.__main__ import python_sources
from data_pipeline.prepare.plan import plan_preparation
from data_pipeline.prepare.run import PrepareOptions, prepare
from data_pipeline.sources.corpus import open_corpus
from data_pipeline.sources.reading import Reading
from data_pipeline.sources.records import read_chunks
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer

GOAL = 1.6
"""Least processor time of two processes, as a multiple of the wall clock."""
EXAMPLES = ("python -m benchmarks.tokenization.divided --megabytes 150 --out divided.json",)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 1 if the bytes differ, or with ``--check`` if the goal is not met."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = common.build_parser("tokenization.divided", "prepare on one file that cannot be cut", EXAMPLES)
    parser.add_argument("--megabytes", type=float, default=120.0, metavar="X", help="text, in units of 10^6 bytes")
    parser.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="of the tokenizer")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes of the second run")
    parser.add_argument("--kinds", default="jsonl.gz,csv,parquet", metavar="K,K", help="jsonl.gz, csv, parquet")
    args = parser.parse_args(arguments)
    check_positive(args, "megabytes", "workers")
    check_file("--out", args.out)
    texts = repeated_sources(args.megabytes * 1e6)
    tokenizer = train_tokenizer(texts[: max(20, len(texts) // 20)], args.vocab_size)
    rows = []
    for kind in args.kinds.split(","):
        with tempfile.TemporaryDirectory() as work:
            rows.append(measure(kind, texts, tokenizer, args.workers, Path(work)))
        print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        import torch

        provenance = common.provenance("tokenization.divided", arguments, torch.device("cpu"))
        common.write_json(args.out, {"schema": 1, "provenance": provenance, "rows": rows})
    slow = args.check and any(row["several"]["cores"] < GOAL for row in rows)
    return int(slow or not all(row["same_bytes"] for row in rows))


def repeated_sources(size: float) -> list[str]:
    """Python sources, again and again with another first line, until they have ``size`` bytes."""
    texts: list[str] = []
    have = copy = 0
    while have < size:
        for text in python_sources():
            texts.append(f"# copy {copy}\n{text}")
            have += len(texts[-1].encode())
            if have >= size:
                break
        copy += 1
    return texts


def write_file(kind: str, texts: list[str], folder: Path) -> Path:
    """The texts as one file; raises :class:`KeyError` for an unknown kind."""
    path = folder / f"text.{kind}"
    if kind == "jsonl.gz":
        with gzip.open(path, "wt", compresslevel=6, encoding="utf-8") as f:
            f.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([["text"], *([text] for text in texts)])
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": texts}), path, row_group_size=len(texts))
    else:
        raise KeyError(kind)
    return path


def measure(kind: str, texts: list[str], tokenizer: Tokenizer, workers: int, work: Path) -> dict[str, Any]:
    """The numbers of one kind of file."""
    path = write_file(kind, texts, work)
    row: dict[str, Any] = {"kind": kind, "text_bytes": sum(len(text.encode()) for text in texts)}
    with _timed() as seconds:
        [piece] = open_corpus([path]).pieces(1 << 40, Reading())
        read = sum(len(chunk.data) for chunk in read_chunks(piece, Reading().wanted, 4 << 20, lambda digest: None))
    row["reader_megabytes_per_cpu_second"] = read / 1e6 / seconds["processor"]
    for name, count in (("one", 1), ("several", workers)):
        row[name] = {"workers": count, "load_before": os.getloadavg()[0]}
        with _timed() as seconds:
            done = prepare(plan_preparation([path], tokenizer), work / name, PrepareOptions(workers=count))
        row[name] |= {**seconds, "cores": seconds["processor"] / seconds["wall"], "parts": done.units}
        assert done.shards is not None
        row["largest_part_tokens"] = max(shard.num_tokens for shard in done.shards.manifest.shards)
    files = {p.name: p.read_bytes() for p in (work / "one").iterdir()}
    row["same_bytes"] = files == {p.name: p.read_bytes() for p in (work / "several").iterdir()}
    return row


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Seconds of wall clock and of processor time, of this process and of its children that have ended."""
    seconds: dict[str, float] = {}
    wall, processor = time.perf_counter(), _processor()
    yield seconds
    seconds |= {"wall": time.perf_counter() - wall, "processor": _processor() - processor}


def _processor() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    run(main, "tokenization.divided")
