"""Every key of a run's YAML with type, default and meaning, read off the typed configuration itself.

Names are dotted as in ``--set``; an item of a list is ``N``: ``curriculum.N.seq_len``. A default that is no constant is
told by the field's ``json_schema_extra={"left_out": ...}``.
"""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from data_pipeline.configuration import ITEM, blocks_in, did_you_mean, suggestions
from data_pipeline.errors import UserError
from pretrain.config.run import RunConfig

REQUIRED = "required"

_NAMES = {int: "integer", float: "number", bool: "true | false", str: "text", Any: "anything"}
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


@dataclass(frozen=True)
class Key:
    """One key as a reader of the YAML sees it."""

    name: str
    """Dotted, from the top of the file."""
    block: str
    """Dotted name of the block that it stands in, empty at the top."""
    type: str
    """Kind of value with its bounds, or the choices."""
    default: str
    """What holds if the key is left out, as YAML or in words."""
    meaning: str
    opens: str | None = None
    """Dotted name of the block, or of an item of the list of blocks, that the key holds; None for a plain value."""
    about: str = ""
    """What that block or item is."""
    is_map: bool = False
    """The key holds keys that the user names."""


def all_keys() -> tuple[Key, ...]:
    """The keys of a run in the order of the configuration, each block's own before those of the blocks within."""
    return tuple(_keys_of(RunConfig, ""))


def _keys_of(model: type[BaseModel], block: str) -> Iterator[Key]:
    inner: list[tuple[type[BaseModel], str]] = []
    for name, field in model.model_fields.items():
        dotted = f"{block}.{name}" if block else name
        nested = next(blocks_in(field.annotation), None)
        meaning = field.description or ""
        opens, about = None, ""
        if nested is not None:
            is_block = nested is field.annotation
            opens = dotted if is_block else f"{dotted}.{ITEM}"
            about = meaning if is_block else (nested.__doc__ or "").partition("\n")[0]
            inner.append((nested, opens))
        # Names that a registry has are no Literal; the field tells them.
        kind = _extra(field, "type") or type_text(field.annotation, field.metadata)
        yield Key(dotted, block, kind, _default(field), meaning, opens, about, kind.startswith("map"))
    for nested, opens in inner:
        yield from _keys_of(nested, opens)


def type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words with its bounds: ``number > 0``, ``adamw | lion | muon``, ``list of blocks, at least 1``."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for part in parts[1:] for m in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return type_text(parts[0], [*metadata, *inner])
    if origin is Literal:
        return " | ".join(str(part) for part in parts)
    if origin in (Union, types.UnionType):
        texts = [type_text(part, metadata) for part in parts if part is not type(None)]
        return " or ".join(texts) + (", or null" if type(None) in parts else "")
    if origin is tuple:
        least = [f", at least {m.min_length}" for m in metadata if hasattr(m, "min_length")]
        if parts[-1] is not Ellipsis:
            return f"list of {len(parts)}: {type_text(parts[0])}"
        item = "blocks" if next(blocks_in(parts[0]), None) else type_text(parts[0])
        return "".join([f"list of {item}", *least])
    if origin is dict:
        return f"map of name to {type_text(parts[1])}"
    if annotation not in _NAMES:
        return "block" if next(blocks_in(annotation), None) else str(annotation)
    bounds = [f"{sign} {_bound(getattr(m, name))}" for name, sign in _BOUNDS for m in metadata if hasattr(m, name)]
    patterns = [f" matching {m.pattern}" for m in metadata if getattr(m, "pattern", None)]
    return " ".join([_NAMES[annotation], " and ".join(bounds)]).rstrip() + "".join(patterns)


def _bound(value: float) -> str:
    if isinstance(value, int) and value >= 2**32 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return value_text(value)


