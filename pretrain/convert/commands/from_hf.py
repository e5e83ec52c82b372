"""``nystrom convert from-hf``: another library's checkpoint as an export folder of ours."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.console import add_json, print_json, say_loading, say_next
from pretrain.convert.command import COMMANDS, Command
from pretrain.convert.source import SOURCES, find_source


@COMMANDS.register
class FromHF(Command):
    """Reads what :data:`~pretrain.convert.source.SOURCES` knows."""

    name = "from-hf"
    summary = "a checkpoint of transformers or of mlpen/Nystromformer as an export folder"
    description = (
        "Read a checkpoint of another library from this machine and write an export folder, which `nystrom eval`, "
        "`nystrom fill` and `init_from` of a run take. Every tensor is accounted for; nothing in the source is run."
    )

    examples = (
        "nystrom convert from-hf nystromformer-512 converted",
        "nystrom convert from-hf nystrom-512/model/cp-0099.model converted --tokenizer roberta-base",
    )

    @property
    def epilog(self) -> str:  # type: ignore[override]
        """The kinds of sources."""
        return f"SOURCE is one of: {'; '.join(kind.description for kind in SOURCES.all().values())}."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """SOURCE, OUT and the tokenizer."""
        parser.add_argument("source", type=Path, metavar="SOURCE", help="folder or file of the checkpoint")
        parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not be there yet")
        parser.add_argument(
            "--tokenizer",
            type=Path,
            metavar="FOLDER",
            help="the tokenizer of the weights, where SOURCE has none (default: SOURCE's own)",
        )
        add_json(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Convert, and say what became of each tensor."""
        say_loading()
        from pretrain.checkpoint.account import in_words
        from pretrain.convert.converted import check_out, read_tokenizer, write_folder
        from pretrain.next_commands import with_text

        source = find_source(args.source)
        check_out(args.out)
        converted = source.read(args.source)
        tokenizer = read_tokenizer(converted, args.source, args.tokenizer)
        digest = write_folder(converted, tokenizer, args.source, source.name, args.out)
        model = converted.model
        if args.json:
            print_json(
                {
                    "folder": args.out,
                    "source": args.source,
                    "kind": source.name,
                    "objective": model.objective,
                    "attention": model.attention,
                    "length": converted.length,
                    "weights_hash": digest,
                    "tensors": in_words(converted.entries),
                    "notes": list(converted.notes),
                }
            )
            return 0
        print(
            f"{args.out}: {model.objective} of {model.num_layers} layers of {model.hidden_size}, attention "
            f"{model.attention_label}, up to {converted.length:,} tokens, from {args.source} ({source.name}); "
            f"weights {digest[:12]}"
        )
        for line in [*in_words(converted.entries), *(f"note: {note}" for note in converted.notes)]:
            print(f"  {line}")
        say_next(with_text(args.out, model.objective))
        return 0
