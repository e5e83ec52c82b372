"""A suite of five parts, as a program: `FOLDER LOG HANG`; part HANG (-1: none) never ends. LOG gets a line a part."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

from data_pipeline.errors import run_cli
from eval.results.parts import Parts
from eval.results.schema import Metric, ModelInfo, Outcome
from eval.results.store import obtain
from eval.team import join

PARTS = 5


def main(argv: Any = None) -> None:
    folder, log, hang = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

    def part(number: int) -> dict[str, Any]:
        with log.open("a") as file:
            file.write(f"{number}\n")
        if number == hang:
            time.sleep(600)
        return {"third": number / 3, "pair": (number, "ü")}

    def compute(parts: Parts) -> Outcome:
        values = parts.map([(f"part {n}", lambda n=n: part(n)) for n in range(PARTS)])
        records = [{"id": str(value["pair"][0]), **value} for value in values]
        return Outcome({"sum": Metric(sum(value["third"] for value in values), True)}, records=records)

    with join() as team, team.alike():
        obtain(
            folder, "parts", task="parts", version=1, model=ModelInfo(), settings={}, data={"hash": ""}, gate="none",
            compute=compute, team=team,
        )  # fmt: skip


if __name__ == "__main__":
    # A shell that starts its tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise SystemExit(run_cli(main, "parts"))