def value_text(value: Any) -> str:
    """A value as one writes it in the YAML: ``null``, ``true``, ``1e-8``, ``[0.9, 0.95]``, ``{web: 1}``."""
    if isinstance(value, float):
        return f"{value:.17g}" if value.is_integer() else repr(value).replace("e-0", "e-")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {value_text(inner)}' for key, inner in value.items())}}}"
    return yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True).removesuffix("...\n").strip()


def left_out(field: FieldInfo) -> str | None:
    """What holds if the key is left out, in words, where that is no constant."""
    return _extra(field, "left_out")


def _extra(field: FieldInfo, name: str) -> str | None:
    extra = field.json_schema_extra
    return str(extra[name]) if isinstance(extra, dict) and name in extra else None


def _default(field: FieldInfo) -> str:
    words = left_out(field)
    if words is not None:
        return words
    if field.is_required():
        return REQUIRED
    value = field.get_default(call_default_factory=True)
    return "its defaults" if isinstance(value, BaseModel) else value_text(value)


def pattern_of(name: str) -> str:
    """The name of a key with ``N`` for the numbers of items: ``curriculum.0.seq_len`` -> ``curriculum.N.seq_len``."""
    return ".".join(ITEM if part.isdigit() else part for part in name.split("."))


def find(name: str, keys: Sequence[Key]) -> tuple[Key, ...]:
    """The key of that name, with the keys of the blocks that it holds; raises :class:`UserError` for an unknown one.

    A name within a map, such as ``deepspeed.zero_optimization``, finds the map.
    """
    wanted = pattern_of(name).removesuffix(f".{ITEM}")
    within = tuple(key for key in keys if key.name.startswith(f"{wanted}."))
    found = tuple(key for key in keys if key.name == wanted and key.opens != wanted) + within
    found = found or tuple(key for key in keys if key.is_map and wanted.startswith(f"{key.name}."))
    if found:
        return found
    names = [key.name for key in keys]
    near = suggestions(wanted, names, names)
    raise UserError(f"unknown key '{name}': {did_you_mean(near) if near else '`nystrom config` lists all of them'}")


def in_blocks(keys: Iterable[Key]) -> dict[str, list[Key]]:
    """The keys by the dotted name of their block."""
    groups: dict[str, list[Key]] = {}
    for key in keys:
        groups.setdefault(key.block, []).append(key)
    return groups


def as_text(keys: Sequence[Key], width: int) -> str:
    """For a terminal: by block, each key with type and default in a line and its meaning below."""
    abouts = {key.opens: key.about for key in all_keys() if key.opens}
    lines: list[str] = []
    for block, members in in_blocks(keys).items():
        if block and len(keys) > 1:
            lines += ["", *textwrap.wrap(f"{block}: {abouts[block]}", width)]
        for key in members:
            default = key.default if key.default == REQUIRED else f"default: {key.default}"
            lines += textwrap.wrap(f"{key.name}  ({key.type}; {default})", width, subsequent_indent="      ")
            lines += textwrap.wrap(key.meaning, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines).lstrip("\n")


PREAMBLE = """# Configuration

Every key of a run's YAML file. `nystrom config optimizer.lr` prints one of them. `nystrom config --config FILE` prints
the values of a file. This page is made by `nystrom config --format markdown`, and a test compares the two.

Names are dotted as in `--set`: `optimizer.lr` is the key `lr` of the block `optimizer`. N is the number of an item of a
list, from 0. [training.md](training.md) explains what a run does with them; [configs/](../configs/) has whole files."""


def as_markdown(keys: Sequence[Key]) -> str:
    """The page docs/configuration.md: a table for each block."""
    abouts = {key.opens: key.about for key in keys if key.opens}
    lines = [PREAMBLE]
    for block, members in in_blocks(keys).items():
        heading = [f"## {block}", "", abouts[block]] if block else ["## Top level", "", "What stands in no block."]
        lines += ["", *heading, "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key in members:
            kind = f"[{key.type}](#{key.opens.replace('.', '').lower()})" if key.opens else key.type
            lines.append(f"| {' | '.join(map(_cell, (f'`{key.name}`', kind, key.default, key.meaning)))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
