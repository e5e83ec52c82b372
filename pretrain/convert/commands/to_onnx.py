"""``nystrom convert to-onnx``: a masked model as an ONNX file, compared with the model by onnxruntime."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.console import add_json, print_json, say_loading
from data_pipeline.errors import UserError
from data_pipeline.units import format_bytes
from pretrain.convert.command import COMMANDS, Command


@COMMANDS.register
class ToOnnx(Command):
    """A checkpoint of a masked model to a folder for onnxruntime."""

    name = "to-onnx"
    summary = "a masked model as an ONNX file, for onnxruntime"
    description = (
        "Write OUT/model.onnx, for any batch size and length, with the tokenizer and a README that shows its use. The "
        "file is run by onnxruntime before OUT gets its name. Its outputs are compared with the model's, for several "
        "batch sizes, lengths and paddings: if they differ, the command fails and leaves nothing behind."
    )
    examples = (
        "nystrom convert to-onnx runs/books onnx/books",
        "nystrom convert to-onnx runs/books onnx/books-half --dtype fp16 --no-head",
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("checkpoint", type=Path, help="a run folder, one of its checkpoints, or an export folder")
        parser.add_argument("out", type=Path, help="folder to write; it must not be there yet, or be empty")
        parser.add_argument(
            "--dtype", choices=["fp32", "fp16"], default="fp32", help="what weights are stored in (default: fp32)"
        )
        parser.add_argument(
            "--no-head", action="store_true", help="leave the head out: the only output is last_hidden_state"
        )
        parser.add_argument(
            "--tolerance",
            type=float,
            metavar="SHARE",
            help="largest difference allowed, as a share of the largest value (default: 1e-4 for fp32, 1e-2 for fp16)",
        )
        add_json(parser)

    def run(self, args: argparse.Namespace) -> int:
        say_loading()
        from pretrain.convert.onnx.folder import check_free, check_packages, write_folder

        if args.tolerance is not None and not args.tolerance > 0:
            raise UserError(f"--tolerance {args.tolerance} is not a positive number")
        check_packages()
        check_free(args.out)
        from pretrain.checkpoint.load import load_model

        result = write_folder(
            load_model(args.checkpoint), args.out, dtype=args.dtype, head=not args.no_head, tolerance=args.tolerance
        )
        written = result.written
        if args.json:
            print_json(
                {
                    "folder": args.out,
                    "file": args.out / "model.onnx",
                    "bytes": written.size,
                    "dtype": args.dtype,
                    "opset": written.opset,
                    "ir_version": written.ir_version,
                    "largest_differences": {name: found.share for name, found in result.differences.items()},
                }
            )
            return 0
        print(
            f"{args.out}: model.onnx of {format_bytes(written.size)} (opset {written.opset}, IR version "
            f"{written.ir_version}, {args.dtype}), written in {result.seconds:.0f} s"
        )
        for name, found in result.differences.items():
            print(
                f"largest difference between onnxruntime and the model, {name}: {found.share:.1e} of the largest "
                f"value ({found.absolute:.1e} absolute)"
            )
        return 0
