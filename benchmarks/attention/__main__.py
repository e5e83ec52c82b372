"""Arguments of ``python -m benchmarks.attention``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks import common
from benchmarks.common import check_file, check_positive, chosen, listed, run
from data_pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

    from pretrain.model.config import ModelConfig

DTYPES = ("float32", "bfloat16", "float16")

OF_THE_MODEL = (
    "landmarks", "segment_length", "window_segments", "conv_kernel", "landmark_band", "landmark_branching"
)  # fmt: skip

DESCRIPTION = """Forward and backward of one attention (q, k, v to output), ours and the published ones, as ratios to
PyTorch's scaled_dot_product_attention, timed in turns in one process; and the memory kept for the backward pass."""

EPILOG = """What to read off the table:
  time / exact        median of the rounds' ratios, and quartiles: the gain
  arithmetic / exact  that ratio, were both equally fast: the bound
  of peak             arithmetic a second (backward = 2 x forward) over
                      that of one large matrix product"""
EXAMPLES = (
    "OMP_NUM_THREADS=1 python -m benchmarks.attention --lengths 1024,4096 --seconds 20 --profile --out attention.json",
)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = common.build_parser(
        "attention", DESCRIPTION, EXAMPLES, epilog=EPILOG, out="all numbers as JSON, written after each length"
    )
    parser.add_argument("--lengths", default="1024,4096,8192,16384", metavar="N,N", help="tokens of a row")
    parser.add_argument("--dtypes", default="float32,bfloat16", metavar="T,T", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--forms", default="all", metavar="F,F", help="what competes; a wrong name lists them")
    parser.add_argument(
        "--without-exact",
        action="store_true",
        help="only the forms that are named, for lengths where exact takes hours",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of a CPU's matrix products")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows")
    parser.add_argument("--heads", type=int, default=12, metavar="N")
    parser.add_argument("--head-dim", type=int, default=64, metavar="N", help="width of a head")
    parser.add_argument(
        "--seconds", type=float, default=30.0, metavar="X", help="time for each length, at least 3 rounds"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="so many rounds, however long (default: by --seconds)")
    parser.add_argument(
        "--max-gib", type=float, metavar="X", help="skip a form that may need more (default: half of what is free)"
    )
    parser.add_argument("--profile", action="store_true", help="also time the stages of our forms by themselves")
    model = parser.add_argument_group("model", "each with the default of ModelConfig")
    model.add_argument("--landmarks", type=int, metavar="N", help="m of the bidirectional form")
    model.add_argument("--segment-length", type=int, metavar="N", help="c of the causal form")
    model.add_argument("--window-segments", type=int, metavar="N", help="w of the causal form")
    model.add_argument("--conv-kernel", type=int, metavar="N", help="taps of the convolution")
    model.add_argument("--landmark-band", type=int, metavar="N", help="b of the pyramid")
    model.add_argument("--landmark-branching", type=int, metavar="N", help="r of the pyramid")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 1 if ``--check`` and a goal is not met."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    lengths = [_positive("--lengths", text) for text in listed("--lengths", args.lengths)]
    dtypes = chosen("--dtypes", args.dtypes, DTYPES)
    check_positive(args, "threads", "batch", "heads", "head_dim", "repeats", "landmarks", "conv_kernel")
    check_positive(args, "landmark_band", "landmark_branching")
    check_positive(args, "seconds", "max_gib")
    check_file("--out", args.out)
    return _measure(args, arguments, lengths, dtypes)


def _positive(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{option}: '{text}' is not a whole number above 0")
    return int(text)


def _measure(args: argparse.Namespace, arguments: list[str], lengths: list[int], dtypes: list[str]) -> int:
    import torch

    from benchmarks.attention import report
    from benchmarks.attention.measure import matmul_peak
    from benchmarks.attention.run import FORMS, Effort, measure, with_references
    from benchmarks.attention.setting import Setting

    names = list(FORMS) if args.forms == "all" else chosen("--forms", args.forms, FORMS)
    forms = [FORMS[name] for name in names] if args.without_exact else with_references(names)
    masked, causal = _models(args)
    device = _device(args.device)
    why_not = _no_goals(args)
    checked = [] if why_not else report.judge([], dtypes)
    if args.check and not any(v.form in names and v.length in lengths for v in checked):
        raise UserError(f"--check: {why_not or 'no goal is for one of these forms, lengths and precisions'}")
    torch.set_num_threads(args.threads)

    provenance = common.provenance("attention", arguments, device)
    effort = Effort(args.repeats, args.seconds, args.max_gib, args.profile)
    rows: list[report.Row] = []
    stages: list[report.Stage] = []
    peaks: dict[str, float] = {}

    def write(complete: bool) -> list[Any]:
        verdicts = [] if why_not else report.judge(rows, dtypes)
        if args.out is not None:
            report.write_json(
                args.out,
                provenance=provenance,
                settings={
                    "batch": args.batch,
                    "heads": args.heads,
                    "head_dim": args.head_dim,
                    "device": args.device,
                    "seconds": args.seconds,
                    "repeats": args.repeats,
                    "max_gib": args.max_gib,
                    "masked_model": masked.model_dump(mode="json"),
                    "causal_model": causal.model_dump(mode="json"),
                },
                peaks=peaks,
                rows=rows,
                stages=stages,
                goals=[{**asdict(verdict), "met": verdict.met} for verdict in verdicts],
                growth=[asdict(found) for found in report.growth(rows)],
                complete=complete,
            )
        return verdicts

    for dtype in dtypes:
        peaks[dtype] = matmul_peak(getattr(torch, dtype), device)
        for length in lengths:
            print(f"{dtype}, {length} tokens ...", file=sys.stderr, flush=True)
            setting = Setting(
                args.batch, args.heads, args.head_dim, length, getattr(torch, dtype), device, masked, causal
            )
            more_rows, more_stages = measure(forms, setting, effort, peaks[dtype])
            rows += more_rows
            stages += more_stages
            write(complete=False)
    verdicts = write(complete=True)
    _print(provenance, args, peaks, rows, stages)
    print(f"\nNo goals: {why_not}" if why_not else "\nGoals:")
    for verdict in verdicts:
        print(f"- {verdict}")
    if args.out is not None:
        print(f"\nnumbers in {args.out}")
    return 1 if args.check and any(verdict.met is False for verdict in verdicts) else 0


def _print(
    provenance: dict[str, Any], args: argparse.Namespace, peaks: dict[str, float], rows: list[Any], stages: list[Any]
) -> None:
    from benchmarks.attention import report

    where = provenance["gpu"] or f"{provenance['cpu']}, {provenance['threads']} thread(s)"
    speeds = ", ".join(f"{dtype} {peak / 1e12:.3g}" for dtype, peak in peaks.items())
    print(
        f"{args.batch} x {args.heads} heads of {args.head_dim}, forward and backward, torch {provenance['torch']}, "
        f"{where}, {provenance['date']}.\nOne large matrix product, TFLOP/s: {speeds}.\n"
    )
    print(report.table(rows))
    if growth := report.growth(rows):
        print("\n" + report.growth_table(growth))
    if stages:
        print("\n" + report.stage_table(stages))


def _models(args: argparse.Namespace) -> tuple[ModelConfig, ModelConfig]:
    from pydantic import ValidationError

    from benchmarks.attention.setting import models
    from data_pipeline.configuration import faults

    try:
        return models(
            args.heads,
            args.head_dim,
            landmarks=args.landmarks,
            segment_length=args.segment_length,
            window_segments=args.window_segments,
            conv_kernel=args.conv_kernel,
            landmark_band=args.landmark_band,
            landmark_branching=args.landmark_branching,
        )
    except ValidationError as error:
        raise UserError(faults(error, None)[0]) from None


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: can be timed on cpu and cuda only")
    return device


def _no_goals(args: argparse.Namespace) -> str | None:
    """Why the goals do not apply to this setting; None if they do."""
    from benchmarks.attention.report import GOAL_SETTING

    for name, value in GOAL_SETTING.items():
        if getattr(args, name) != value:
            return f"they are for --{name.replace('_', '-')} {value}"
    for name in OF_THE_MODEL:
        if getattr(args, name) is not None:
            return f"they are for the default --{name.replace('_', '-')}"
    return None


if __name__ == "__main__":
    run(main, "attention")
