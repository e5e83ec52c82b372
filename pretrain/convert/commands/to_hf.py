"""``nystrom convert to-hf``: a checkpoint as a folder that transformers loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.console import add_json, print_json, say_loading, say_next
from data_pipeline.errors import UserError
from pretrain.convert.command import COMMANDS, Command
from pretrain.convert.folder import DTYPES, SHARD_SIZE, write_folder
from pretrain.convert.names import UNKNOWN

if TYPE_CHECKING:
    from pretrain.checkpoint.load import LoadedModel


@COMMANDS.register
class ToHf(Command):
    """Weights, configuration, tokenizer, model card and the code that computes them."""

    name = "to-hf"
    summary = "a checkpoint as a folder for transformers"
    description = (
        "Write a run, a checkpoint or an export as a folder that transformers loads with trust_remote_code=True. "
        "The folder carries the model's own code, which needs torch and transformers alone, and a model card. "
        "--stock writes one for transformers' own Nyströmformer instead, where that computes the same."
    )
    examples = (
        "nystrom convert to-hf runs/demo-clm hf/demo-clm --dtype bf16",
        "nystrom convert to-hf runs/published hf/published --stock --length 512",
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("checkpoint", help="folder of a run, a checkpoint in it, or an export")
        parser.add_argument("out", type=Path, help="the folder to write")
        parser.add_argument(
            "--dtype", choices=DTYPES, default="fp32", help="number format of the weights (default: fp32)"
        )
        parser.add_argument(
            "--stock", action="store_true", help="for transformers' own Nyströmformer, without code; see the docs"
        )
        parser.add_argument(
            "--length",
            type=int,
            metavar="TOKENS",
            help="with --stock: tokens of every text that it will be used for (default: the longest in training)",
        )
        parser.add_argument(
            "--max-shard-size",
            metavar="SIZE",
            default=SHARD_SIZE,
            help="more weights than that are divided among several files (default: %(default)s)",
        )
        parser.add_argument(
            "--license", metavar="NAME", default=UNKNOWN, help="of the weights, for the card (default: unknown)"
        )
        parser.add_argument("--language", metavar="CODES", help="of the training text, for the card: en or en,de")
        parser.add_argument("--overwrite", action="store_true", help="replace OUT, if it is such a folder")
        add_json(parser)

    def run(self, args: argparse.Namespace) -> int:
        if args.length is not None and not args.stock:
            raise UserError("--length is for --stock: the folder with code takes texts of any length")
        if args.length is not None and args.length < 1:
            raise UserError(f"--length {args.length} must be at least 1 token")
        say_loading()
        from pretrain.checkpoint.load import load_model

        loaded = load_model(args.checkpoint)
        found: list[float | None] = []
        write_folder(args.out, lambda folder: found.append(_fill(folder, loaded, args)), overwrite=args.overwrite)
        size = sum(path.stat().st_size for path in args.out.iterdir())
        auto = "AutoModelForCausalLM" if loaded.model_config.objective == "clm" else "AutoModelForMaskedLM"
        if args.json:
            print_json(
                {
                    "folder": args.out,
                    "dtype": args.dtype,
                    "stock": args.stock,
                    "bytes": size,
                    "weights_hash": loaded.weights_hash,
                    "class": auto,
                    "largest_difference": found[0],
                }
            )
            return 0
        kind = "for transformers' own Nyströmformer" if args.stock else "and their code"
        print(f"{args.out}: {args.dtype} weights {kind}, {size / 2**20:,.1f} MiB")
        if found[0] is None:
            print("not compared: transformers is not installed here")
        else:
            print(f"loaded in transformers: largest difference of a logit {found[0]:.2g}")
        trust = "" if args.stock else ", trust_remote_code=True"
        print(f'in Python:\n  {auto}.from_pretrained("{args.out}"{trust})')
        say_next(_pushing(args.out))
        return 0


def _pushing(folder: Path) -> list[str]:
    """What `nystrom push` would do with the folder; empty where it would refuse it."""
    from pretrain.convert.hub_folder import open_folder

    try:
        passed = open_folder(folder).passed
    except UserError:
        return []
    return [] if passed is False else ["push", str(folder), f"OWNER/{folder.resolve().name}", "--dry-run"]


def _fill(folder: Path, loaded: LoadedModel, args: argparse.Namespace) -> float | None:
    """Write the files; returns the largest difference of a logit in transformers."""
    from pretrain.convert.card import write_card
    from pretrain.convert.check import largest_difference, some_lengths
    from pretrain.convert.own import write_own
    from pretrain.convert.stock import write_stock
    from pretrain.initialize import source_length

    length = args.length or source_length(loaded)
    if args.stock:
        write_stock(loaded, folder, length, args.dtype, args.max_shard_size)
    else:
        write_own(loaded, folder, dtype=args.dtype, max_shard_size=args.max_shard_size)
    write_card(
        loaded,
        folder,
        folder_kind="stock" if args.stock else "custom",
        dtype=DTYPES[args.dtype],
        licence=args.license,
        language=args.language,
        stock_length=length if args.stock else None,
    )
    if args.stock:  # which cannot compute in 16 bits, nor with padding
        return largest_difference(folder, loaded, args.dtype, [length] * 2, computed_in="fp32")
    return largest_difference(folder, loaded, args.dtype, some_lengths(loaded, length))
