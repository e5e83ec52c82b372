"""``nystrom config``: the keys of a run's YAML, and what a file comes to."""

from __future__ import annotations

import argparse
import copy
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from data_pipeline.command_line import Parser
from data_pipeline.configuration import ITEM, blocks_in
from data_pipeline.console import print_json
from data_pipeline.errors import UserError
from pretrain.arguments import add_config_arguments
from pretrain.config.load import apply_override, find_config, load_config, parse_config, read_yaml
from pretrain.config.reference import (
    all_keys,
    as_markdown,
    as_text,
    find,
    left_out,
    pattern_of,
    value_text,
)

WIDEST = 110
KEY_FACTS = ("name", "block", "type", "default", "meaning")
FILE, SET, DEFAULT = "file", "--set", "default"

EXAMPLES = (
    ("nystrom config", "every key: type, default, meaning"),
    ("nystrom config optimizer", "those of one block"),
    ("nystrom config curriculum.N.seq_len", "one key; N is the number of an item of a list"),
    ("nystrom config --config configs/books-clm.yaml", "the values of a file, and which of them are defaults"),
    ("nystrom config --config books-clm", "the same of a preset, wherever you are"),
    ("nystrom config optimizer --config configs/books-clm.yaml --set optimizer.lr=1e-3", "a block, with a change"),
    ("nystrom config --schema > nystrom.schema.json", "for editors: completes keys and marks mistakes in them"),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = Parser(
        prog="nystrom config",
        description="Every key of a run's YAML with type, default and meaning. With --config, the value of every key "
        "of that file and where it comes from.",
        examples=EXAMPLES,
        exit_status={2: "an unknown key, or a mistake in the file"},
    )
    parser.add_argument("key", nargs="?", help="only this key or block, dotted: optimizer, optimizer.lr")
    add_config_arguments(parser, required=False, what="print what its keys come to")
    parser.add_argument(
        "--format",
        choices=["text", "markdown", "json"],
        default="text",
        help="markdown: the page docs/configuration.md; json: the keys, or with --config the whole configuration with "
        "its defaults (default: text)",
    )
    parser.add_argument("--json", action="store_const", dest="format", const="json", help="the same as --format json")
    parser.add_argument(
        "--schema",
        action="store_true",
        help="the JSON schema of the file; an editor finds it by a first line "
        "`# yaml-language-server: $schema=nystrom.schema.json`",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(argv)
    if args.overrides and args.config is None:
        raise UserError("--set changes keys of a file: give --config too")
    if args.format == "markdown" and (args.config is not None or args.key is not None):
        raise UserError("--format markdown makes the whole reference: leave out the key and --config")
    if args.schema and (args.config is not None or args.key is not None or args.format != "text"):
        raise UserError("--schema makes the schema of the whole file: leave out the key, --config and --format")
    if args.schema:
        from pretrain.config.schema import schema_text

        print(schema_text(), end="")
        return 0
    keys = all_keys()
    if args.format == "markdown":
        print(as_markdown(keys), end="")
        return 0
    chosen = keys if args.key is None else find(args.key, keys)
    if args.config is None and args.format == "json":
        print_json({"keys": [{name: getattr(key, name) for name in KEY_FACTS} for key in chosen]})
        return 0
    if args.config is None:
        print(as_text(chosen, min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)))
        return 0
    values = values_of(args.config, args.overrides)
    if args.key is not None:
        names = {key.name for key in chosen}
        values = [value for value in values if pattern_of(value.name) in names and _matches(value.name, args.key)]
        if not values:
            raise UserError(f"{args.config} has no '{args.key}'")
    if args.format == "json":
        config = load_config(args.config, args.overrides).model_dump(mode="json")
        print_json({"config": _part(config, args.key), "origins": {value.name: value.origin for value in values}})
    else:
        print(as_table(values))
    return 0


def _part(config: Any, key: str | None) -> Any:
    """What is below a dotted key; the whole list where the key has N for the number of an item."""
    for part in key.split(".") if key else ():
        if part == ITEM:
            break
        config = config[int(part)] if isinstance(config, list) else config[part]
    return config


class Value(NamedTuple):
    """What a key of a file comes to."""

    name: str
    text: str
    origin: str
    """FILE, SET or DEFAULT."""


def values_of(path: str, overrides: Sequence[str] = ()) -> list[Value]:
    """Every key of a run's file with its value as the run would have it; raises as ``load_config`` does."""
    in_file = read_yaml(find_config(path))
    raw = copy.deepcopy(in_file)
    for override in overrides:
        apply_override(raw, override)
    config = parse_config(raw, where=path)
    changed = [override.partition("=")[0] for override in overrides]
    return [
        Value(name, text, _origin(name, in_file, changed))
        for name, text in sorted(_walk(config, ""), key=lambda pair: "." in pair[0])  # the top level first
    ]


def _walk(block: BaseModel, prefix: str) -> Iterator[tuple[str, str]]:
    """Dotted names and values of what is no block, in the order of the configuration."""
    for name, field in type(block).model_fields.items():
        value, dotted = getattr(block, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from _walk(value, f"{dotted}.")
        elif isinstance(value, tuple) and next(blocks_in(field.annotation), None):
            for i, item in enumerate(value):
                yield from _walk(item, f"{dotted}.{i}.")
        else:
            words = left_out(field) if value is None else None
            yield dotted, f"null ({words})" if words else value_text(value)


def _origin(name: str, in_file: dict[str, Any], changed: Sequence[str]) -> str:
    if any(name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for key in changed):
        return SET
    node: Any = in_file
    for part in name.split("."):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            return DEFAULT
    return FILE


def _matches(name: str, wanted: str) -> bool:
    """Whether a key of a file lies in what was asked for: ``curriculum.0`` is one stage, ``curriculum`` all."""
    parts = name.split(".")
    return all(want in (part, ITEM) for part, want in zip(parts, wanted.split("."), strict=False))


def as_table(values: Sequence[Value]) -> str:
    """A line for each: name, value, origin."""
    names, texts = max(len(value.name) for value in values), max(len(value.text) for value in values)
    return "\n".join(f"{value.name:<{names}}  {value.text:<{texts}}  {value.origin}" for value in values)
