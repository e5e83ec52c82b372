"""``nystrom eval compare``: two models on the same items, and whether they differ by more than chance."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.command_line import Parser
from data_pipeline.console import add_json, print_json, say_next
from data_pipeline.errors import UserError
from eval.results.comparable import obstacle, same_unit
from eval.results.records import read_records, results_folder
from eval.results.schema import ModelInfo, Result, finite, read_result
from eval.task import gate

_Records = list[dict[str, Any]]
SAME = 1e-4
"""Relative difference up to which a metric computed from the records is the one that the result gives."""


@dataclass(frozen=True)
class Difference:
    """One metric of ``a`` and ``b`` and ``b`` minus ``a``; interval and ``p`` where there are records to draw from.

    ``n`` of ``unit``: the items that were drawn; without an interval what each of the two figures is over, where that
    is the same. ``better``: "a", "b", or "" where the interval has zero in it, neither is better, or there is no
    interval.
    """

    metric: str
    a: float
    b: float
    difference: float
    higher_is_better: bool | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    n: int | None = None
    unit: str = ""
    std_a: float | None = None
    std_b: float | None = None
    better: str = ""
    note: str = ""

    @property
    def is_same(self) -> bool:
        """Whether both have the very same figure and no interval could tell more: a baseline of the same data, say."""
        return self.low is None and self.a == self.b and self.std_a == self.std_b


@dataclass(frozen=True)
class Comparison:
    """A suite of both; ``metrics`` is empty where ``refused`` says why they cannot be compared.

    ``models``: in what the two models differ, as text.
    """

    suite: str
    metrics: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: str = ""
    models: str = ""


def build_parser() -> argparse.ArgumentParser:
    """The options of ``nystrom eval compare``."""
    parser = Parser(
        prog="nystrom eval compare",
        description="Compare the results of two models, suite by suite: each metric, the difference B - A, its 95% "
        "interval by the paired bootstrap over the items (both models scored the same ones), and the p-value.",
        examples=["nystrom eval compare runs/books-clm runs/exact --out compare.json"],
        epilog="Results on other data, with other settings or behind a forced validity gate are named, not compared.",
        exit_status={1: "nothing could be compared"},
    )
    parser.add_argument("a", type=Path, metavar="A", help="run folder, folder of results, or a result file")
    parser.add_argument("b", type=Path, metavar="B", help="the same, of the other model")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the comparison as JSON too")
    parser.add_argument(
        "--ignore",
        nargs="+",
        action="extend",
        default=[],
        metavar="SETTING",
        help="settings that may differ, such as lr (when models of two sizes are fine-tuned each at its own rate)",
    )
    add_json(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print (and write) the comparison; returns 0, or 1 if nothing could be compared."""
    args = build_parser().parse_args(argv)
    first, second = results_at(args.a), results_at(args.b)
    single = args.a.is_file() and args.b.is_file()
    pairs = [(first[0], second[0])] if single else [(x, y) for x in first for y in second if x.stem == y.stem]
    if not pairs:
        raise UserError(
            f"no suite is in both: {args.a} has {_names(first)}, {args.b} has {_names(second)}; evaluate both alike"
        )
    compared = [compare_files(x, y, args.ignore) for x, y in pairs if single or x.stem != gate().name]
    alone = sorted({path.stem for path in [*first, *second]} - {x.stem for x, _ in pairs}) if not single else []
    content = {
        "a": str(args.a),
        "b": str(args.b),
        "suites": [asdict(comparison) for comparison in compared],
        "only_in_one": alone,
    }
    if args.json:
        print_json(content)
    else:
        _print(args.a, args.b, compared, alone)
    if args.out:
        _write(args.out, content)
        print(f"written to {args.out}", file=sys.stderr if args.json else sys.stdout)
    found = any(comparison.metrics for comparison in compared)
    if found and not args.json and all((folder / "config.yaml").is_file() for folder in (args.a, args.b)):
        say_next(["report", args.a, args.b])
    return 0 if found else 1


