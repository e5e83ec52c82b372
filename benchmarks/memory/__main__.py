"""Arguments of ``python -m benchmarks.memory``."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.common import check_file, chosen, markdown, run
from data_pipeline.processes import child_command
from pretrain.heap import HUGE_PAGES

GOAL = 0.15
"""The prediction may be off by so much of the measurement."""

STEPS = {"allocated": 3, "resident": 20, "kept": 20, "returned": 20, "huge": 20}
"""Of a measurement. The optimizer's state is made in the first. What is resident grows for some more: with 0.53 GiB in
use and freed blocks returned 0.61 GiB after 2 steps, 0.62 after 6, 0.64 after 20."""

DESCRIPTION = """Real training steps, each case in fresh processes: the most memory that PyTorch had allocated at once,
against what `nystrom plan` predicts. On CPUs by the allocator's events (torch.profiler), and for the largest cases by
the resident memory that the system counts, over that of a tiny run, under the C library's settings that a run has; on
GPUs by torch.cuda.max_memory_allocated."""

EXAMPLES = ("OMP_NUM_THREADS=1 python -m benchmarks.memory --check --out memory.json",)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = common.build_parser(
        "memory", DESCRIPTION, EXAMPLES, check=f"exit status 1 if one is off by more than {GOAL:.0%}%"
    )
    parser.add_argument("--cases", default="all", metavar="C,C", help="a wrong name lists them (default: all)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 1 if ``--check`` and a prediction is too far off."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    check_file("--out", args.out)
    from benchmarks.memory.cases import CASES

    known = {case.name: case for case in CASES}
    names = list(known) if args.cases == "all" else chosen("--cases", args.cases, known)

    import torch

    gpus = torch.cuda.device_count()
    made = common.provenance("memory", arguments, torch.device("cuda" if gpus else "cpu"))
    rows: list[dict[str, Any]] = []
    for name in names:
        case = known[name]
        if gpus and case.processes > gpus:
            print(f"{name}: left out, {case.processes} GPUs are needed", file=sys.stderr, flush=True)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += _measure(case, on_gpu=gpus > 0)
        content = {"schema": 1, "complete": name == names[-1], "provenance": made, "goal": GOAL, "rows": rows}
        common.write_json(args.out, content, tell=False)
    print(_table(rows))
    return int(args.check and any(abs(row["ratio"] - 1) > GOAL for row in rows))


def _measure(case: Any, *, on_gpu: bool) -> list[dict[str, Any]]:
    from pretrain.planning.memory import LIBRARIES, plan_memory, resident_bytes

    config = case.config()
    stage = plan_memory(config, case.processes, on_gpu=on_gpu)[0]
    # On a CPU what is offloaded stays where everything else is.
    allocated = stage.peak + (0 if on_gpu else stage.state.host_optimizer)
    # The worker measures what comes on top of the libraries.
    predictions = {"allocated": allocated, "resident": resident_bytes(config, stage) - LIBRARIES}
    ways = ["allocated", "resident"] if case.resident and not on_gpu else ["allocated"]
    return [
        {
            "case": case.name,
            "rows": f"{case.rows} x {case.length}",
            "precision": case.precision,
            "zero_stage": case.zero_stage,
            "processes": case.processes,
            "measured_by": way,
            "predicted_bytes": predictions[way],
            "measured_bytes": measured,
            "ratio": predictions[way] / measured,
        }
        for way in ways
        for measured in [run_case(case, way)["bytes"]]
    ]


def run_case(case: Any, way: str, steps: int | None = None) -> dict[str, Any]:
    """What the first of the case's processes measured: ``bytes``, and ``processor_seconds`` of its last step.

    way: ``allocated``; ``resident``, of a run as it is; ``kept`` or ``returned``, with this done to freed blocks and
    without huge pages; ``huge``, kept and with them.
    steps: by default as many as :data:`STEPS` says.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": str(case.processes), "LOCAL_SIZE": str(case.processes), "MASTER_PORT": port}
    command = child_command("benchmarks.memory.worker", case.name, way, str(steps or STEPS[way]))
    pages = {} if way in ("allocated", "resident") else {HUGE_PAGES: str(int(way == "huge"))}
    started = []
    for rank in range(case.processes):
        env = {**os.environ, **world, **pages, "MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        ended = [process.communicate() for process in started]
    finally:
        for process in started:  # those still there at Ctrl-C: our own end, with torch loaded, has taken 7 s
            process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError(f"{case.name} failed:\n" + "\n".join(err[-2000:] for _, err in ended))
    return json.loads(ended[0][0].strip().splitlines()[-1])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["case", "rows", "precision", "ZeRO", "processes", "measured by", "predicted, MiB", "measured, MiB", "ratio"]
    lines = [
        [
            row["case"],
            row["rows"],
            row["precision"],
            str(row["zero_stage"]),
            str(row["processes"]),
            row["measured_by"],
            f"{row['predicted_bytes'] / 2**20:.1f}",
            f"{row['measured_bytes'] / 2**20:.1f}",
            f"{row['ratio']:.3f}",
        ]
        for row in rows
    ]
    return markdown(head, lines)


if __name__ == "__main__":
    run(main, "memory")
