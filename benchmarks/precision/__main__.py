"""Arguments of ``python -m benchmarks.precision`` and its three tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.common import check_file, check_positive, chosen, listed, markdown, run, settings_of
from data_pipeline.errors import UserError

PARTS = ("rounding", "segments", "norm")
DESCRIPTION = """Relative errors, on a CPU. rounding: each form of attention in 16 bits against float64 on the same
inputs, output and gradients, for logits with a standard deviation of 1 and of 20. segments: the masked form against
exact attention on AR(1) inputs, by how the text is cut. norm: a gradient norm in float32 against float64."""
EXAMPLES = ("python -m benchmarks.precision --threads 1 --out precision.json",)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = common.build_parser("precision", DESCRIPTION, EXAMPLES, check=None)
    parser.add_argument("--parts", default=",".join(PARTS), metavar="P,P", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of PyTorch: they split its sums")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="the 16 bits of rounding")
    parser.add_argument("--length", type=int, default=1024, metavar="N", help="tokens, of rounding")
    parser.add_argument("--lengths", default="65,96,128,129,160,192,193", metavar="N,N", help="tokens, of segments")
    parser.add_argument("--values", default="3145728,24576000", metavar="N,N", help="sizes of a gradient, of norm")
    parser.add_argument("--width", type=int, default=64, metavar="N", help="of a head")
    parser.add_argument("--landmarks", type=int, default=64, metavar="N", help="m of the masked form")
    parser.add_argument("--segment-length", type=int, default=64, metavar="N", help="c of the causal form")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    parts = chosen("--parts", args.parts, PARTS)
    check_positive(args, "threads", "length", "width", "landmarks", "segment_length")
    check_file("--out", args.out)
    lengths, values = _numbers("--lengths", args.lengths), _numbers("--values", args.values)
    _check(args, lengths)

    import torch

    torch.set_num_threads(args.threads)
    content: dict[str, Any] = {
        "schema": 1,
        "provenance": common.provenance("precision", arguments, torch.device("cpu")),
        "settings": settings_of(args),
    }
    for part in parts:
        content[part], table = {"rounding": _rounding, "segments": _segments, "norm": _norm}[part](
            args, lengths, values
        )
        print(f"{table}\n", flush=True)
    common.write_json(args.out, content)
    return 0


def _numbers(option: str, text: str) -> list[int]:
    found = listed(option, text)
    if not all(word.isdecimal() and int(word) for word in found):
        raise UserError(f"{option} '{text}': whole numbers above 0, with commas between them")
    return [int(word) for word in found]


def _check(args: argparse.Namespace, lengths: Sequence[int]) -> None:
    if args.length % args.segment_length or args.length <= 2 * args.segment_length:
        raise UserError(f"--length {args.length}: must be a multiple of --segment-length, and more than two of them")
    if min(lengths) < args.landmarks:
        raise UserError(f"--lengths: {min(lengths)} tokens are fewer than the {args.landmarks} of --landmarks")


def _rounding(args: argparse.Namespace, lengths: Sequence[int], values: Sequence[int]) -> tuple[list[Any], str]:
    import torch

    from benchmarks.precision.rounding import TITLES, errors
    from pretrain.model.attention.blockwise import Window

    rows = errors(
        list(TITLES),
        args.length,
        width=args.width,
        heads=2,
        landmarks=args.landmarks,
        window=Window(args.segment_length, 2),
        dtype=getattr(torch, args.dtype),
    )
    what = ("out", "dq", "dk", "dv")
    lines = [
        [title, *(" / ".join(f"{row[key]:.1e}" for row in rows if row["form"] == name) for key in what)]
        for name, title in TITLES.items()
    ]
    return rows, markdown([args.dtype, "output", "gradient of q", "of k", "of v"], lines)


def _segments(args: argparse.Namespace, lengths: Sequence[int], values: Sequence[int]) -> tuple[list[Any], str]:
    from benchmarks.precision.segments import WAYS, errors

    rows = errors(lengths, landmarks=args.landmarks, heads=8, width=args.width)
    lines = [
        [way, *(f"{row['inverse']:.3f} / {row['pooled']:.3f}" for row in rows if row["segments"] == way)]
        for way in WAYS
    ]
    return rows, markdown(["segments", *(f"n = {length}" for length in lengths)], lines)


def _norm(args: argparse.Namespace, lengths: Sequence[int], values: Sequence[int]) -> tuple[list[Any], str]:
    from benchmarks.precision.norm import errors

    rows = errors(values)
    return rows, markdown(["values", "float32 norm"], [[f"{row['values']:,}", f"{row['error']:+.1e}"] for row in rows])


if __name__ == "__main__":
    run(main, "precision")
