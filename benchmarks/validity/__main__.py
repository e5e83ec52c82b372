"""Arguments of ``python -m benchmarks.validity``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import common
from benchmarks.common import check_file, check_positive, markdown, run
from data_pipeline.errors import UserError

if TYPE_CHECKING:
    import argparse

    from eval.subject import Subject
    from eval.tasks.validity import ValiditySettings

DESCRIPTION = """Plant faults in a model, one after the other, and say which checks of the validity gate find each, and
at what length. Then what each group of checks costs on the sound model. A fault that nothing finds, or a check that
fails on the sound model, gives status 1."""
EXAMPLES = ("python -m benchmarks.validity --checkpoint demo/runs/demo-clm --length 640 --out validity-clm.json",)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = common.build_parser("validity", DESCRIPTION, EXAMPLES, check=None)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="a sound model")
    parser.add_argument("--data", metavar="SHARDS", help="held-out shards (default: data.valid of the run)")
    parser.add_argument("--length", type=int, default=640, metavar="N", help="the longest text that is scored, tokens")
    parser.add_argument("--part", default="1/1", metavar="I/K", help="every K-th fault from the I-th on (default: all)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Plant, measure, print, write. Returns 1 for a fault that is not found or a sound model that fails."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    check_positive(args, "length")
    check_file("--out", args.out)
    part = part_of(args.part)

    from eval.subject import load_subject
    from eval.tasks.validity import ValiditySettings, checks

    subject = load_subject(args.checkpoint, args.data, args.device)
    settings = checks.resolve(subject, ValiditySettings(length=args.length))
    costs, wrong = measure_costs(subject, settings)
    faults = plant_all(subject, settings, part)
    print(markdown(("fault", "what it does", "found by"), [_row(fault) for fault in faults]))
    print(f"\nOn the sound model {len(wrong)} checks fail{': ' if wrong else '.'}{'; '.join(wrong)}\n")
    total = sum(cost["processor_seconds"] for cost in costs)
    lines = [(c["checks"], str(c["length"]), c["precision"], f"{c['processor_seconds']:.2f}") for c in costs]
    print(markdown(("checks", "tokens", "precision", "processor seconds"), [*lines, ("all", "", "", f"{total:.2f}")]))
    content = {
        "provenance": common.provenance("validity", arguments, subject.device),
        "model": subject.info().__dict__,
        "faults": faults,
        "costs": costs,
        "sound": wrong,
    }
    common.write_json(args.out, content)
    return 1 if wrong or not all(fault["found"] for fault in faults) else 0


def part_of(text: str) -> slice:
    """``2/3`` as the places of the second of three parts. Raises :class:`UserError` for what is none."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise UserError(f"--part {text}: it must be I/K, with I from 1 to K")
    return slice(int(first) - 1, None, int(count))


def measure_costs(subject: Subject, settings: ValiditySettings) -> tuple[list[dict[str, Any]], list[str]]:
    """Processor seconds of each group of checks on the model as it is, and the names of those that fail."""
    from eval.tasks.validity import checks

    costs, wrong = [], []
    for experiment in checks.experiments(subject, settings):
        started = time.process_time()
        wrong += [check.name for check in experiment.run() if not check.passed]
        costs.append(
            {
                "checks": experiment.compute.__name__,
                "length": experiment.probe.length,
                "precision": experiment.probe.precision,
                "processor_seconds": time.process_time() - started,
            }
        )
    return costs, wrong


def plant_all(subject: Subject, settings: ValiditySettings, part: slice = slice(None)) -> list[dict[str, Any]]:
    """For each fault of the part that this kind of model can have, the checks that fail with it: their names and
    lengths."""
    from benchmarks.validity.plants import PLANTS, planted
    from eval.tasks.validity import checks

    objective = subject.loaded.model_config.objective
    faults = []
    for plant in list(PLANTS)[part]:
        if objective not in plant.objectives or (plant.name.startswith("bf16") and not checks.looks_at_bf16(subject)):
            continue
        print(f"planted: {plant.name}", file=sys.stderr, flush=True)
        found: dict[str, list[int]] = {}
        with planted(subject.model, plant):
            for experiment in checks.experiments(subject, settings):
                for check in experiment.run():
                    # A model that is built anew does not have the fault: it is unlike the planted one in any case.
                    if not check.passed and not check.name.startswith("save and load"):
                        found.setdefault(check.name, []).append(experiment.probe.length)
        faults.append({"fault": plant.name, "what": plant.what, "found": found})
    return faults


def _row(fault: dict[str, Any]) -> tuple[str, str, str]:
    by = [f"{name} ({', '.join(map(str, dict.fromkeys(lengths)))})" for name, lengths in fault["found"].items()]
    return fault["fault"], fault["what"], "; ".join(by) or "**nothing**"


if __name__ == "__main__":
    run(main, "validity")