def results_at(path: Path) -> list[Path]:
    """The result files of a run (its ``eval``), of one of its checkpoints or exports, or of a folder; or the file."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist: name a run folder, a folder of results, or a result file")
    place = path.resolve()
    run = place.parent.parent if place.parent.name == "checkpoints" else place.parent
    folder = next((f for f in (path / "eval", results_folder(path, run)) if f.is_dir()), path)
    found = sorted(p for p in folder.glob("*.json") if not p.name.startswith("."))
    if not found:
        raise UserError(f"{folder} holds no results: run `nystrom eval` first")
    return found


def compare_files(a: Path, b: Path, ignore: Collection[str] = ()) -> Comparison:
    """Compare two result files; what cannot be compared says why in ``refused``."""
    name = a.stem if a.stem == b.stem else f"{a.stem} / {b.stem}"
    try:
        first, second = read_result(a), read_result(b)
    except UserError as error:
        return Comparison(name, refused=str(error))
    models = unlike(first.model, second.model)
    why = obstacle(first, second, ignore)
    if why:
        return Comparison(name, refused=why, models=models)
    notes = []
    if first.model.weights_hash == second.model.weights_hash:
        same = first.model.config_hash == second.model.config_hash
        notes.append("both are of the same weights" + ("" if same else ", under other model configurations"))
    try:
        records: tuple[_Records, _Records] = (read_records(a), read_records(b))
    except UserError as error:
        notes.append(f"no intervals: {error}")
        records = ([], [])
    missing = [metric for metric in first.metrics if metric not in second.metrics]
    missing += [metric for metric in second.metrics if metric not in first.metrics]
    if missing:
        notes.append(f"only one of the two has: {', '.join(missing)}")
    metrics = [_difference(m, first, second, records) for m in first.metrics if m in second.metrics]
    return Comparison(name, metrics, notes, models=models)


def unlike(a: ModelInfo, b: ModelInfo) -> str:
    """In what two models differ that a difference of their figures may come from, as text; "" in nothing known.

    Weights always differ and are not named. Networks that a suite trains itself have nothing to name.
    """
    if not (a.weights_hash and b.weights_hash):
        return ""
    facts = {
        "tokens seen": (f"{a.tokens:,}", f"{b.tokens:,}"),
        "attention": (a.attention, b.attention),
        "objective": (a.objective, b.objective),
        "parameters": (f"{a.parameters:,}", f"{b.parameters:,}"),
    }
    return "; ".join(f"{name} {first} and {second}" for name, (first, second) in facts.items() if first != second)


def _difference(name: str, a: Result, b: Result, records: tuple[_Records, _Records]) -> Difference:
    x, y = a.metrics[name], b.metrics[name]
    alike = x.n == y.n and (x.std is None) == (y.std is None)
    plain = Difference(
        name,
        x.value,
        y.value,
        y.value - x.value,
        x.higher_is_better,
        n=x.n if alike else None,
        unit=x.over.partition(" ")[2] if alike else "",
        std_a=x.std,
        std_b=y.std,
    )
    if not same_unit(name, [a, b]):
        return Difference(**{**asdict(plain), "note": "by token, and their tokenizers differ: compare by byte or word"})
    estimator = a.estimators.get(name)
    if estimator is None or estimator != b.estimators.get(name) or not all(map(estimator.counted, records)):
        return plain
    from eval.results.statistics import estimate, paired_bootstrap

    try:
        values = [estimate(side, estimator) for side in records]
        interval = paired_bootstrap(*records, estimator)
    except UserError as error:
        return Difference(**{**asdict(plain), "note": str(error)})
    notes = [
        f"the records of {side} give {value:.6g}, its result says {metric.value:.6g}"
        for side, value, metric in zip("AB", values, (x, y), strict=True)
        if not math.isclose(value, metric.value, rel_tol=SAME, abs_tol=1e-9)
    ]
    sizes = [len({record.get("id", i) for i, record in enumerate(estimator.counted(side))}) for side in records]
    if max(sizes) > interval.n:
        notes.append(f"interval over the {interval.n} items both have, of {sizes[0]} and {sizes[1]}")
    better = ""
    if x.higher_is_better is not None and (interval.low > 0 or interval.high < 0):
        better = "b" if (interval.low > 0) == x.higher_is_better else "a"
    known = math.isfinite(interval.low) and math.isfinite(interval.high)
    return Difference(
        **{
            **asdict(plain),
            "low": interval.low if known else None,
            "high": interval.high if known else None,
            "p": interval.p if known else None,
            "n": interval.n,
            "unit": "item" if interval.n == 1 else "items",
            "better": better,
            "note": "; ".join(notes),
        }
    )


def _print(a: Path, b: Path, compared: list[Comparison], alone: list[str]) -> None:
    from eval.console import aligned

    print(f"A  {a}\nB  {b}")
    models = list(dict.fromkeys(comparison.models for comparison in compared))
    for found in models:
        suites = ", ".join(comparison.suite for comparison in compared if comparison.models == found)
        if found:
            where = "" if len(models) == 1 else f" ({suites})"
            print(f"The models differ in more than their weights{where}: {found}")
    print()
    rows = []
    for comparison in compared:
        for number, d in enumerate(d for d in comparison.metrics if not d.is_same):
            rows.append(
                (
                    comparison.suite if number == 0 else "",
                    d.metric.replace("_", " "),
                    _number(d.a) + (f" ± {d.std_a:.4f}" if d.std_a is not None else ""),
                    _number(d.b) + (f" ± {d.std_b:.4f}" if d.std_b is not None else ""),
                    f"{d.difference:+.4g}",
                    "" if d.low is None or d.high is None else f"[{d.low:+.4g}, {d.high:+.4g}]",
                    "" if d.p is None else f"{d.p:.4f}",
                    "" if d.n is None else f"{d.n:,} {d.unit}".rstrip(),
                    f"{d.better.upper()} is better" if d.better else "",
                )
            )
    if rows:
        print(aligned([("suite", "metric", "A", "B", "B - A", "95% interval", "p", "over", ""), *rows]))
        if any(d.p is not None for comparison in compared for d in comparison.metrics):
            print("\np-values are of each metric alone: among twenty of them, one below 0.05 is chance.")
    for comparison in compared:
        for note in dict.fromkeys(
            [*comparison.notes, *(f"{d.metric}: {d.note}" for d in comparison.metrics if d.note)]
        ):
            print(f"{comparison.suite}: {note}")
        same = [f"{d.metric.replace('_', ' ')} {_number(d.a)}" for d in comparison.metrics if d.is_same]
        if same:
            print(f"{comparison.suite}: the same in both: {', '.join(same)}")
        if comparison.refused:
            print(f"{comparison.suite}: not compared: {comparison.refused}")
    if alone:
        print(f"in one of the two only: {', '.join(alone)}")


def _write(out: Path, content: dict[str, Any]) -> None:
    from data_pipeline.files import write_atomic

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, (json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from None


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.stem for path in paths)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.5g}"
