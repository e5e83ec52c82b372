"""``nystrom convert to-hf``: a checkpoint as a folder that transformers loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.convert.command import COMMANDS, Command
from pretrain.convert.folder import DTYPES, SHARD_SIZE, write_folder


@COMMANDS.register
class ToHf(Command):
    """Weights, configuration, tokenizer and the code that computes them."""

    name = "to-hf"
    summary = "a checkpoint as a folder for transformers"
    description = (
        "Write a run, a checkpoint or an export as a folder that transformers loads with trust_remote_code=True. "
        "The folder carries the model's own code, which needs torch and transformers alone."
    )
    epilog = "example: nystrom convert to-hf runs/demo-clm hf/demo-clm --dtype bf16"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("checkpoint", help="folder of a run, a checkpoint in it, or an export")
        parser.add_argument("out", type=Path, help="the folder to write")
        parser.add_argument(
            "--dtype", choices=DTYPES, default="fp32", help="number format of the weights (default: fp32)"
        )
        parser.add_argument(
            "--max-shard-size",
            metavar="SIZE",
            default=SHARD_SIZE,
            help="more weights than that are divided among several files (default: %(default)s)",
        )
        parser.add_argument("--overwrite", action="store_true", help="replace OUT, if it is such a folder")

    def run(self, args: argparse.Namespace) -> int:
        from pretrain.checkpoint.load import load_model
        from pretrain.convert.check import largest_difference, some_lengths
        from pretrain.convert.own import write_own
        from pretrain.initialize import source_length

        loaded = load_model(args.checkpoint)
        differences = []

        def fill(folder: Path) -> None:
            write_own(loaded, folder, dtype=args.dtype, max_shard_size=args.max_shard_size)
            lengths = some_lengths(loaded, source_length(loaded))
            differences.append(largest_difference(folder, loaded, args.dtype, lengths))

        write_folder(args.out, fill, overwrite=args.overwrite)
        size = sum(path.stat().st_size for path in args.out.iterdir())
        kind = "AutoModelForCausalLM" if loaded.model_config.objective == "clm" else "AutoModelForMaskedLM"
        print(f"{args.out}: {args.dtype} weights and their code, {size / 2**20:,.1f} MiB")
        if differences[0] is None:
            print("not compared: transformers is not installed here")
        else:
            print(f"loaded in transformers: largest difference of a logit {differences[0]:.2g}")
        print("in Python:")
        print(f'  {kind}.from_pretrained("{args.out}", trust_remote_code=True)')
        return 0
