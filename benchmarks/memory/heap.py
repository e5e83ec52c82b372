"""``python -m benchmarks.memory.heap``: what the C library holds on to on a CPU, and what returning it costs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.common import check_file, chosen, markdown, run
from benchmarks.memory.__main__ import run_case

CASES = "clm-four-fp32,clm-four-fp32-checkpointing"
WAYS = ("kept", "returned", "huge")
DESCRIPTION = """The most memory that a training on a CPU has allocated, the most that is resident over a tiny run, and
the processor time of a step: with freed blocks kept, with freed blocks returned to the system, and kept in huge pages.
"""
EXAMPLES = ("OMP_NUM_THREADS=1 python -m benchmarks.memory.heap --out heap.json",)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = common.build_parser("memory.heap", DESCRIPTION, EXAMPLES, check=None)
    parser.add_argument("--cases", default=CASES, metavar="C,C", help=f"of benchmarks.memory (default: {CASES})")
    args = parser.parse_args(arguments)
    check_file("--out", args.out)
    from benchmarks.memory.cases import CASES as every_case

    known = {case.name: case for case in every_case}
    names = chosen("--cases", args.cases, known)

    import torch

    made = common.provenance("memory.heap", arguments, torch.device("cpu"))
    rows = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        row: dict[str, Any] = {"case": name, "allocated_bytes": run_case(known[name], "allocated")["bytes"]}
        for heap in WAYS:
            found = run_case(known[name], heap)
            row |= {f"{heap}_bytes": found["bytes"], f"{heap}_processor_seconds": found["processor_seconds"]}
        rows.append(row)
    head = ["case", "allocated, GiB", "resident, kept", "returned", "huge pages", "processor time of a step"]
    lines = [
        [
            row["case"],
            *(f"{row[f'{way}_bytes'] / 2**30:.2f}" for way in ("allocated", *WAYS)),
            ", ".join(f"{row[f'{way}_processor_seconds']:.1f} s" for way in WAYS),
        ]
        for row in rows
    ]
    print(markdown(head, lines))
    common.write_json(args.out, {"schema": 1, "provenance": made, "rows": rows})
    return 0


if __name__ == "__main__":
    run(main, "memory.heap")
